"""Engines of one process share its cores: two batches at once would only slow each other down, so they take turns."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """A lock that is given in the order in which it was asked for, and that knows whether somebody waits."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[threading.Event] = deque()
        self._taken = False

    @property
    def wanted(self) -> bool:
        """Whether somebody waits for a turn."""
        return bool(self._waiting)

    @contextmanager
    def mine(self) -> Iterator[None]:
        """A context in which it is the caller's turn."""
        with self._lock:
            called = threading.Event()
            if self._taken:
                self._waiting.append(called)
            else:
                self._taken = True
                called.set()
        try:
            called.wait()
            yield
        finally:
            self._pass_on(called)

    def _pass_on(self, called: threading.Event) -> None:
        with self._lock:
            if not called.is_set():  # interrupted while it waited
                self._waiting.remove(called)
            elif self._waiting:
                self._waiting.popleft().set()
            else:
                self._taken = False


COMPUTE = Turns()
