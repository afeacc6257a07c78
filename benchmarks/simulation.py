"""A run as a discrete-event simulation (SimPy): who waits for whom, when there are more examples
and machines than are here.

    outcome = simulate(Load(examples=400, drafts=4, strong_slots=32), Times(call=2e-4, keep=7e-5,
    sync=2e-4, strong=0.3), seed=0)
    outcome.rate, outcome.bottleneck        # calls a second, and the resource that is busy most

A call takes a slot of its model, the driver's processor (``call``), the model's time, the driver's
processor again (``keep``), and a commit of the driver's store, which takes all answers that wait
for it at once (``sync``). That is what collect() does: one driver writes the store; its Python runs
one thread at a time. Several drivers have a store each.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import simpy

RESOURCES = ("weak", "strong", "limit", "driver", "store")
Steps = Generator[simpy.Event, Any, Any]


@dataclass(frozen=True)
class Times:
    """Service times in seconds: ``call`` and ``keep`` of the driver's processor for a call and for
    an answer that is kept, ``sync`` of a commit, ``weak`` of a draft in its slot, ``strong`` of an
    answer in its slot. ``spread``: the standard deviation of a strong answer's time as part of its
    mean (gamma distributed; 0: always the same, 1: exponential)."""

    call: float = 0.0
    keep: float = 0.0
    sync: float = 0.0
    weak: float = 0.0
    strong: float = 0.0
    spread: float = 0.0


@dataclass(frozen=True)
class Load:
    """What is to be done, and by how many: ``drafts`` of each example, slots (calls under way at
    once) of both models, ``limit`` strong calls a second (None: no limit), ``drivers`` with a store
    each. ``arrivals``: examples a second, at random (Poisson);
    None: the next one begins as soon as there is room, as in a run. ``ahead``: examples under way
        at once (None: enough that no slot of the strong model is empty for want of one)."""

    examples: int
    drafts: int = 4
    strong_slots: int = 1
    weak_slots: int = 1
    limit: float | None = None
    drivers: int = 1
    arrivals: float | None = None
    ahead: int | None = None

    @property
    def room(self) -> int:
        """Examples under way at once."""
        return self.ahead or 2 + 2 * self.strong_slots // (self.drafts + 1)

    @property
    def calls(self) -> int:
        """Calls of all examples: n drafts, n refined, one alone."""
        return self.examples * (2 * self.drafts + 1)


@dataclass
class _Tally:
    """What is counted while it goes on."""

    busy: dict[str, float] = field(default_factory=lambda: dict.fromkeys(RESOURCES, 0.0))
    ended: list[float] = field(default_factory=list)
    waited: float = 0.0
    inside: float = 0.0
    strong: int = 0
    commits: int = 0
    seen: list[tuple[float, dict[str, float]]] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """What came of it. ``rate``: calls a second in the middle half of all calls, without the
    beginning and the end. ``busy``: the part of that time that each resource was used, in [0, 1];
    of slots, the part that was taken. ``waited``: mean seconds that a strong call waited for its
    slot; ``inside``: that it took from asking for its slot to its end."""

    seconds: float
    rate: float
    busy: dict[str, float]
    waited: float
    inside: float
    strong_rate: float
    commits: int

    @property
    def bottleneck(self) -> str:
        """What gives way first. A slot is also taken while its call waits for a limit or the
        driver, so slots are it only where these have time left. A store's commits take all that
        waits, however much: they make calls longer, and never fewer."""
        full = [name for name in ("limit", "driver") if self.busy[name] > 0.9]
        return max(full or ("weak", "strong"), key=lambda name: self.busy[name])


class Run:
    """One simulated run. Drivers take turns: example number i is of driver i modulo their
    number."""

    def __init__(self, load: Load, times: Times, seed: int) -> None:
        self.load, self.times, self.random = load, times, random.Random(seed)
        self.env, self.tally = simpy.Environment(), _Tally()
        self.strong = _Slots(self.env, load.strong_slots)
        self.weak = _Slots(self.env, load.weak_slots)
        self.processors = [_Slots(self.env, 1) for _ in range(load.drivers)]
        self.stores = [_Store(self) for _ in range(load.drivers)]
        self.turn = 0.0
        self.quarters = (load.calls // 4, load.calls - load.calls // 4) if load.calls >= 100 else ()
        self.room = _Slots(self.env, load.room)

    def go(self) -> Outcome:
        """Runs it to its end."""
        self.env.process(self.examples())
        self.env.run()
        return self.outcome()

    def outcome(self) -> Outcome:
        """What was counted."""
        tally, load, seconds = self.tally, self.load, self.env.now or 1e-12
        (began, before), (over, after) = (
            tally.seen if len(tally.seen) == 2 else ((0.0, _Tally().busy), (seconds, tally.busy))
        )
        span = over - began or 1e-12
        rate = len(tally.ended) * (0.5 if len(tally.seen) == 2 else 1.0) / span
        many = {
            "weak": load.weak_slots,
            "strong": load.strong_slots,
            "driver": load.drivers,
            "store": load.drivers,
            "limit": 1,
        }
        busy = {
            name: min(1.0, (after[name] - before[name]) / span / many[name]) for name in RESOURCES
        }
        strong = max(1, tally.strong)
        return Outcome(
            seconds,
            rate,
            busy,
            tally.waited / strong,
            tally.inside / strong,
            tally.strong / seconds,
            tally.commits,
        )

    def examples(self) -> Steps:
        """Begins the examples: at random, or each when there is room."""
        for number in range(self.load.examples):
            if self.load.arrivals is not None:
                yield self.env.timeout(self.random.expovariate(self.load.arrivals))
                self.env.process(self.example(number % self.load.drivers))
                continue
            yield self.room.taken()
            self.env.process(self.held(number % self.load.drivers))

    def held(self, driver: int) -> Steps:
        """An example that leaves its room to the next."""
        yield self.env.process(self.example(driver))
        self.room.left()

    def example(self, driver: int) -> Steps:
        """The answer alone beside the drafts, each of which is refined when it is there."""
        parts = [self.env.process(self.answer(driver))]
        parts += [self.env.process(self.draft_and_refine(driver)) for _ in range(self.load.drafts)]
        yield self.env.all_of(parts)

    def draft_and_refine(self, driver: int) -> Steps:
        """A draft, then its refinement."""
        yield self.weak.taken()
        began = self.env.now
        yield from self.call(driver, self.times.weak)
        self.tally.busy["weak"] += self.env.now - began
        self.weak.left()
        yield from self.answer(driver)

    def answer(self, driver: int) -> Steps:
        """A call of the strong model."""
        asked = self.env.now
        yield self.strong.taken()
        began = self.env.now
        if self.load.limit is not None:
            # One call every 1/limit seconds, in order.
            self.turn = max(self.turn, began) + 1 / self.load.limit
            self.tally.busy["limit"] += 1 / self.load.limit
            yield self.env.timeout(self.turn - began)
        yield from self.call(driver, self.latency())
        self.tally.busy["strong"] += self.env.now - began
        self.tally.waited += began - asked
        self.tally.inside += self.env.now - asked
        self.tally.strong += 1
        self.strong.left()

    def call(self, driver: int, seconds: float) -> Steps:
        """What every call does: the driver prepares it, the model takes its time, the driver keeps
        the answer."""
        yield from self.compute(driver, self.times.call)
        if seconds:
            yield self.env.timeout(seconds)
        yield from self.compute(driver, self.times.keep)
        if self.times.sync:
            yield self.stores[driver].commit()
        self.tally.ended.append(self.env.now)
        if len(self.tally.ended) in self.quarters:
            self.tally.seen.append((self.env.now, dict(self.tally.busy)))

    def compute(self, driver: int, seconds: float) -> Steps:
        """The driver's processor, for so long."""
        if not seconds:
            return
        yield self.processors[driver].taken()
        yield self.env.timeout(seconds)
        self.processors[driver].left()
        self.tally.busy["driver"] += seconds

    def latency(self) -> float:
        """Seconds of one strong answer."""
        mean, spread = self.times.strong, self.times.spread
        return (
            mean
            if not spread or not mean
            else self.random.gammavariate(spread**-2, mean * spread**2)
        )


class _Slots:
    """Places that are given in the order of asking. SimPy's own Resource searches all its users
    when one leaves, which takes most of the time where there are tens of thousands."""

    def __init__(self, env: simpy.Environment, count: int) -> None:
        self.env, self.free = env, count
        self.waiting: deque[simpy.Event] = deque()

    def taken(self) -> simpy.Event:
        """An event: a place is mine."""
        mine = self.env.event()
        if self.free:
            self.free -= 1
            mine.succeed()
        else:
            self.waiting.append(mine)
        return mine

    def left(self) -> None:
        """Gives a place to the next, or free."""
        if self.waiting:
            self.waiting.popleft().succeed()
        else:
            self.free += 1


class _Store:
    """A store that commits, together, all answers that came while it was committing the last
    ones."""

    def __init__(self, run: Run) -> None:
        self.run, self.waiting = run, list[simpy.Event]()
        self.working = False

    def commit(self) -> simpy.Event:
        """An event: this answer is on the disk."""
        done = self.run.env.event()
        self.waiting.append(done)
        if not self.working:
            self.working = True
            self.run.env.process(self.work())
        return done

    def work(self) -> Steps:
        """Commits until nobody waits."""
        while self.waiting:
            together, self.waiting = self.waiting, []
            yield self.run.env.timeout(self.run.times.sync)
            self.run.tally.busy["store"] += self.run.times.sync
            self.run.tally.commits += 1
            for done in together:
                done.succeed()
        self.working = False


def simulate(load: Load, times: Times, seed: int = 0) -> Outcome:
    """Runs ``load`` with these ``times``; the same seed gives the same outcome."""
    return Run(load, times, seed).go()
