"""Scores of a whole corpus, such as macro-F1: what has no value for one example alone.

@corpus_metric
def macro_f1(examples, predictions): ...
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import dspy

from cowest_dspy.influence.statistics import Interval

CorpusMetric = Callable[[Sequence[dspy.Example], Sequence[dspy.Prediction | None]], float]
"""``metric(examples, predictions)``: as many predictions as examples, None where an answer failed;
gives one finite number."""


def corpus_metric(function: CorpusMetric) -> CorpusMetric:
    """Marks ``function`` as one of a whole corpus, so that a comparison calls it once for all
    examples and not once for each."""
    function.__dict__["corpus_metric"] = True
    return function


def is_corpus_metric(metric: Any) -> bool:
    """Whether ``metric`` was marked by :func:`corpus_metric`."""
    return bool(getattr(metric, "corpus_metric", False))


def corpus_interval(
    metric: CorpusMetric,
    examples: Sequence[dspy.Example],
    predictions: Sequence[dspy.Prediction | None],
    *,
    level: float = 0.95,
    seed: int = 0,
    repeats: int = 500,
) -> Interval | None:
    """The percentile bootstrap of a corpus metric (Efron and Tibshirani 1993, chapter 13), drawing
    examples with their predictions.

    Draws for which the metric has no finite value are left out. The same seed gives the same
    interval. None for fewer than two examples, or where no draw has a value.
    """
    if len(examples) < 2:
        return None
    import numpy as np

    generator, values = np.random.default_rng(seed), list[float]()
    for _ in range(repeats):
        drawn = generator.integers(len(examples), size=len(examples))
        value = float(
            metric([examples[place] for place in drawn], [predictions[place] for place in drawn])
        )
        if np.isfinite(value):
            values.append(value)
    if not values:
        return None
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))
