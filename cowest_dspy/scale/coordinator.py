"""Budget, rate limits, progress and the wish to stop, of one collection over all of its shards.

``Coordinator`` is the body of one Ray actor. ``SharedGuard`` and ``SharedLimits`` are what a
shard's store and engines have in the place of limits of their own: they ask the coordinator before
each call. A call that a killed shard has left under way counts as spent, as everywhere.
"""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass
from typing import Any

from cowest_dspy.errors import BudgetError
from cowest_dspy.influence.collection import Tally
from cowest_dspy.store.budget import Bill, Budget, BudgetGuard, Clock
from cowest_dspy.store.call_context import current_stopping
from cowest_dspy.store.rate_limit import Admission, Limits

Endpoint = tuple[str | None, ...]
LONGEST_WAIT = 0.5
"""Seconds until a call that waits for a rate limit looks again, at most."""


@dataclass(frozen=True)
class Report:
    """How far a shard is: examples that are done, and drafts by what became of them."""

    examples: int
    tally: Tally


class Coordinator:
    """One collection's budget, rate limits and progress. Not thread-safe: an actor has one thread.

    Args:
        budget: that of the run; None is without limit.
        bill: what the run has spent before.
        strong: the strong model's id, whose calls ``budget.strong_calls`` counts.
    """

    def __init__(self, budget: Budget | None, bill: Bill, strong: str) -> None:
        clock = Clock()
        clock.__enter__()  # It counts until the actor ends.
        self._guard = BudgetGuard(budget or Budget(), clock, bill, strong)  # pyright: ignore[reportCallIssue]
        self._limits: dict[Endpoint, Limits] = {}
        self._under_way: dict[int, tuple[str, Endpoint, Admission]] = {}
        self._numbers = itertools.count()
        self._reports: dict[str, Report] = {}
        self._begun: set[str] = set()
        self._stopped = False

    def begin(self, shard: str) -> bool:
        """Begins a shard, or begins it again: what it had under way has ended with its process.
        Gives whether it may run."""
        for number, (owner, *_) in list(self._under_way.items()):
            if owner == shard:
                self.leave(number, None)
        self._reports.pop(shard, None)
        if not self._stopped:
            self._begun.add(shard)
        return not self._stopped

    def report(self, shard: str, report: Report) -> bool:
        """Takes how far a shard is; gives whether it may go on."""
        self._reports[shard] = report
        return not self._stopped

    def reports(self) -> list[Report]:
        """How far all shards are that have begun."""
        return list(self._reports.values())

    def stop(self) -> set[str]:
        """Lets no shard go on; gives those that had begun."""
        self._stopped = True
        return self._begun

    def admit(self, strong: bool) -> str | None:
        """Counts one attempt of a call; why there is no room for it in the budget, or None."""
        try:
            self._guard.admit(strong)
        except BudgetError as error:
            return str(error)
        return None

    def withdraw(self, strong: bool) -> None:
        """Takes an attempt back that was not made."""
        self._guard.withdraw(strong)

    def book(self, model: str, tokens: int, usd: float | None) -> None:
        """Books what an answer took."""
        self._guard.book(model, tokens, usd)

    def enter(
        self,
        shard: str,
        endpoint: Endpoint,
        requests: int | None,
        per_window: int | None,
        used: int,
    ) -> int | float:
        """Room for a call of so many tokens at an endpoint: the call's number, an int, or the
        seconds after which to ask again, a float."""
        limits = self._limits.setdefault(endpoint, Limits())
        limits.requests, limits.tokens = requests, per_window
        found = limits.try_enter(used)
        if not isinstance(found, Admission):
            return min(found or LONGEST_WAIT, LONGEST_WAIT)
        number = next(self._numbers)
        self._under_way[number] = shard, endpoint, found
        return number

    def leave(self, number: int, used: int | None) -> None:
        """Ends a call that had room, with the tokens that it really took."""
        if number in self._under_way:
            _, endpoint, admission = self._under_way.pop(number)
            self._limits[endpoint].leave(admission, used)

    def hold(self, endpoint: Endpoint, seconds: float) -> None:
        """Lets nobody in at an endpoint for so long."""
        self._limits.setdefault(endpoint, Limits()).hold(seconds)


class RemoteCoordinator:
    """A coordinator that is reached over Ray, with the same methods. What gives nothing back is not
    waited for."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Any:
        import ray

        def call(*arguments: Any) -> Any:
            made = getattr(self._actor, name).remote(*arguments)
            return None if name in ("withdraw", "book", "leave", "hold") else ray.get(made)

        return call


class SharedGuard(BudgetGuard):
    """The budget of a shard's store: that of the coordinator.

    Args:
        limited: whether the run's budget limits anything; otherwise nothing is asked.
    """

    def __init__(
        self, coordinator: Coordinator | RemoteCoordinator, strong: str, *, limited: bool
    ) -> None:
        super().__init__(Budget(), Clock(), strong=strong)  # pyright: ignore[reportCallIssue]
        self._coordinator, self._limited = coordinator, limited

    def admit(self, strong: bool) -> None:
        """Let a call in, and none once the shard is stopped (KeyboardInterrupt)."""
        current_stopping().check()
        refusal = self._coordinator.admit(strong) if self._limited else None
        if refusal is not None:
            raise BudgetError(refusal)

    def withdraw(self, strong: bool) -> None:
        """Take an attempt back that was not made."""
        if self._limited:
            self._coordinator.withdraw(strong)

    def book(self, model: str, tokens: int, usd: float | None) -> None:
        """Book what an answer took."""
        if self._limited:
            self._coordinator.book(model, tokens, usd)


@dataclass(eq=False)
class Numbered(Admission):
    """A call that the coordinator has let in, by its number there."""

    number: int = -1


class SharedLimits(Limits):
    """The rate limits of an endpoint in a shard: those of the coordinator. Without limits only what
    a server asks for (``Retry-After``) is shared."""

    def __init__(
        self, coordinator: Coordinator | RemoteCoordinator, shard: str, endpoint: Endpoint
    ) -> None:
        super().__init__()
        self._coordinator, self._shard, self._endpoint = coordinator, shard, endpoint
        self._first = threading.Lock()

    def enter(self, tokens: int = 0) -> Admission:
        """Wait for room. One thread of a shard asks at a time, and the others wait for it."""
        if self.requests is None and self.tokens is None:
            return super().enter(tokens)
        stopping, waker = current_stopping(), threading.Event()
        with stopping.waking(waker), self._first:
            while True:
                stopping.check_before_sending()
                found = self._coordinator.enter(
                    self._shard, self._endpoint, self.requests, self.tokens, tokens
                )
                if isinstance(found, int):
                    return Numbered(tokens, number=found)
                waker.wait(found)

    def leave(self, admission: Admission, tokens: int | None = None) -> None:
        """End a call that had room."""
        if isinstance(admission, Numbered):
            self._coordinator.leave(admission.number, tokens)
        else:
            super().leave(admission, tokens)

    def hold(self, seconds: float) -> None:
        """Let nobody in for so long."""
        if self.requests is None and self.tokens is None:
            super().hold(seconds)
        else:
            self._coordinator.hold(self._endpoint, seconds)
