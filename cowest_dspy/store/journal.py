"""Keeps the state of a run while this process works on it, and writes it into the run's folder.

    journal = Journal(Path("runs/mine"))
    with journal.stage("collect", "Collecting drafts") as stage:
        stage.at(3, 10)
    journal.close()

Counting is a few additions under a lock. A thread looks at the numbers four times a second, and
writes ``progress.json`` once a second at most, whole or not at all; where that fails, as on a full
disk, the run goes on.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from cowest_dspy.errors import BudgetError, masked
from cowest_dspy.store.budget import Limit
from cowest_dspy.store.progress import (
    FILE,
    Best,
    Snapshot,
    StageState,
    iso,
    process_started,
    read_snapshot,
)
from cowest_dspy.store.usage import Usage, UsageCounter, add_usd
from cowest_dspy.utils.files import write_whole
from cowest_dspy.utils.interrupts import is_broken_pipe
from cowest_dspy.utils.safe_text import without_half_pairs

LOOK, WRITE, SIGN_OF_LIFE = 0.25, 1.0, 5.0
"""Seconds between two looks at the numbers, two writes of what changed, and of what did not."""
LINES = 20
"""Messages that a snapshot has, at most."""
Event = Literal["stage_begin", "progress", "stage_end", "message"]
Listener = Callable[[Event, Snapshot], None]


class Rate:
    """The frequency of an event, over the last ``seconds`` or ``least`` steps, whichever is
    longer: a run that is continued first reads what it has."""

    def __init__(self, seconds: float, least: int = 1) -> None:
        self._seconds, self._least = seconds, least
        self._seen: deque[tuple[float, int]] = deque()

    def see(self, now: float, count: int) -> None:
        """Note that it has happened ``count`` times by now; fewer than before begins anew."""
        if self._seen and count < self._seen[-1][1]:
            self._seen.clear()
        self._seen.append((now, count))
        while len(self._seen) > self._least + 1 and self._seen[1][0] <= now - self._seconds:
            self._seen.popleft()

    def per_second(self) -> float:
        """Times a second; 0.0 until two different times were noted."""
        if not self._seen:
            return 0.0
        (before, first), (now, last) = self._seen[0], self._seen[-1]
        return (last - first) / (now - before) if now > before else 0.0


@dataclass(eq=False)
class OpenStage:
    """A stage that is under way. ``counter`` is what it costs, where somebody counts it."""

    name: str
    title: str
    began: float
    clock: Callable[[], float]
    done: int = 0
    total: int | None = None
    counter: UsageCounter = field(default_factory=UsageCounter)
    failures_before: Counter[str] = field(default_factory=Counter)
    rate: Rate = field(default_factory=lambda: Rate(30.0, least=8))

    def at(self, done: int, total: int) -> None:
        """Set how far it is."""
        if done != self.done or self.total is None:
            self.rate.see(self.clock(), done)
        self.done, self.total = done, total

    def now(self) -> StageState:
        """Its state, with the time that is left by the rate of the last steps."""
        each, left = self.rate.per_second(), None
        if self.total and each > 0:
            left = (self.total - self.done) / each
        seconds = self.clock() - self.began
        return StageState(
            self.name, self.title, seconds, done=self.done, total=self.total, left=left
        )

    def ended(self, failures: Counter[str], *, whole: bool) -> StageState:
        """Its state at its end, with what it cost."""
        used = self.counter.usage
        return replace(
            self.now(),
            calls=used.calls,
            cached=used.cached,
            tokens_in=used.tokens_in,
            tokens_out=used.tokens_out,
            usd=used.usd,
            failures=dict(failures - self.failures_before),
            left=None,
            whole=whole,
        )


class Journal:
    """The state of a run that this process works on. Thread-safe.

    Args:
        folder: the run's.
        kept: answers that the store has already.
        usd: US dollars spent on them; None where it is not known.
        limits: gives what was spent of each thing that [budget] limits.
        clock: seconds that never go back. wall: seconds since 1970.
    """

    def __init__(
        self,
        folder: Path,
        *,
        kept: int = 0,
        usd: float | None = 0.0,
        limits: Callable[[], Sequence[Limit]] = tuple,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.folder, self.total = folder, Usage()
        self.failures: Counter[str] = Counter()
        self.limits, self._clock, self._wall = limits, clock, wall
        self._kept, self._usd = kept, usd
        self._lock, self._writing = threading.RLock(), threading.Lock()
        self._rate, self._open = Rate(10.0), list[OpenStage]()
        self._said: deque[str] = deque(maxlen=LINES)
        self._lines = 0
        self._listeners: list[Listener] = []
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        self._last: Snapshot | None = None
        self._worked = False
        self._before = read_snapshot(folder)
        now, pid, host = iso(wall()), os.getpid(), socket.gethostname()
        self._state = Snapshot("running", now, pid, host, process_started(), now, str(folder))
        if self._before is not None:
            # What an earlier process found out is true until it is found out anew.
            earlier = tuple(replace(one, earlier=True) for one in self._before.stages if one.whole)
            self._state = replace(
                self._state, task=self._before.task, verdict=self._before.verdict, stages=earlier
            )
        self.write()

    # What is counted

    def about(self, **facts: Any) -> None:
        """Set ``task``, ``verb``, ``command`` or ``verdict``. With a verb the file is kept up to
        date."""
        with self._lock:
            self._state = replace(self._state, **facts)
        if "verb" in facts:
            self._start()

    def result(self, **values: Any) -> None:
        """Add to ``results``: what the work came to, by name, as JSON has it."""
        with self._lock:
            self._state = replace(self._state, results={**self._state.results, **values})

    @contextmanager
    def stage(self, name: str, title: str) -> Iterator[OpenStage]:
        """A context around a stage; one inside another is a part of it."""
        self._start()
        stage = OpenStage(name, title, self._clock(), self._clock)
        with self._lock:
            self._worked = True
            stage.failures_before = self.failures.copy()
            self._open.append(stage)
        whole = False
        try:
            self._tell("stage_begin")
            yield stage
            whole = True
        finally:
            with self._lock:
                self._open.remove(stage)
                ended = stage.ended(self.failures, whole=whole)
                others = (one for one in self._state.stages if not one.earlier or one.name != name)
                self._state = replace(self._state, stages=(*others, ended))
            self._tell("stage_end")
            self.write()

    def add(self, usage: Usage) -> None:
        """Add calls that were answered, by a model or by the store."""
        with self._lock:
            self.total += usage

    def failed(self, kind: str) -> None:
        """Count a failure."""
        with self._lock:
            self.failures[kind] += 1

    def scored(self, name: str, scores: Sequence[float | None]) -> None:
        """Note scores on held-out examples; None is a failure. Only the best mean is kept."""
        answered = [score for score in scores if score is not None]
        if not answered:
            return
        mean = sum(answered) / len(answered)
        with self._lock:
            if self._state.best is None or mean > self._state.best.score:
                self._state = replace(self._state, best=Best(name, mean, len(answered)))

    def say(self, text: str) -> None:
        """Keep a message for people, and tell listeners."""
        with self._lock:
            self._said.append(text)
            self._lines += 1
        self._tell("message")

    # What is shown

    def snapshot(self) -> Snapshot:
        """The state now."""
        with self._lock:
            total = self.total
            return replace(
                self._state,
                updated=iso(self._wall()),
                now=tuple(stage.now() for stage in self._open),
                calls=total.calls,
                calls_kept=self._kept + total.calls,
                cached=total.cached,
                calls_per_second=round(self._rate.per_second(), 3),
                tokens=total.tokens,
                usd=add_usd(self._usd, total.usd),
                failures=dict(self.failures),
                limits=tuple(self.limits()),
                said=tuple(self._said),
                lines=self._lines,
            )

    @contextmanager
    def listening(self, listener: Listener) -> Iterator[None]:
        """A context in which ``listener(event, snapshot)`` is called: when a stage begins, when one
        has ended (the last of ``stages``), at a message (the last of ``said``), and once a second,
        by a thread of the journal. A listener that is there already is not called twice."""
        if listener in self._listeners:
            yield
            return
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)

    @property
    def watched(self) -> bool:
        """Whether anything listens."""
        return bool(self._listeners)

    def _tell(self, event: Event, snapshot: Snapshot | None = None) -> None:
        for listener in list(self._listeners):
            listener(event, snapshot or self.snapshot())

    def write(self, snapshot: Snapshot | None = None) -> None:
        """Write a state, by default that of now, if it can be written."""
        with self._writing, suppress(OSError):
            values = (snapshot or self.snapshot()).to_dict()
            text = json.dumps(values, default=str, ensure_ascii=False)
            write_whole({self.folder / FILE: without_half_pairs(text)})

    def close(self, error: BaseException | None = None) -> Snapshot:
        """The last state: finished, or stopped or failed by ``error``; finished too where only
        printing the results was cut off. A look at a run that did no work leaves the file as it
        was."""
        if self._last is None:
            self._ended.set()
            if self._thread is not None:
                self._thread.join()
            now = self.snapshot()
            if is_broken_pipe(error) and now.results and now.left is None:
                error = None
            self._last = replace(now, calls_per_second=0.0, **_ended_by(error))
            worked = self._worked or self._last.calls or self._last.results
            if self._before is None or error is not None or worked:
                self.write(self._last)
            else:
                self.write(self._after_a_look(self._before))
        return self._last

    def _after_a_look(self, before: Snapshot) -> Snapshot:
        now = replace(before, verdict=self._state.verdict, task=self._state.task)
        if before.state == "running":  # We hold the run, so its process is gone.
            return replace(now, state="stopped", error="its process was killed")
        return now

    def _start(self) -> None:
        with self._lock:
            if self._thread is None and not self._ended.is_set():
                self._thread = threading.Thread(target=self._keep_up, name="journal", daemon=True)
                self._thread.start()

    def _keep_up(self) -> None:
        written, told = self._clock(), self._clock()
        seen: Any = None
        while not self._ended.wait(LOOK):
            now = self._clock()
            self._rate.see(now, self.total.calls)
            if now - told < WRITE:
                continue
            told, snapshot = now, self.snapshot()
            self._tell("progress", snapshot)
            stages = [(one.name, one.done) for one in snapshot.now]
            changed = (snapshot.calls, snapshot.cached, snapshot.failures, stages)
            if changed != seen or now - written >= SIGN_OF_LIFE:
                seen, written = changed, now
                self.write()


def _ended_by(error: BaseException | None) -> dict[str, Any]:
    """State, error and signal of a run that has ended so."""
    if error is None:
        return {"state": "finished"}
    text = masked(f"{type(error).__name__}: {error}".strip(": "))[:1000]
    if isinstance(error, KeyboardInterrupt):
        return {"state": "stopped", "error": text, "signal": getattr(error, "signal", 2)}
    return {"state": "stopped" if isinstance(error, BudgetError) else "failed", "error": text}
