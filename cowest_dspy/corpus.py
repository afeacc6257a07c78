"""Scores of a whole corpus, such as macro-F1: what has no value for one example alone.

@corpus_metric
def macro_f1(examples, predictions): ...
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import dspy

CorpusMetric = Callable[[Sequence[dspy.Example], Sequence[dspy.Prediction | None]], float]
"""``metric(examples, predictions)``: as many predictions as examples, None where an answer failed; gives one finite number."""


def corpus_metric(function: CorpusMetric) -> CorpusMetric:
    """Marks ``function`` as one of a whole corpus, so that a comparison calls it once for all examples and not once for each."""
    function.__dict__["corpus_metric"] = True
    return function


def is_corpus_metric(metric: Any) -> bool:
    """Whether ``metric`` was marked by :func:`corpus_metric`."""
    return bool(getattr(metric, "corpus_metric", False))
