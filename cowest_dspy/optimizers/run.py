"""A run at work: its stages, what each of them cost, and what shows the progress."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from cowest_dspy.errors import BudgetError
from cowest_dspy.store.call_context import call_context
from cowest_dspy.store.journal import Event
from cowest_dspy.store.pool import OnProgress
from cowest_dspy.store.progress import Snapshot
from cowest_dspy.store.store import Store
from cowest_dspy.store.usage import Usage
from cowest_dspy.tuning import DPO, KTO, SFT, PeakMemory

Settings = SFT | DPO | KTO
"""Of a training."""


class NoProgress:
    """Shows nothing. A subclass shows what it wants of a run: ``CoWest(..., progress=Mine())``."""

    def update(self, event: Event, snapshot: Snapshot) -> None:
        """Called when a stage begins (``"stage_begin"``), has ended (``"stage_end"``, the last of
        ``snapshot.stages``), at a message (``"message"``, the last of ``snapshot.said``), and once
        a second (``"progress"``), by another thread."""


class Tracker(Protocol):
    """What else is told of a run: MLflow, for instance (experiment/tracking)."""

    def update(self) -> None:
        """Send the run's state, without waiting."""
        ...

    def training(self, name: str, settings: Settings) -> AbstractContextManager[Settings]:
        """A context around the training of that name; gives the settings to train with."""
        ...


@dataclass(frozen=True)
class RunContext:
    """A run at work: the store in its folder, what shows the progress, and a tracker."""

    store: Store
    progress: NoProgress = field(default_factory=NoProgress)
    tracker: Tracker | None = None

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.store.folder

    @contextmanager
    def stage(self, name: str, title: str) -> Iterator[OnProgress]:
        """Shows a stage, books its calls, and records what it cost, unless it was done before and
        cost nothing now."""
        if self.tracker is not None:
            self.tracker.update()
        journal, title = self.store.journal, self.store.prefix + title
        with journal.listening(self.progress.update), journal.stage(name, title) as here:
            with self.store.spending(name) as counter, PeakMemory() as memory:
                here.counter = counter
                try:
                    yield here.at
                except (BudgetError, KeyboardInterrupt):
                    self.store.settle()  # What other threads have under way is still of this stage.
                    self._record(name, counter.usage, memory)
                    raise
            self._record(name, counter.usage, memory)

    def say(self, text: str) -> None:
        """Shows a message, and keeps it."""
        with self.store.journal.listening(self.progress.update):
            self.store.journal.say(self.store.prefix + text)

    def training(self, name: str, settings: Settings) -> AbstractContextManager[Settings]:
        """A context around the training of that name; gives the settings to train with."""
        if self.tracker is None:
            return nullcontext(settings)
        return self.tracker.training(name, settings)

    def _record(self, name: str, used: Usage, memory: PeakMemory) -> None:
        known = self.store.record("stage", name)
        if known is None or not used.only_read:
            peak = max(memory.peak_bytes, (known or {}).get("peak_memory_bytes", 0))
            self.store.keep(
                "stage",
                name,
                {**self.store.cost(name), "cached_calls": used.cached, "peak_memory_bytes": peak},
            )


@contextmanager
def store_in_use(folder: str | Path | None, *, strong: str | None = None) -> Iterator[Store]:
    """The store that calls are kept in already (``keeping``), which stays open; otherwise that of
    ``folder``, or of a new temporary folder, which is kept."""
    given = call_context().ledger
    if isinstance(given, Store):
        yield given
        return
    folder = tempfile.mkdtemp(prefix="cowest-") if folder is None else folder
    with Store(folder, strong=strong) as store:
        yield store
