"""What can go wrong between a client and a hosted model, as a plan that a fake server carries
out."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong with one request. Make it with the class methods."""

    kind: str
    code: int = 0
    retry_after: float | None = None
    seconds: float = 0.0
    error_code: str | None = None
    message: str = ""

    @classmethod
    def status(
        cls,
        code: int,
        *,
        retry_after: float | None = None,
        error_code: str | None = None,
        message: str = "",
    ) -> Fault:
        """An HTTP error in OpenAI's form: 429 with ``Retry-After`` seconds, 500, 503, 401 ...

        ``error_code`` is the protocol's own, such as ``"context_length_exceeded"`` (with 400) or
        ``"insufficient_quota"``.
        """
        return cls("status", code, retry_after, 0.0, error_code, message)

    @classmethod
    def reset(cls) -> Fault:
        """The connection is reset before an answer."""
        return cls("reset")

    @classmethod
    def slow(cls, seconds: float) -> Fault:
        """The right answer, after so many seconds of silence."""
        return cls("slow", seconds=seconds)

    @classmethod
    def drip(cls, seconds: float) -> Fault:
        """The right answer, byte by byte over so many seconds: there is never silence for long."""
        return cls("drip", seconds=seconds)

    @classmethod
    def truncated(cls) -> Fault:
        """Half of the right answer's body, then the connection is closed."""
        return cls("truncated")

    @classmethod
    def garbled(cls) -> Fault:
        """Status 200 and a whole body that is not JSON."""
        return cls("garbled")


class Plan:
    """The faults of a server: those declared, in order of arrival, then random ones at a rate;
    thread-safe.

    None in ``faults`` lets a request pass. Random faults are drawn from a seeded generator in order
    of arrival.
    """

    def __init__(self, faults: Iterable[Fault | None], rate: float, seed: int) -> None:
        self._declared, self._rate, self._random = iter(tuple(faults)), rate, random.Random(seed)
        self._lock = threading.Lock()
        self._kinds = (
            Fault.status(429, retry_after=0.05),
            Fault.status(500),
            Fault.reset(),
            Fault.truncated(),
            Fault.garbled(),
        )

    def next(self) -> Fault | None:
        """What goes wrong with the next request, or None."""
        with self._lock:
            for fault in self._declared:
                return fault
            return self._random.choice(self._kinds) if self._random.random() < self._rate else None
