"""[budget]: what a run may spend, and the guard that keeps it: one sum across threads, retries and
resumes.

    with Store("runs/mine", budget=Budget(strong_calls=500, usd=2.0), strong=strong.model) as store:
        collect(program, examples, metric, store=store)      # BudgetError at the limit; the same
            again, with more, goes on

Before each real call the guard looks at what was spent, by this process and by those before it on
the same run folder; what the store can answer is free. ``strong_calls`` counts every attempt on the
strong model's id, retries and calls under way included, so it is never exceeded. Tokens, dollars
and minutes are known only afterwards: the run stops before the next call, over by no more than what
was under way. Calls that were under way when a process was killed count as spent, each at the most
that a call of its model has taken.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from pydantic import BaseModel, ConfigDict, Field

from cowest_dspy.errors import BudgetError
from cowest_dspy.store.usage import add_usd


class Budget(BaseModel):
    """[budget]: limits of a whole run, all of its stages and resumes together; what is not given is
    not limited."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    usd: float | None = Field(
        None, ge=0, description="US dollars of all calls; models on one's own machines cost nothing"
    )
    strong_calls: int | None = Field(
        None, ge=0, description="requests to the strong model, retries and failures included"
    )
    tokens: int | None = Field(None, ge=0, description="prompt and generated tokens of all models")
    minutes: float | None = Field(
        None, ge=0, description="time at work: in stages, and in calls outside of one"
    )

    @property
    def limited(self) -> bool:
        """Whether anything is limited."""
        return any(value is not None for value in self.model_dump().values())


@dataclass(frozen=True)
class Bill:
    """The sum that was spent. ``usd`` is None when the price of a call is not known; ``seconds``
    are those of earlier processes.

    ``killed`` calls were under way when a process was killed, and are in the numbers; those of
    ``unpriced`` (model to calls) are in ``strong_calls`` only, since no call of their model has
    been answered yet.
    """

    strong_calls: int = 0
    tokens: int = 0
    usd: float | None = 0.0
    seconds: float = 0.0
    killed: int = 0
    unpriced: Mapping[str, int] = field(default_factory=dict)

    @property
    def killed_calls(self) -> str:
        """A sentence about calls that were under way when a process was killed; empty where there
        were none."""
        if not self.killed:
            return ""
        one = self.killed == 1
        calls, they = (
            ("1 call was", "it counts") if one else (f"{self.killed:,} calls were", "they count")
        )
        unpriced = sum(self.unpriced.values())
        price = f"; the price of {unpriced:,} of them is unknown" if unpriced else ""
        return f"{calls} under way when a process was killed; {they} as spent{price}"


@dataclass(frozen=True)
class Limit:
    """What was spent of one thing that [budget] can limit, by all processes of a run; None where it
    is not known. ``most`` is None where it is not limited."""

    name: str
    spent: float | None
    most: float | None = None

    def __str__(self) -> str:
        digits = {"USD": 4, "minutes": 1}.get(self.name, 0)
        spent = "not known" if self.spent is None else f"{self.spent:,.{digits}f}"
        return f"{self.name} {spent}" + ("" if self.most is None else f" of {self.most:,}")


class Clock:
    """A clock of the seconds in which at least one thread is inside of ``with clock:``."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._lock = now, threading.Lock()
        self._inside, self._since, self._before = 0, 0.0, 0.0

    def __enter__(self) -> Clock:
        with self._lock:
            if not self._inside:
                self._since = self._now()
            self._inside += 1
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._before += self._now() - self._since

    @property
    def seconds(self) -> float:
        """Seconds counted so far."""
        with self._lock:
            return self._before + (self._now() - self._since if self._inside else 0.0)


@dataclass
class Paying:
    """One call that was let in, and how many attempts it took so far; ``guard`` is of the budget
    that limits it. ``on_retry(attempts)`` is called before one more is made."""

    guard: BudgetGuard | None = None
    strong: bool = False
    attempts: int = 1
    on_retry: Callable[[int], None] = lambda attempts: None

    @property
    def limited(self) -> bool:
        """Whether the attempts of this call are limited."""
        guard = self.guard
        return guard is not None and self.strong and guard.budget.strong_calls is not None

    def retry(self) -> None:
        """Let one more attempt in, which counts as another call.

        Raises:
            BudgetError: there is no room for it.
        """
        if self.guard is not None:
            self.guard.admit(self.strong)
        self.attempts += 1
        self.on_retry(self.attempts)

    def withdraw(self) -> None:
        """Take back the last attempt: it ends before it is sent, as when the work is stopped while
        it waits."""
        self.attempts -= 1
        if self.guard is not None:
            self.guard.withdraw(self.strong)


@dataclass
class BudgetGuard:
    """Enforce a budget. Thread-safe.

    Args:
        budget: the limits.
        clock: the time at work in this process.
        bill: what was spent before.
        strong: the strong model's id; without one no call counts as the strong model's.
    """

    budget: Budget
    clock: Clock
    bill: Bill = field(default_factory=Bill)
    strong: str | None = None
    _under_way: int = 0
    _refused: str | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def paying(self, model: str) -> Iterator[Paying]:
        """A context around one real call.

        Raises:
            BudgetError: a limit is reached, or was reached before: then nobody is let in any more.
        """
        call = Paying(self, model == self.strong)
        self.admit(call.strong)
        try:
            yield call
        finally:
            if call.strong:
                with self._lock:
                    self._under_way -= call.attempts
                    self.bill = replace(
                        self.bill, strong_calls=self.bill.strong_calls + call.attempts
                    )

    def withdraw(self, strong: bool) -> None:
        """Take back an attempt that was not made."""
        if strong:
            with self._lock:
                self._under_way -= 1

    def book(self, model: str, tokens: int, usd: float | None) -> None:
        """Book what an answer took; as much for each call of the model that a kill has left
        without a price."""
        with self._lock:
            bill, calls = self.bill, 1 + self.bill.unpriced.get(model, 0)
            total = add_usd(bill.usd, None if usd is None else usd * calls)
            unpriced = {name: count for name, count in bill.unpriced.items() if name != model}
            self.bill = replace(
                bill, tokens=bill.tokens + tokens * calls, usd=total, unpriced=unpriced
            )

    def limits(self) -> tuple[Limit, ...]:
        """The amount spent of each thing that can be limited."""
        bill, most = self.bill, self.budget
        return (
            Limit("strong calls", bill.strong_calls + self._under_way, most.strong_calls),
            Limit("tokens", bill.tokens, most.tokens),
            Limit("USD", bill.usd, most.usd),
            Limit("minutes", round(self._minutes(), 3), most.minutes),
        )

    def spent(self) -> str:
        """Format what was spent, in words: ``strong calls 96 of 100, tokens 12,345, USD 0.0210,
        minutes 3.2 of 60``; and how many calls a kill has left without an answer."""
        return "; ".join(filter(None, (", ".join(map(str, self.limits())), self.bill.killed_calls)))

    def admit(self, strong: bool) -> None:
        """Count one more attempt of a call; ``strong``: of the strong model.

        Raises:
            BudgetError: as :meth:`paying`.
        """
        with self._lock:
            self._refused = self._refused or self._reached(strong)
            if self._refused:
                raise BudgetError(
                    f"{self._refused} Spent: {self.spent()}. Everything that was answered is kept: "
                    "raise that limit of the budget, and the same command or call goes on from "
                    "here."
                )
            if strong:
                self._under_way += 1

    def _reached(self, strong: bool) -> str | None:
        limits, bill = self.budget, self.bill
        if (
            strong
            and limits.strong_calls is not None
            and bill.strong_calls + self._under_way >= limits.strong_calls
        ):
            return f"The budget of strong_calls = {limits.strong_calls} is reached."
        if limits.tokens is not None and bill.tokens >= limits.tokens:
            return f"The budget of tokens = {limits.tokens} is reached."
        if limits.minutes is not None and self._minutes() >= limits.minutes:
            return f"The budget of minutes = {limits.minutes:g} is reached."
        if limits.usd is not None and bill.usd is None:
            return (
                "A budget of usd cannot be kept: the price of an answer is not known, since its "
                "engine or its server did not say it "
                "(price = { input = ..., output = ... } of an API, serialize.with_price of an "
                "engine). "
                "Limit strong_calls or tokens instead."
            )
        if limits.usd is not None and bill.usd is not None and bill.usd >= limits.usd:
            return f"The budget of usd = {limits.usd:g} is reached."
        return None

    def _minutes(self) -> float:
        return (self.bill.seconds + self.clock.seconds) / 60
