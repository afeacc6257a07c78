"""A run at work: its stages, what each of them cost, what shows the progress, and the models that
it trains."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import dspy

from cowest_dspy.errors import BudgetError, ModelError, TuningError
from cowest_dspy.lms import ServerEngine
from cowest_dspy.lms.local.weights import adapter_hash
from cowest_dspy.store.call_context import call_context
from cowest_dspy.store.journal import Event
from cowest_dspy.store.pool import OnProgress
from cowest_dspy.store.progress import Snapshot
from cowest_dspy.store.serialize import digest
from cowest_dspy.store.store import Store
from cowest_dspy.store.usage import Usage
from cowest_dspy.tuning import DPO, KTO, SFT, PeakMemory, engine_of, tune
from cowest_dspy.utils.interrupts import postponing
from cowest_dspy.utils.progress_bars import advance, is_displayed, open_bar, print_above_bars

if TYPE_CHECKING:
    from transformers import TrainerCallback

Settings = SFT | DPO | KTO
"""The settings of a training."""


class NoProgress:
    """Shows nothing. A subclass shows what it wants of a run: ``CoWest(..., progress=Mine())``."""

    def update(self, event: Event, snapshot: Snapshot) -> None:
        """Called when a stage begins (``"stage_begin"``), has ended (``"stage_end"``, the last of
        ``snapshot.stages``), at a message (``"message"``, the last of ``snapshot.said``), and once
        a second (``"progress"``), by another thread."""


class ProgressBars(NoProgress):
    """Shows each stage of a run as a bar of tqdm, and its messages between them. Where a bar is
    shown, and when none is: :func:`~cowest_dspy.utils.progress_bars.is_displayed`."""

    def __init__(self, display_progress: bool | None = None) -> None:
        self._displayed = is_displayed(display_progress)
        self._lock = threading.Lock()
        self._bars: dict[str, Any] = {}

    def update(self, event: Event, snapshot: Snapshot) -> None:
        """Draw the bars of the stages that are under way, and close that of one that has ended."""
        if not self._displayed:
            return
        with self._lock:
            ended = snapshot.stages[-1:] if event == "stage_end" else ()
            for stage in (*snapshot.now, *ended):
                if event == "stage_begin" and stage.name not in self._bars:
                    self._bars[stage.name] = open_bar(stage.title)
                bar = self._bars.get(stage.name)  # No look of before its end reopens it.
                if bar is not None:
                    advance(bar, stage.done, stage.total)
            for stage in ended:
                if (bar := self._bars.pop(stage.name, None)) is not None:
                    bar.close()
            if event == "message":
                print_above_bars(snapshot.said[-1])


class RunTracker(Protocol):
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
    tracker: RunTracker | None = None

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
        journal, shown = self.store.journal, self.store.prefix + title
        with journal.listening(self.progress.update), journal.stage(name, shown) as here:
            with self.store.spending(name) as counter, PeakMemory() as memory:
                here.counter = counter
                try:
                    yield here.at
                except (BudgetError, KeyboardInterrupt):
                    self.store.settle()  # What other threads have under way is still of this stage.
                    self._record(name, title, counter.usage, memory)
                    raise
            self._record(name, title, counter.usage, memory)

    def say(self, text: str) -> None:
        """Shows a message, and keeps it."""
        with self.store.journal.listening(self.progress.update):
            self.store.journal.say(self.store.prefix + text)

    def training(self, name: str, settings: Settings) -> AbstractContextManager[Settings]:
        """A context around the training of that name; gives the settings to train with."""
        if self.tracker is None:
            return nullcontext(settings)
        return self.tracker.training(name, settings)

    def _record(self, name: str, title: str, used: Usage, memory: PeakMemory) -> None:
        known = self.store.record("stage", name)
        if known is None or not used.only_read:
            peak = max(memory.peak_bytes, (known or {}).get("peak_memory_bytes", 0))
            beside = {"title": title, "cached_calls": used.cached, "peak_memory_bytes": peak}
            self.store.keep("stage", name, {**self.store.cost(name), **beside})


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


class TrainedModels:
    """Trains weak models and keeps them in a run, as records "adapter" and folders beside the
    store.

    Args:
        run: the run.
        base: the weak LM as it was before any tuning.
        seed: of every training.
        make_room: called before something is trained.
        processes: that train together, or a file of Accelerate's. It is no part of a model's
            identity: the result is the same but for rounding.
        callbacks: of transformers' Trainer; no part of a model's identity either.
    """

    def __init__(
        self,
        run: RunContext,
        base: dspy.LM,
        seed: int,
        *,
        make_room: Callable[[], None] = lambda: None,
        processes: int | str | Path = 1,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self._run, self._base, self._seed = run, base, seed
        self._make_room, self._processes, self._callbacks = make_room, processes, callbacks
        self._lms: dict[str, dspy.LM] = {}

    def train(
        self,
        name: str,
        title: str,
        start: dspy.LM,
        rows: list[dict[str, Any]] | Callable[[], list[dict[str, Any]]],
        settings: Settings,
    ) -> dspy.LM:
        """The LM trained from ``start`` on these rows (or on what a function gives, called when it
        is needed); trained now, or found in the store when nothing of it has changed.

        Raises:
            TuningError: an LM that cannot be tuned, rows that cannot be trained on, a training that
                diverges, or an adapter in the run's folder that was changed.
        """
        engine = engine_of(self._base)
        if name not in self._lms:
            data = rows if isinstance(rows, list) else rows()
            depends_on = [name, start.model, settings.decisive(), data, self._seed]
            record = self._run.store.step(
                "adapter",
                name,
                depends_on,
                lambda: (
                    self._of_another_part(depends_on)
                    or self._train(name, title, start, data, settings, digest(depends_on))
                ),
                usable=self._is_there,
            )
            if name not in self._lms:  # It was not trained now.
                self._lms[name] = self._load(record)
            if isinstance(engine, ServerEngine):
                # A server that lacks it is one error now, not one of every call.
                engine.require(self._lms[name].model)
        return self._lms[name]

    def find(self, name: str) -> dspy.LM | None:
        """The one of that name, when the run has it."""
        record = self._run.store.record("adapter", name)
        return self._load(record) if record else None

    def _is_there(self, record: Mapping[str, Any]) -> bool:
        return (self._run.folder / record["folder"]).is_dir()

    def _of_another_part(self, depends_on: Any) -> dict[str, Any] | None:
        """The record of this very model, where another part of the run has trained it."""
        whole = self._run.store.root
        record = whole.record("trained", digest(depends_on))
        if record is None or not (whole.folder / record["folder"]).is_dir():
            return None
        folder = os.path.relpath(whole.folder / record["folder"], self._run.folder)
        return {**record, "folder": folder}

    def _train(
        self,
        name: str,
        title: str,
        start: dspy.LM,
        rows: list[dict[str, Any]],
        settings: Settings,
        identity: str,
    ) -> dict[str, Any]:
        self._make_room()
        folder = Path("adapters") / f"{name.replace(' ', '-')}-{identity}"
        with (
            self._run.stage(name, title) as progress,
            self._run.training(name, settings) as settings,
            postponing(),
        ):
            tuned = tune(
                start,
                rows,
                settings,
                self._run.folder / folder,
                seed=self._seed,
                on_step=lambda step, total, _: progress(step, total),
                callbacks=self._callbacks,
                processes=self._processes,
                cache=self._run.folder / "reference",
                least=0,  # The round, or the control, has looked at that.
            )
            record = {
                "identity": identity,
                "folder": str(folder),
                "model": tuned.model,
                "history": tuned.result.history,
            }
            whole = self._run.store.root
            there = os.path.relpath(self._run.folder / folder, whole.folder)
            whole.keep("trained", identity, {**record, "folder": there})
        self._lms[name] = tuned.lm
        return record

    def _load(self, record: Mapping[str, Any]) -> dspy.LM:
        folder = self._run.folder / record["folder"]
        engine, again = engine_of(self._base), "Delete that folder and run again to train it anew."
        try:
            changed = not record["model"].endswith(f"+{adapter_hash(folder)}")
        except ModelError as error:
            raise TuningError(f"{error} This run trained it. {again}") from error
        if changed or (model := engine.load_adapter(folder)) != record["model"]:
            raise TuningError(
                f"{folder} does not hold the weights that were trained ({record['model']}): it "
                f"was changed. {again}"
            )
        return self._base.copy(model=model)
