"""Engines of one process share its cores: two batches at once would only slow each other down, so
they take turns.

All of their work is done in one thread. OpenMP keeps a team of workers for every thread that has
computed, and as soon as there are more of them than cores, its barriers wait in the kernel instead
of in a loop: a step of decoding, which has a thousand short products, took 220 ms instead of 130
(64 rows of 135 million parameters on two cores). For the same reason the thread ends when it has
had nothing to do for a moment: training, in its own thread, then has the cores to itself.
"""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

Result = TypeVar("Result")

_IDLE = 0.5  # seconds
_PATIENCE = 30.0  # seconds


class Turns:
    """Work of many threads, done in one, in the order in which it was asked for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tasks: queue.Queue[tuple[Callable[[], Any], Future[Any]]] = queue.Queue()
        self._thread: threading.Thread | None = None
        self.ending = False
        atexit.register(self._end)

    def _end(self) -> None:
        """At the end of the process: waits for the work in hand. Python ends threads that are in
        the midst of a computation by unwinding them, which C++ answers by aborting the process.
        Long work looks at ``ending`` now and then, and stops."""
        self.ending = True
        thread = self._thread
        if thread is not None:
            thread.join(_PATIENCE)

    @property
    def wanted(self) -> bool:
        """Whether somebody waits for a turn."""
        return not self._tasks.empty()

    def run(self, work: Callable[[], Result]) -> Result:
        """What ``work()`` gives, or raises, when its turn has come; at once for who has the turn
        already."""
        if threading.current_thread() is self._thread:
            return work()
        result: Future[Result] = Future()
        with self._lock:
            self._tasks.put((work, result))
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._serve, name="cowest compute", daemon=True
                )
                self._thread.start()
        return result.result()

    def _serve(self) -> None:
        while True:
            try:
                work, result = self._tasks.get(timeout=_IDLE)
            except queue.Empty:
                with self._lock:
                    if self._tasks.empty():
                        self._thread = None
                        return
                continue
            if self.ending:
                return
            try:
                result.set_result(work())
            except BaseException as error:
                result.set_exception(error)
            # Otherwise the weights that a task closes over would live until the next one.
            del work, result
            if self.ending:
                return


COMPUTE = Turns()
