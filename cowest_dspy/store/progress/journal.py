"""The journal of a run: its state, kept by the process that works on it, and written into its
folder for others to read.

    journal = Journal(Path("runs/mine"))
    with journal.stage("collect", "Collecting drafts") as here:
        here.at(3, 10)
    journal.close(None)

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
from cowest_dspy.store.progress.alive import iso, process_started
from cowest_dspy.store.progress.pace import Pace, Rate
from cowest_dspy.store.progress.snapshot import (
    FILE,
    Best,
    Snapshot,
    StageDone,
    StageNow,
    State,
    read_snapshot,
)
from cowest_dspy.store.usage import Usage, UsageCounter, added
from cowest_dspy.utils.files import write_whole
from cowest_dspy.utils.interrupts import unread
from cowest_dspy.utils.safe_text import without_half_pairs

LOOK, WRITE, SIGN_OF_LIFE = 0.25, 1.0, 5.0
"""Seconds between two looks at the numbers, between two writings of what has changed, and of what
has not."""
LINES = 20
"""Of what was said, so many lines are kept."""
Event = Literal["stage_begin", "progress", "stage_end"]
Listener = Callable[[Event, Snapshot], None]


@dataclass(eq=False)
class Here:
    """A stage that is under way. ``counter`` is what it costs, where somebody books it."""

    name: str
    title: str
    began: float
    clock: Callable[[], float]
    done: int = 0
    total: int | None = None
    counter: UsageCounter = field(default_factory=UsageCounter)
    failures_before: Counter[str] = field(default_factory=Counter)
    pace: Pace = field(default_factory=Pace)

    def at(self, done: int, total: int) -> None:
        """Says how far it is."""
        self.done, self.total = done, total
        self.pace.see(self.clock(), done)

    def now(self) -> StageNow:
        """As a value."""
        moment = self.clock()
        left = self.pace.left(moment, self.total) if self.total else None
        return StageNow(self.name, self.title, moment - self.began, self.done, self.total, left)


class Journal:
    """The state of a run that this process works on. Thread-safe.

    Args:
        folder: the run's.
        kept: answers that the store has already.
        usd: what was spent on them; None where it is not known.
        limits: what was spent of each thing that [budget] knows; asked for when it is shown.
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
        self._rate, self._stack = Rate(), list[Here]()
        self._said: deque[str] = deque(maxlen=LINES)
        self._lines = 0
        self._listeners: list[Listener] = []
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        self._last: Snapshot | None = None
        self._worked = False
        self._before = read_snapshot(folder)
        moment = iso(wall())
        self._state = Snapshot(
            "running",
            moment,
            os.getpid(),
            socket.gethostname(),
            process_started(),
            moment,
            str(folder),
        )
        if self._before is not None:
            # What was found out before is true until it is found out anew.
            earlier = tuple(replace(one, earlier=True) for one in self._before.stages if one.whole)
            self._state = replace(
                self._state, task=self._before.task, verdict=self._before.verdict, stages=earlier
            )
        self.write()

    # What is told

    def about(self, **facts: Any) -> None:
        """Sets ``task``, ``verb``, ``command`` or ``verdict``. With a verb, somebody may be looking
        on: the state is kept up."""
        with self._lock:
            self._state = replace(self._state, **facts)
        if "verb" in facts:
            self._start()

    def result(self, **values: Any) -> None:
        """What the work came to, by name, as JSON has it; for programs that read the last state."""
        with self._lock:
            self._state = replace(self._state, results={**self._state.results, **values})

    @contextmanager
    def stage(self, name: str, title: str) -> Iterator[Here]:
        """A context around a stage; one inside another is a part of it."""
        self._start()
        here = Here(name, title, self._clock(), self._clock)
        with self._lock:
            self._worked = True
            here.failures_before = self.failures.copy()
            self._stack.append(here)
        whole = False
        try:
            self._tell("stage_begin")
            yield here
            whole = True
        finally:
            with self._lock:
                self._stack.remove(here)
                done = self._done(here, whole)
                others = tuple(
                    one for one in self._state.stages if (one.name, one.earlier) != (name, True)
                )
                self._state = replace(self._state, stages=(*others, done))
            self._tell("stage_end")
            self.write()

    def _done(self, here: Here, whole: bool) -> StageDone:
        used, seconds = here.counter.usage, self._clock() - here.began
        numbers = (used.calls, used.cached, used.tokens_in, used.tokens_out, used.usd)
        failures = dict(self.failures - here.failures_before)
        return StageDone(
            here.name, here.title, seconds, *numbers, failures, here.done, here.total, whole=whole
        )

    def add(self, usage: Usage) -> None:
        """Add calls that were answered, by a model or by the store."""
        with self._lock:
            self.total += usage

    def failed(self, kind: str) -> None:
        """Books a failure."""
        with self._lock:
            self.failures[kind] += 1

    def scored(self, name: str, scores: Sequence[float | None]) -> None:
        """Books scores on held-out examples; None is a failure. Only the best mean is kept."""
        found = [score for score in scores if score is not None]
        if not found:
            return
        mean = sum(found) / len(found)
        with self._lock:
            best = self._state.best
            if best is None or mean > best.score:
                self._state = replace(self._state, best=Best(name, mean, len(found)))

    def say(self, text: str) -> None:
        """Keeps a line that people were told."""
        with self._lock:
            self._said.append(text)
            self._lines += 1

    # What is asked

    def snapshot(self) -> Snapshot:
        """The state now."""
        with self._lock:
            total = self.total
            return replace(
                self._state,
                updated=iso(self._wall()),
                now=tuple(here.now() for here in self._stack),
                calls=total.calls,
                calls_kept=self._kept + total.calls,
                cached=total.cached,
                calls_per_second=round(self._rate.per_second(), 3),
                tokens=total.tokens,
                usd=added(self._usd, total.usd),
                failures=dict(self.failures),
                limits=tuple(self.limits()),
                said=tuple(self._said),
                lines=self._lines,
            )

    def listen(self, listener: Listener) -> None:
        """Has a function told of the state from now on: when a stage begins, when one has ended (it
        is the last of ``stages``), and once a second, by a thread of the journal."""
        with self._lock:
            self._listeners.append(listener)

    def _tell(self, event: Event, snapshot: Snapshot | None = None) -> None:
        for listener in list(self._listeners):
            listener(event, snapshot or self.snapshot())

    def write(self, snapshot: Snapshot | None = None) -> None:
        """Writes a state, by default that of now, if it can be written."""
        with self._writing, suppress(OSError):
            text = json.dumps(
                (snapshot or self.snapshot()).to_dict(), default=str, ensure_ascii=False
            )
            write_whole({self.folder / FILE: without_half_pairs(text)})

    def close(self, error: BaseException | None = None) -> Snapshot:
        """The last state: finished, or stopped or failed by ``error``; finished too where only
        printing the results was cut off. In the folder, a look at a run that did no work leaves
        what was there."""
        if self._last is None:
            self._ended.set()
            if self._thread is not None:
                self._thread.join()
            now = self.snapshot()
            if unread(error) and now.results and now.left is None:
                error = None
            self._last = replace(
                now, state=_state_after(error), calls_per_second=0.0, **_reason(error)
            )
            looked = (
                error is None
                and not self._worked
                and not self._last.calls
                and not self._last.results
            )
            self.write(self._after_a_look(self._before) if self._before and looked else self._last)
        return self._last

    def _after_a_look(self, before: Snapshot) -> Snapshot:
        found = replace(before, verdict=self._state.verdict, task=self._state.task)
        if before.state != "running":
            return found
        return replace(
            found, state="stopped", error="its process was killed"
        )  # We hold the run, so it is gone.

    # The thread

    def _start(self) -> None:
        with self._lock:
            if self._thread is None and not self._ended.is_set():
                self._thread = threading.Thread(
                    target=self._keep_up, name="cowest journal", daemon=True
                )
                self._thread.start()

    def _keep_up(self) -> None:
        written, told = self._clock(), self._clock()
        seen: Any = None
        while not self._ended.wait(LOOK):
            now = self._clock()
            self._rate.see(now, self.total.calls)
            if now - told >= WRITE:
                told, snapshot = now, self.snapshot()
                self._tell("progress", snapshot)
                changed = (
                    snapshot.calls,
                    snapshot.cached,
                    snapshot.failures,
                    [(one.name, one.done) for one in snapshot.now],
                )
                if changed != seen or now - written >= SIGN_OF_LIFE:
                    seen, written = changed, now
                    self.write()


def _state_after(error: BaseException | None) -> State:
    if error is None:
        return "finished"
    return "stopped" if isinstance(error, KeyboardInterrupt | BudgetError) else "failed"


def _reason(error: BaseException | None) -> dict[str, Any]:
    if error is None:
        return {}
    text = masked(f"{type(error).__name__}: {error}".strip(": "))[:1000]
    return {
        "error": text,
        "signal": getattr(error, "signal", 2) if isinstance(error, KeyboardInterrupt) else None,
    }
