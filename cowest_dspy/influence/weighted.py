"""Weighted: several evaluators as one, by declared weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import dspy

from cowest_dspy.errors import ConfigError
from cowest_dspy.influence.metric import Metric, graded, said


class Weighted:
    """A DSPy metric: the weighted mean of others, each with values in [0, 1].

    ``Weighted(metric=(accuracy, 0.5), judge=(judge, 0.5))(example, prediction)`` is
    ``Prediction(score=0.75, feedback="judge: ...", parts={"metric": 1.0, "judge": 0.5})``. When one
    of them fails, the whole fails: a mean of what is left would be another measure.

    Raises:
        ConfigError: no part, or weights that are not above 0.
    """

    # As a function has one: what logs a metric, such as MLflow's autolog, calls it by its name.
    __name__ = "weighted"

    def __init__(self, **parts: tuple[Metric, float]) -> None:
        if not parts or not all(
            math.isfinite(weight) and weight > 0 for _, weight in parts.values()
        ):
            raise ConfigError("Weighted needs at least one evaluator, each with a weight above 0.")
        self.parts: Mapping[str, tuple[Metric, float]] = parts

    def __call__(
        self,
        example: dspy.Example,
        prediction: Any,
        trace: Any = None,
        pred_name: Any = None,
        pred_trace: Any = None,
    ) -> Any:
        """A ``dspy.Prediction`` of ``score``, the ``feedback`` of the parts that gave one, and the
        score of each as ``parts``; for an optimiser that looks for demonstrations (``trace`` is
        given), the score alone. Parts are asked as in an evaluation."""
        scores: dict[str, float] = {}
        words: list[str] = []
        for name, (metric, _) in self.parts.items():
            found = said(metric(example, prediction, trace=None), example)
            scores[name] = found.score
            if found.feedback:
                words.append(f"{name}: {found.feedback}")
        total = sum(weight for _, weight in self.parts.values())
        score = sum(scores[name] * weight for name, (_, weight) in self.parts.items()) / total
        found = dspy.Prediction(
            score=min(1.0, max(0.0, score)), feedback="\n".join(words), parts=scores
        )
        return graded(found, trace, pred_name)
