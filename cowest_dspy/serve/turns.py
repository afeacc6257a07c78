"""Turns: so many requests at once, so many that wait, first come first served; and the threads that
models are asked in.

Both belong to the event loop of one server. A thread cannot be stopped, so a request whose time is
over keeps its turn until its model has come back: no more models are asked at once than is said,
whatever clients do.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Generic, TypeVar

from cowest_dspy.serve.config import ServeLimits

Made = TypeVar("Made")
FIRST_GUESS = 1.0
"""Seconds that a request is thought to take before one was answered."""


class Full(Exception):
    """As many requests wait as may; ``retry_after`` are seconds."""

    def __init__(self, retry_after: float) -> None:
        super().__init__("the queue is full")
        self.retry_after = retry_after


class Turns:
    """Who may ask now. Only used on the event loop, so that nothing needs a lock."""

    def __init__(self, limits: ServeLimits) -> None:
        self._limits = limits
        self._waiting: deque[asyncio.Future[None]] = deque()
        self.active, self._seconds = 0, FIRST_GUESS

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn."""
        return len(self._waiting)

    @property
    def free(self) -> bool:
        """Whether a turn can be taken without waiting."""
        return self.active < self._limits.concurrency and not self._waiting

    async def enter(self) -> None:
        """Waits for a turn and takes it; a wait that is cancelled leaves the queue.

        Raises:
            Full: too many wait already.
        """
        if self.free:
            self.active += 1
            return
        if len(self._waiting) >= self._limits.queue:
            raise Full(self._seconds * (len(self._waiting) + 1) / self._limits.concurrency)
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(mine)
        try:
            await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled():
                self.leave()
            else:
                with suppress(ValueError):
                    self._waiting.remove(mine)
            raise

    def leave(self, seconds: float | None = None) -> None:
        """Gives the turn to the next that waits; ``seconds``: what it took, from which the wait of
        others is reckoned."""
        if seconds is not None:
            self._seconds += 0.2 * (seconds - self._seconds)
        while self._waiting:
            following = self._waiting.popleft()
            if not following.done():
                following.set_result(None)
                return
        self.active -= 1


class Workers(Generic[Made]):
    """Threads that are started as they are needed, and do not keep a process alive that wants to
    end."""

    def __init__(self, most: int) -> None:
        self._most, self._started, self._idle = most, 0, 0
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()

    def run(self, work: Callable[[], Made]) -> asyncio.Future[Made]:
        """What ``work()`` gives, in a thread; its end is told on the caller's event loop, also when
        nobody waits for it."""
        loop = asyncio.get_running_loop()
        promise: asyncio.Future[Made] = loop.create_future()

        def job() -> None:
            try:
                made, error = work(), None
            except BaseException as raised:
                made, error = None, raised
            with suppress(RuntimeError):  # The loop is closed: the process ends.
                loop.call_soon_threadsafe(_settle, promise, made, error)

        with self._lock:
            if self._idle <= 0 and self._started < self._most:
                self._started += 1
                threading.Thread(
                    target=self._work, name=f"cowest-serve-{self._started}", daemon=True
                ).start()
            else:
                self._idle -= 1
        self._jobs.put(job)
        return promise

    def close(self) -> None:
        """Lets the threads end when they have done what they are at."""
        for _ in range(self._started):
            self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job
            with self._lock:
                self._idle += 1


def _settle(promise: asyncio.Future[Any], made: Any, error: BaseException | None) -> None:
    if promise.done():
        return
    if error is None:
        promise.set_result(made)
        return
    promise.set_exception(error)
    promise.exception()  # It was looked at: nobody may wait for it any more.
