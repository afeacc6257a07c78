"""The models that a run trains: each once, from rows and a start that are its identity, and found
again afterwards."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dspy

from cowest_dspy.errors import ModelError, TuningError
from cowest_dspy.lms import ServerEngine
from cowest_dspy.lms.local.weights import adapter_hash
from cowest_dspy.optimizers.stages import Stages, digest
from cowest_dspy.tuning import DPO, KTO, SFT, data_format, engine_of, tune
from cowest_dspy.utils.interrupts import until_kept


class TrainedModels:
    """Trains weak models and keeps them in a run, as records "adapter" and folders beside the
    store.

    Args:
        stages: the run.
        base: gives the weak LM as it was before any tuning.
        seed: of every training.
        make_room: called before something is trained.
        processes: that train together, or a file of Accelerate's. It is no part of a model's
            identity: the result is the same but for rounding.
    """

    def __init__(
        self,
        stages: Stages,
        base: Callable[[], dspy.LM],
        seed: int,
        make_room: Callable[[], None] = lambda: None,
        processes: int | str | Path = 1,
    ) -> None:
        self._processes = processes
        self._stages, self._base, self._seed, self._make_room = stages, base, seed, make_room
        self._lms: dict[str, dspy.LM] = {}

    def trained(
        self,
        name: str,
        title: str,
        start: dspy.LM,
        make_rows: Callable[[], list[dict[str, Any]]],
        settings: SFT | DPO | KTO,
    ) -> dspy.LM:
        """The LM trained from ``start`` on these rows; trained now, or found in the store when
        nothing of it has changed.

        Raises:
            TuningError: an LM that cannot be tuned, rows that cannot be trained on, a training that
                diverges, or an adapter in the run's folder that was changed.
        """
        engine = engine_of(self._base())
        if name not in self._lms:
            self._lms[name] = self._train(name, title, start, make_rows(), settings)
            if isinstance(engine, ServerEngine):
                engine.require(
                    self._lms[name].model
                )  # A server that lacks it is one error now, not one of every call.
        return self._lms[name]

    def kept(self, name: str) -> dspy.LM | None:
        """The one of that name, when the run has it."""
        record = self._stages.store.record("adapter", name)
        return self._loaded(record) if record else None

    def _train(
        self,
        name: str,
        title: str,
        start: dspy.LM,
        rows: list[dict[str, Any]],
        settings: SFT | DPO | KTO,
    ) -> dspy.LM:
        identity = digest([name, start.model, settings.decisive(), rows, self._seed])
        known = self._known(name, identity)
        if known:
            return self._loaded(known)
        self._make_room()
        with (
            self._stages.stage(name, title) as progress,
            self._stages.reporting(name, settings) as settings,
            until_kept(),
        ):
            folder = Path("adapters") / f"{name.replace(' ', '-')}-{identity}"
            tuned = tune(
                start,
                rows,
                data_format(settings),
                settings,
                self._stages.run / folder,
                seed=self._seed,
                on_step=lambda step, total, _: progress(step, total),
                processes=self._processes,
                cache=self._stages.run / "reference",
                least=0,  # The round, or the control, has looked at that.
            )
            record = {
                "identity": identity,
                "folder": str(folder),
                "model": tuned.model,
                "history": tuned.result.history,
            }
            self._stages.store.keep("adapter", name, record)
            whole = self._stages.store.root
            whole.keep(
                "trained",
                identity,
                {**record, "folder": os.path.relpath(self._stages.run / folder, whole.folder)},
            )
        return tuned.lm

    def _known(self, name: str, identity: str) -> dict[str, Any] | None:
        """The record of a model with this identity: this part's own, or one that another part of
        the run has trained."""
        own, whole = self._stages.store.record("adapter", name), self._stages.store.root
        if own and own["identity"] == identity and (self._stages.run / own["folder"]).is_dir():
            return own
        other = whole.record("trained", identity)
        if other is None or not (whole.folder / other["folder"]).is_dir():
            return None
        record = {
            **other,
            "folder": os.path.relpath(whole.folder / other["folder"], self._stages.run),
        }
        self._stages.store.keep("adapter", name, record)
        return record

    def _loaded(self, record: dict[str, Any]) -> dspy.LM:
        folder = self._stages.run / record["folder"]
        engine, again = (
            engine_of(self._base()),
            "Delete that folder and run again to train it anew.",
        )
        try:
            changed = not record["model"].endswith(f"+{adapter_hash(folder)}")
        except ModelError as error:
            raise TuningError(f"{error} This run trained it. {again}") from error
        if changed or (model := engine.load_adapter(folder)) != record["model"]:
            raise TuningError(
                f"{folder} does not hold the weights that were trained ({record['model']}): it "
                f"was changed. {again}"
            )
        return self._base().copy(model=model)
