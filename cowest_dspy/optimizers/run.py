"""A run at work: its stages, what each of them cost, and who is shown the progress."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import dspy

from cowest_dspy.errors import BudgetError
from cowest_dspy.store.pool import Progress
from cowest_dspy.store.progress import Journal
from cowest_dspy.store.store import Store
from cowest_dspy.store.usage import Usage
from cowest_dspy.tuning import DPO, KTO, SFT, PeakMemory

Settings = SFT | DPO | KTO
"""Of a training."""


class Watch(Protocol):
    """Who looks on: told of every stage, and of its progress."""

    def stage(self, title: str) -> AbstractContextManager[Progress]:
        """A context around a stage; inside it, ``progress(done, total)`` is called now and then."""
        ...

    def say(self, text: str) -> None:
        """One line for people."""
        ...


class Silent:
    """A watch that shows nothing: the base of those that want to be told more than :class:`Watch`
    says."""

    def opened(self, journal: Journal) -> None:
        """Told of the run's journal, which has all the numbers, before each stage."""

    def titled(self, title: str) -> str:
        """A title as it is shown."""
        return title

    def stage(self, title: str) -> AbstractContextManager[Progress]:
        """Nothing."""
        return nullcontext(lambda done, total: None)

    def say(self, text: str) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Within(Silent):
    """A watch that tells another one, with the name of a part of the run before each title and
    line."""

    name: str
    watch: Watch

    def opened(self, journal: Journal) -> None:
        """As of the other watch."""
        if isinstance(self.watch, Silent):
            self.watch.opened(journal)

    def titled(self, title: str) -> str:
        """With the name before it."""
        whole = f"{self.name}: {title}"
        return self.watch.titled(whole) if isinstance(self.watch, Silent) else whole

    def stage(self, title: str) -> AbstractContextManager[Progress]:
        """As of the other watch."""
        return self.watch.stage(f"{self.name}: {title}")

    def say(self, text: str) -> None:
        """As of the other watch."""
        self.watch.say(f"{self.name}: {text}")


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
    """A run at work: the store in its folder, who is shown the progress, and a tracker."""

    store: Store
    watch: Watch = field(default_factory=Silent)
    tracker: Tracker | None = None

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.store.folder

    @contextmanager
    def stage(self, name: str, title: str) -> Iterator[Progress]:
        """Shows a stage, books its calls, and records what it cost, unless it was done before and
        cost nothing now."""
        if self.tracker is not None:
            self.tracker.update()
        journal, shown = self.store.journal, title
        if isinstance(self.watch, Silent):
            self.watch.opened(journal)
            shown = self.watch.titled(title)
        with self.watch.stage(title) as progress, journal.stage(name, shown) as here:
            with self.store.spending(name) as counter, PeakMemory() as memory:
                here.counter = counter

                def both(done: int, total: int) -> None:
                    here.at(done, total)
                    progress(done, total)

                try:
                    yield both
                except (BudgetError, KeyboardInterrupt):
                    self.store.settle()  # What other threads have under way is still of this stage.
                    self._record(name, counter.usage, memory)
                    raise
            self._record(name, counter.usage, memory)

    def say(self, text: str) -> None:
        """Shows a line, and keeps it in the journal."""
        self.store.journal.say(text)
        self.watch.say(text)

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
    given = dspy.settings.get("cowest_ledger")
    if isinstance(given, Store):
        yield given
        return
    folder = tempfile.mkdtemp(prefix="cowest-") if folder is None else folder
    with Store(folder, strong=strong) as store:
        yield store
