"""What the tables of a configuration mean, and what is wrong with them before anything is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import dspy

from cowest_dspy.errors import ConfigError, masked
from cowest_dspy.experiment.config import ROLES, Config, validate
from cowest_dspy.influence.config import InfluenceRules
from cowest_dspy.influence.judge import PAPER, GoldLikelihood, Judge, Rubric, Weighted
from cowest_dspy.influence.metric import Metric
from cowest_dspy.lms.api import estimate_cost
from cowest_dspy.lms.config import Api, LMSettings, read_key
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.store.serialize import digest
from cowest_dspy.tuning import DPO, KTO, SFT
from cowest_dspy.utils.importing import code_of, load

AFTER_ANSWERS = (
    "budget", "compare", "evaluate", "pairs", "dpo", "kto", "rounds", "report", "serve", "tracking",
    "cycle", "sft", "ray",
)  # fmt: skip
"""Tables of a configuration that answers do not depend on: what comes after them, and where they
are made."""


@dataclass(frozen=True)
class TuningSettings:
    """The tables of a configuration that say how weak models are trained."""

    drafting: SFT
    answering: SFT
    preferring: DPO | KTO

    @classmethod
    def of(cls, config: Config) -> TuningSettings:
        """The tuning settings of ``config``.

        Raises:
            ConfigError: settings that TRL or PEFT would not take.
        """
        sft = config.sft
        return cls(
            validate(SFT, sft.settings if sft else {}, "[sft.settings]"),
            validate(SFT, sft.answer_settings if sft else {}, "[sft.answer_settings]"),
            validate(DPO, config.dpo, "[dpo]")
            if config.kto is None
            else validate(KTO, config.kto, "[kto]"),
        )


def check_keys(config: Config) -> None:
    """Check that the API keys are there which the configuration names, before hours are spent on a
    training.

    Raises:
        ConfigError: an environment variable is not set.
    """
    for settings in _models(config).values():
        variable: str | None = getattr(settings, "api_key_env", None)
        if variable:
            read_key(variable)


def _models(config: Config) -> dict[str, LMSettings | None]:
    """The tables of models by name."""
    models: dict[str, LMSettings | None] = {role: getattr(config, role) for role in ROLES}
    return models | ({"compare.transfer": config.compare.transfer} if config.compare else {})


def check_prices(config: Config) -> None:
    """Check that a budget in US dollars can be kept.

    Raises:
        ConfigError: it cannot, since the price of an API is not known.
    """
    if config.budget is None or config.budget.usd is None:
        return
    for name, settings in _models(config).items():
        if isinstance(settings, Api) and estimate_cost(settings, 1, 1) is None:
            raise ConfigError(
                f"[budget] usd = {config.budget.usd:g} cannot be kept: the price of [{name}] "
                f"{masked(settings.model)} is not known. Add price = {{ input = ..., "
                "output = ... } to its table, in US dollars per million tokens; or limit "
                "strong_calls, tokens or minutes instead."
            )


def build_evaluator(
    rules: InfluenceRules, metric: Metric, program: Collaboration, judge: dspy.LM | None
) -> Metric:
    """The evaluator of [influence]; ``program`` is bound to its strong model, ``judge`` is the
    judge's LM where one is asked.

    With a single evaluator it is that one: a judge alone pays for no metric beside it.

    Raises:
        ConfigError: [influence] rubric is no Rubric; or the strong model's backend gives no
            log-probabilities.
    """
    made: dict[str, tuple[Metric, float]] = {}
    for name, weight in rules.weights.items():
        if name == "metric":
            made[name] = metric, weight
        elif name == "judge":
            assert judge is not None
            rubric = _rubric(rules.rubric)
            made[name] = Judge(judge, rubric, gold=rules.gold, repeats=rules.repeats), weight
        else:
            made[name] = GoldLikelihood(program, gold=rules.gold), weight
    return next(iter(made.values()))[0] if len(made) == 1 else Weighted(**made)


def digest_of_answers(config: Config, program: Collaboration) -> str:
    """What answers depend on besides model ids: settings, prompts, and the code of the recipes."""
    references = (
        config.program,
        config.metric,
        config.data.source,
        config.evaluate.weak,
        config.influence.rubric,
    )
    aside: Any = {
        **dict.fromkeys(AFTER_ANSWERS, True),
        "data": {"test"},
        "influence": {"noise"},
    }
    return digest(
        [config.model_dump(mode="json", exclude=aside), code_of(references), program.dump_state()]
    )


def _rubric(reference: str | None) -> Rubric:
    """The rubric that [influence] names; by default the paper's.

    Raises:
        ConfigError: it is none.
    """
    if reference is None:
        return PAPER
    rubric = load(reference)
    if not isinstance(rubric, Rubric):
        raise ConfigError(
            f"[influence] rubric {reference} is a {type(rubric).__name__}: a "
            "cowest_dspy.influence.Rubric is expected."
        )
    return rubric
