"""Requests and tokens per minute, respected across all threads of this process.

    limits = Limits(requests=60, tokens=90_000)
    admission = limits.enter(tokens=1200)      # waits, first come, first served, until both limits
        have room
    limits.leave(admission, tokens=800)        # what it really took; None: not known, so the
        estimate stands

A call counts from its admission until a window after its end: when in between the server counts it,
nobody here knows. So no window of the server's clock holds more than is allowed, however long
requests are on their way.

This is our own because both limits must be taken at once, and be corrected afterwards.
PyrateLimiter, aiolimiter and their like have neither: two of their limiters in a row hold the room
of the first while they wait for the second, and what was taken cannot be given back
(vutran1710/PyrateLimiter, issue 189).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from dspy.utils.exceptions import LMError, is_retryable_lm_error

from cowest_dspy.store.call_context import call_context, current_stopping

T = TypeVar("T")

WINDOW = 60.0


def rest(seconds: float) -> None:
    """Sleep; a stop ends it at once.

    Raises:
        KeyboardInterrupt: the work was stopped.
    """
    stopping, waker = current_stopping(), threading.Event()
    with stopping.waking(waker):
        stopping.check()
        waker.wait(seconds)
        stopping.check()


def retry(attempt: Callable[[], T], retries: int, pause: Callable[[LMError, int], float]) -> T:
    """The result of ``attempt()``, which is made again after failures that may pass (429, 5xx, a
    broken connection): so many times at most, ``pause(error, number)`` seconds later. The run's
    budget counts each attempt; a stop ends the wait.

    Raises:
        LMError: a failure that does not pass, or the last one.
        BudgetError: a retry for which the budget has no room.
        KeyboardInterrupt: the work was stopped.
    """
    for number in range(retries + 1):
        paying = call_context().paying
        if number and paying is not None:
            paying.retry()
        try:
            return attempt()
        except LMError as error:
            if number == retries or not is_retryable_lm_error(error):
                raise
            seconds = pause(error, number)
        rest(seconds)
    raise AssertionError("the last attempt returns or raises")


@dataclass(eq=False)
class Admission:
    """A call that was let in: its tokens, and until when it counts (for ever, while it is under
    way)."""

    tokens: int
    until: float = float("inf")


class Limits:
    """The two limits of one endpoint and key. Thread-safe; waiting threads sleep, and are let in in
    the order in which they came.

    Args:
        requests: how many calls a window may hold; None is without limit.
        tokens: how many tokens, of prompts and answers, a window may hold; None is without limit.
        window: its length in seconds.
        clock: seconds on a clock that never goes back.
        waker: makes what a waiting call waits on; tests give a ``threading.Event`` of their own.
    """

    def __init__(
        self,
        requests: int | None = None,
        tokens: int | None = None,
        *,
        window: float = WINDOW,
        clock: Callable[[], float] = time.monotonic,
        waker: Callable[[], Any] = threading.Event,
    ) -> None:
        self.requests, self.tokens, self.window = requests, tokens, window
        self._clock, self._waker = clock, waker
        self._lock = threading.Lock()
        self._calls, self._taken = 0, 0
        self._ended: deque[Admission] = deque()
        self._queue: deque[Any] = deque()
        self._held_until = float("-inf")

    def enter(self, tokens: int = 0) -> Admission:
        """Wait for room for one call of an estimated number of tokens, and take it.

        An estimate above the whole limit waits for an empty window: it is only an estimate.

        Raises:
            KeyboardInterrupt: the work was stopped (:func:`stoppable`) while it waited.
        """
        mine, stopping = self._waker(), current_stopping()
        with stopping.waking(mine):
            with self._lock:
                self._queue.append(mine)
            try:
                while True:
                    stopping.check_before_sending()
                    with self._lock:
                        mine.clear()
                        found = self._admit(tokens) if self._queue[0] is mine else None
                        if isinstance(found, Admission):
                            return found
                        seconds = found
                    # A stop between the check and the clear would be lost: look again.
                    stopping.check_before_sending()
                    mine.wait(seconds)
            finally:
                with self._lock:
                    self._queue.remove(mine)
                    self._wake_first()

    def try_enter(self, tokens: int = 0) -> Admission | float | None:
        """Enter without waiting: where there is no room, the seconds until there may be
        some, or None where that depends on the end of other calls."""
        with self._lock:
            return self._admit(tokens)

    def _admit(self, tokens: int) -> Admission | float | None:
        wanted = tokens if self.tokens is None else min(tokens, self.tokens)
        seconds = self._seconds_until_room(wanted)
        if seconds != 0.0:
            return seconds
        self._calls, self._taken = self._calls + 1, self._taken + wanted
        return Admission(wanted)

    def leave(self, admission: Admission, tokens: int | None = None) -> None:
        """End a call, and replace the estimate of its tokens by what it really took, where that
        is known."""
        with self._lock:
            if tokens is not None:
                self._taken += tokens - admission.tokens
                admission.tokens = tokens
            admission.until = self._clock() + self.window
            self._ended.append(admission)
            self._wake_first()

    def hold(self, seconds: float) -> None:
        """Admit no call for so long: the server would refuse it
        (``Retry-After``)."""
        with self._lock:
            self._held_until = max(self._held_until, self._clock() + seconds)
            self._wake_first()

    def _wake_first(self) -> None:
        if self._queue:
            self._queue[0].set()

    def _seconds_until_room(self, tokens: int) -> float | None:
        """0.0 when a call may go now; None when it depends on the end of others, which wake the
        first in the queue."""
        now = self._clock()
        if now < self._held_until:
            return self._held_until - now
        while self._ended and self._ended[0].until <= now:
            gone = self._ended.popleft()
            self._calls, self._taken = self._calls - 1, self._taken - gone.tokens
        requests = self.requests is None or self._calls < self.requests
        if requests and (self.tokens is None or self._taken + tokens <= self.tokens):
            return 0.0
        # The earliest to leave the window; there may be room then. A moment later than now at
        # least, or the wait would spin.
        return max(self._ended[0].until - now, 1e-4) if self._ended else None


_shared: dict[tuple[str | None, ...], Limits] = {}
_shared_lock = threading.Lock()
_made_by: Callable[[tuple[str | None, ...]], Limits] | None = None


def shared_limits(
    *endpoint: str | None, requests: int | None = None, tokens: int | None = None
) -> Limits:
    """The limits of an endpoint (model, address, name of the key's variable): the same object for
    the same endpoint.

    A number replaces the one that was set before; None leaves it.
    """
    with _shared_lock:
        if endpoint not in _shared:
            _shared[endpoint] = _made_by(endpoint) if _made_by else Limits()
        limits = _shared[endpoint]
        limits.requests = requests or limits.requests
        limits.tokens = tokens or limits.tokens
        return limits


def share_limits(make: Callable[[tuple[str | None, ...]], Limits]) -> None:
    """Have the limits of every endpoint of this process made by ``make`` from now on: those of
    several processes can be one."""
    global _made_by
    with _shared_lock:
        _made_by = make
        _shared.clear()
