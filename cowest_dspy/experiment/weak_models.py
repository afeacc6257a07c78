"""The run's weak models: each is trained once, from rows and a start that are its identity, and found again afterwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dspy

from cowest_dspy.config import Config, validate
from cowest_dspy.errors import ConfigError, TuningError
from cowest_dspy.experiment.desk import Desk, digest
from cowest_dspy.lms import ServerEngine
from cowest_dspy.pairs import PreferencePairs
from cowest_dspy.recipes import load
from cowest_dspy.tuning import DPO, SFT, engine_of, tune


@dataclass(frozen=True)
class TuningSettings:
    """The tables of a configuration that say how weak models are trained."""

    drafting: SFT
    answering: SFT
    preferring: DPO

    @classmethod
    def of(cls, config: Config) -> TuningSettings:
        """Those of ``config``.

        Raises:
            ConfigError: settings that TRL or PEFT would not take.
        """
        return cls(
            validate(SFT, config.sft.settings if config.sft else {}, "[sft.settings]"),
            validate(SFT, config.sft.answer_settings if config.sft else {}, "[sft.answer_settings]"),
            validate(DPO, config.dpo, "[dpo]"),
        )


class WeakModels:
    """Trains weak models and keeps them in the run.

    Args:
        desk: the run.
        base: gives the weak LM as it was before any tuning.
        make_room: called before something is trained.
    """

    def __init__(self, desk: Desk, settings: TuningSettings, base: Callable[[], dspy.LM], make_room: Callable[[], None]) -> None:
        self._desk, self._settings, self._base, self._make_room = desk, settings, base, make_room
        self._lms: dict[str, dspy.LM] = {}

    def drafting(self) -> dspy.LM:
        """After domain fine-tuning; as it is when the configuration has no [sft]."""
        sft = self._desk.config.sft
        if sft is None:
            return self._base()
        rows = lambda: self._rows(sft.drafts, "drafts")  # noqa: E731
        return self._tuned("drafts", "SFT of the drafter", self._base(), rows, self._settings.drafting)

    def answering(self) -> dspy.LM:
        """Fine-tuned to answer alone. It starts from the one that has learned the domain."""
        sft = self._desk.config.sft
        answers = sft.answers if sft else None
        if answers is None:
            return self._base()
        title = "SFT of the weak baseline"
        return self._tuned("answers", title, self.drafting(), lambda: self._rows(answers, "answers"), self._settings.answering)

    def preferring(self, name: str, title: str, rows: list[dict[str, Any]]) -> dspy.LM:
        """After preference tuning on these rows, from the one that drafts."""
        return self._tuned(name, title, self.drafting(), lambda: rows, self._settings.preferring)

    def fine_tuned_more(self, name: str) -> dspy.LM:
        """A control: the same SFT, continued."""
        sft = self._desk.config.sft
        if sft is None:
            raise ConfigError(f"The control {name} continues [sft], and there is no [sft].")
        title = "Control: more SFT"
        return self._tuned(name, title, self.drafting(), lambda: self._rows(sft.drafts, "drafts"), self._settings.drafting)

    def on_chosen(self, name: str, pairs: PreferencePairs) -> dspy.LM:
        """A control: SFT on the chosen drafts alone, as long as preference tuning."""
        rows = [{"prompt": list(pair.prompt), "completion": list(pair.chosen)} for pair in pairs]
        settings = self._settings.drafting.model_copy(update={"epochs": self._settings.preferring.epochs, "max_steps": None})
        return self._tuned(name, "Control: SFT on the chosen drafts", self.drafting(), lambda: rows, settings)

    def kept(self, name: str) -> dspy.LM | None:
        """The one of that name, when the run has it."""
        record = self._desk.store.record("adapter", name)
        return self._loaded(record) if record else None

    def _rows(self, reference: str, which: str) -> list[dict[str, Any]]:
        rows = load(reference)(seed=self._desk.config.data.seed)
        if not rows:
            raise ConfigError(f"[sft] {which} = {reference} gave no rows.")
        return list(rows)

    def _tuned(self, name: str, title: str, start: dspy.LM, make_rows: Any, settings: SFT | DPO) -> dspy.LM:
        """The LM trained from ``start`` on these rows; trained now, or found in the store when nothing of it has changed."""
        engine = engine_of(self._base())
        if getattr(self._desk.config.weak, "dtype", None) == "int8":
            raise TuningError('A model in int8 takes no adapter, so it cannot be tuned: set [weak] dtype = "auto".')
        if name not in self._lms:
            self._lms[name] = self._trained(name, title, start, make_rows(), settings)
            if isinstance(engine, ServerEngine):
                engine.require(self._lms[name].model)  # A server that lacks it is one error now, not one of every call.
        return self._lms[name]

    def _trained(self, name: str, title: str, start: dspy.LM, rows: list[dict[str, Any]], settings: SFT | DPO) -> dspy.LM:
        identity = digest([name, start.model, settings.model_dump(mode="json"), rows, self._desk.config.seed])
        known = self._desk.store.record("adapter", name)
        if known and known["identity"] == identity and (self._desk.run / known["folder"]).is_dir():
            return self._loaded(known)
        self._make_room()
        with self._desk.stage(name, title) as progress:
            folder = Path("adapters") / f"{name}-{identity}"
            kind = "preference" if isinstance(settings, DPO) else "sft"
            tuned = tune(
                start,
                rows,
                kind,
                settings,
                self._desk.run / folder,
                seed=self._desk.config.seed,
                on_step=lambda step, total, _: progress(step, total),
            )
            record = {
                "identity": identity,
                "folder": str(folder),
                "model": tuned.model,
                "history": tuned.result.history,
            }
            self._desk.store.keep("adapter", name, record)
        return tuned.lm

    def _loaded(self, record: dict[str, Any]) -> dspy.LM:
        folder = self._desk.run / record["folder"]
        model = engine_of(self._base()).load_adapter(folder)
        if model != record["model"]:
            raise TuningError(
                f"{folder} does not hold the weights that were trained ({record['model']}): it was changed. "
                "Delete that folder and run again to train it anew."
            )
        return self._base().copy(model=model)
