"""Calls per second, and the time that is left: both of the last while, since a run that goes on
reads at first what it has."""

from __future__ import annotations

from collections import deque

WINDOW = 10.0
"""Seconds over which calls per second are taken."""
LEAST_STEPS, LEAST_SECONDS = 8, 30.0
"""What the estimate of the time left looks back on: so many advances, or so many seconds, whichever
is more."""


class Rate:
    """How often something happens in a second, over the last ``WINDOW`` seconds; told now and then
    how often it has in all."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def see(self, now: float, count: int) -> None:
        """``count``: how often so far."""
        self._seen.append((now, count))
        while len(self._seen) > 2 and self._seen[1][0] <= now - WINDOW:
            self._seen.popleft()

    def per_second(self) -> float:
        """0.0 until there are two looks at different times."""
        if len(self._seen) < 2:
            return 0.0
        (before, first), (now, last) = self._seen[0], self._seen[-1]
        return (last - first) / (now - before) if now > before else 0.0


class Pace:
    """How fast a stage advances, and how long the rest of it takes."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def see(self, now: float, done: int) -> None:
        """``done`` may go back where a stage begins anew: what was seen before is then
        forgotten."""
        if self._seen and done < self._seen[-1][1]:
            self._seen.clear()
        if self._seen and done == self._seen[-1][1]:
            return
        self._seen.append((now, done))
        while len(self._seen) > LEAST_STEPS + 1 and self._seen[1][0] <= now - LEAST_SECONDS:
            self._seen.popleft()

    def left(self, now: float, total: int) -> float | None:
        """Seconds; None while nothing can be said."""
        if len(self._seen) < 2:
            return None
        (before, first), (last, done) = self._seen[0], self._seen[-1]
        if last <= before:
            return None
        each = (last - before) / (done - first)
        # Of the step that is under way, what has passed already.
        return max((total - done) * each - min(now - last, each), 0.0) if done < total else 0.0
