"""[influence] as one evaluator: the metric, a judge, the likelihood of the gold answer, or several
of them by weight."""

from __future__ import annotations

from collections.abc import Callable

import dspy

from cowest_dspy.errors import ConfigError
from cowest_dspy.experiment.config import Config
from cowest_dspy.influence.judge import PAPER, GoldLikelihood, Judge, Rubric, Weighted
from cowest_dspy.influence.metric import Metric
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.utils.importing import load


def evaluator(
    config: Config, metric: Metric, program: Collaboration, judge: Callable[[], dspy.LM]
) -> Metric:
    """The evaluator of a configuration; ``program`` is bound to its strong model, ``judge`` gives
    the judge's LM if it is needed.

    With a single evaluator it is that one. The metric alone keeps no parts; a judge alone does not
    pay for a metric beside it.

    Raises:
        ConfigError: [influence] rubric is no Rubric; or the strong model's backend gives no
            log-probabilities.
    """
    rules = config.influence
    made: dict[str, tuple[Metric, float]] = {}
    for name, weight in rules.weights.items():
        if name == "metric":
            made[name] = metric, weight
        elif name == "judge":
            made[name] = (
                Judge(judge(), _rubric(rules.rubric), gold=rules.gold, repeats=rules.repeats),
                weight,
            )
        else:
            made[name] = GoldLikelihood(program, gold=rules.gold), weight
    return next(iter(made.values()))[0] if len(made) == 1 else Weighted(**made)


def _rubric(reference: str | None) -> Rubric:
    if reference is None:
        return PAPER
    rubric = load(reference)
    if not isinstance(rubric, Rubric):
        raise ConfigError(
            f"[influence] rubric {reference} is a {type(rubric).__name__}: a cowest_dspy.Rubric "
            "is expected."
        )
    return rubric
