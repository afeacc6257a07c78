"""The run's weak models: each is trained once, from rows and a start that are its identity, and
found again afterwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import dspy

from cowest_dspy.errors import ConfigError, TuningError
from cowest_dspy.experiment.config import Config, validate
from cowest_dspy.experiment.desk import Desk
from cowest_dspy.optimizers.trained import TrainedModels
from cowest_dspy.store.record import keeping, recorded
from cowest_dspy.tuning import DPO, KTO, SFT, engine_of
from cowest_dspy.utils.importing import call, takes


@dataclass(frozen=True)
class TuningSettings:
    """The tables of a configuration that say how weak models are trained."""

    drafting: SFT
    answering: SFT
    preferring: DPO | KTO

    @classmethod
    def of(cls, config: Config) -> TuningSettings:
        """Those of ``config``.

        Raises:
            ConfigError: settings that TRL or PEFT would not take.
        """
        return cls(
            validate(SFT, config.sft.settings if config.sft else {}, "[sft.settings]"),
            validate(
                SFT, config.sft.answer_settings if config.sft else {}, "[sft.answer_settings]"
            ),
            validate(DPO, config.dpo, "[dpo]")
            if config.kto is None
            else validate(KTO, config.kto, "[kto]"),
        )


class WeakModels:
    """Trains weak models and keeps them in the run.

    Args:
        desk: the run.
        base: gives the weak LM as it was before any tuning.
        make_room: called before something is trained.
        strong: gives the strong LM, for [sft] functions that ask it for rationales.
    """

    def __init__(
        self,
        desk: Desk,
        settings: TuningSettings,
        base: Callable[[], dspy.LM],
        make_room: Callable[[], None],
        strong: Callable[[], dspy.LM],
    ) -> None:
        self._desk, self.settings, self._base, self._strong = desk, settings, base, strong
        self.models = TrainedModels(desk, base, desk.config.seed, make_room, desk.processes)

    def drafting(self) -> dspy.LM:
        """After domain fine-tuning; as it is when the configuration has no [sft]."""
        sft = self._desk.config.sft
        if sft is None:
            return self._base()
        rows = lambda: self._rows(sft.drafts, "drafts")  # noqa: E731
        return self._tuned(
            "drafts", "SFT of the drafter", self._base(), rows, self.settings.drafting
        )

    def answering(self) -> dspy.LM:
        """Fine-tuned to answer alone. It starts from the one that has learned the domain."""
        sft = self._desk.config.sft
        answers = sft.answers if sft else None
        if answers is None:
            return self._base()
        title = "SFT of the weak baseline"
        return self._tuned(
            "answers",
            title,
            self.drafting(),
            lambda: self._rows(answers, "answers"),
            self.settings.answering,
        )

    def preferring(self, name: str, title: str, rows: list[dict[str, Any]]) -> dspy.LM:
        """After preference tuning on these rows, from the one that drafts."""
        return self._tuned(name, title, self.drafting(), lambda: rows, self.settings.preferring)

    def fine_tuned_more(self, name: str) -> dspy.LM:
        """A control: the same SFT, continued."""
        sft = self._desk.config.sft
        if sft is None:
            raise ConfigError(f"The control {name} continues [sft], and there is no [sft].")
        title = "Control: more SFT"
        return self._tuned(
            name,
            title,
            self.drafting(),
            lambda: self._rows(sft.drafts, "drafts"),
            self.settings.drafting,
        )

    def on_chosen(self, name: str, data: list[dict[str, Any]]) -> dspy.LM:
        """A control: SFT on the chosen drafts alone (of labelled rows: those that helped), as long
        as preference tuning."""
        wanted = [row for row in data if row.get("label", True)]
        rows = [
            {"prompt": row["prompt"], "completion": row.get("chosen") or row["completion"]}
            for row in wanted
        ]
        settings = self.settings.drafting.model_copy(
            update={
                "num_train_epochs": self.settings.preferring.num_train_epochs,
                "max_steps": None,
            }
        )
        return self._tuned(
            name, "Control: SFT on the chosen drafts", self.drafting(), lambda: rows, settings
        )

    def kept(self, name: str) -> dspy.LM | None:
        """The one of that name, when the run has it."""
        return self.models.kept(name)

    def _rows(self, reference: str, which: str) -> list[dict[str, Any]]:
        config = self._desk.config
        given: dict[str, Any] = {"seed": config.data.seed, "rows": config.data.rows}
        if which == "drafts":
            given["draft"] = config.draft
        if takes(reference, "strong"):
            with (
                self._desk.stage(
                    f"rows {which}", "Asking the strong model what to teach"
                ) as progress,
                keeping(self._desk.store),
            ):
                offered = {"strong": recorded(self._strong()), "progress": progress}
                rows = call(reference, given=given, offered=offered)
        else:
            rows = call(reference, given=given)
        if not rows:
            raise ConfigError(f"[sft] {which} = {reference} gave no rows.")
        return list(rows)

    def _tuned(
        self, name: str, title: str, start: dspy.LM, make_rows: Any, settings: SFT | DPO | KTO
    ) -> dspy.LM:
        engine_of(self._base())
        if getattr(self._desk.config.weak, "dtype", None) == "int8":
            raise TuningError(
                "A model in int8 takes no adapter, so it cannot be tuned: set [weak] dtype = "
                '"auto".'
            )
        return self.models.trained(name, title, start, make_rows, settings)
