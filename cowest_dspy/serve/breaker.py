"""Breaker: a model that fails again and again is left alone for a while, then tried by one request,
then used again.

closed      it is asked; so many failures in a row open it
open        it is not asked, for so many seconds
on trial    one request asks it: a success closes the breaker, a failure opens it for as long again
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Literal

from cowest_dspy.serve.config import BreakerRules

State = Literal["closed", "open", "on trial"]


class Breaker:
    """The breaker of one model. Thread-safe. Whoever is let in says how it ended: ``succeeded``,
    ``failed`` or ``released``."""

    def __init__(self, rules: BreakerRules, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._rules, self._clock, self._lock = rules, clock, threading.Lock()
        self._failures, self._opened, self._trial = 0, 0.0, False

    @property
    def state(self) -> State:
        """As it is now; it stays open until a request comes that may try."""
        with self._lock:
            return (
                "on trial"
                if self._trial
                else "open"
                if self._failures >= self._rules.failures
                else "closed"
            )

    def enter(self) -> bool:
        """Whether the model may be asked now."""
        with self._lock:
            if self._failures < self._rules.failures:
                return True
            if self._trial or self._clock() - self._opened < self._rules.seconds:
                return False
            self._trial = True
            return True

    def seconds_left(self) -> float:
        """Until it is tried again; 0 when it may be asked, or is being tried."""
        with self._lock:
            if self._failures < self._rules.failures or self._trial:
                return 0.0
            return max(0.0, self._rules.seconds - (self._clock() - self._opened))

    def succeeded(self) -> None:
        """The model has answered."""
        with self._lock:
            self._failures, self._trial = 0, False

    def failed(self) -> None:
        """The model has not answered: it timed out, refused the call, or could not be reached."""
        with self._lock:
            self._failures += 1
            if self._trial or self._failures == self._rules.failures:
                self._opened = self._clock()
            self._trial = False

    def released(self) -> None:
        """It is not known whether the model works: the request was given up before it was asked."""
        with self._lock:
            self._trial = False
