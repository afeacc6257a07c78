"""The models that a run trains: each once, from rows and a start that are its identity, and found
again afterwards."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import dspy

from cowest_dspy.errors import ModelError, TuningError
from cowest_dspy.lms import ServerEngine
from cowest_dspy.lms.local.weights import adapter_hash
from cowest_dspy.optimizers.run import RunContext, Settings
from cowest_dspy.store.serialize import digest
from cowest_dspy.tuning import data_format, engine_of, tune
from cowest_dspy.utils.interrupts import postponing


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
    """

    def __init__(
        self,
        run: RunContext,
        base: dspy.LM,
        seed: int,
        *,
        make_room: Callable[[], None] = lambda: None,
        processes: int | str | Path = 1,
    ) -> None:
        self._run, self._base, self._seed = run, base, seed
        self._make_room, self._processes = make_room, processes
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
                data_format(settings),
                settings,
                self._run.folder / folder,
                seed=self._seed,
                on_step=lambda step, total, _: progress(step, total),
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
