"""Stages of a run: what shows them, and what a stage cost; used by everything that works on a run for
long."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dspy

from cowest_dspy.errors import BudgetError
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


@dataclass(frozen=True)
class Stages:
    """A run folder with the store in it, and what shows its progress."""

    run: Path
    store: Store
    progress: NoProgress

    @contextmanager
    def stage(self, name: str, title: str) -> Iterator[OnProgress]:
        """Shows a stage, books its calls, and keeps what it cost, unless it was done before and
        cost nothing now."""
        journal, title = self.store.journal, self.store.prefix + title
        with journal.listening(self.progress.update), journal.stage(name, title) as here:
            with self.store.spending(name) as counter, PeakMemory() as memory:
                here.counter = counter
                try:
                    yield here.at
                except (BudgetError, KeyboardInterrupt):
                    self.store.settle()  # What other threads have under way is still of this stage.
                    self._book(name, counter.usage, memory)
                    raise
            self._book(name, counter.usage, memory)

    def say(self, text: str) -> None:
        """Shows a message, and keeps it."""
        with self.store.journal.listening(self.progress.update):
            self.store.journal.say(self.store.prefix + text)

    def reporting(self, name: str, settings: Settings) -> AbstractContextManager[Settings]:
        """A context around the training of that name; gives the settings to train with. Here as
        they are: nobody is told of it."""
        return nullcontext(settings)

    def _book(self, name: str, used: Usage, memory: PeakMemory) -> None:
        known = self.store.record("stage", name)
        if known is None or not used.only_read:
            peak = max(memory.peak_bytes, (known or {}).get("peak_memory_bytes", 0))
            self.store.keep(
                "stage",
                name,
                {**self.store.cost(name), "cached_calls": used.cached, "peak_memory_bytes": peak},
            )


@contextmanager
def store_in_use(run: str | Path | None, *, strong: str | None = None) -> Iterator[Store]:
    """The store that calls are kept in already (``keeping``), which stays open; otherwise that of
    ``run``, or of a new temporary folder, which is kept."""
    given = dspy.settings.get("cowest_ledger")
    if isinstance(given, Store):
        yield given
        return
    with Store(
        run if run is not None else tempfile.mkdtemp(prefix="cowest-"), strong=strong
    ) as store:
        yield store


def digest(value: Any) -> str:
    """JSON-able content as 12 hexadecimal digits: equal for equal content."""
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, ensure_ascii=False, default=list).encode()
    ).hexdigest()[:12]
