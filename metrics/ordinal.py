"""ordinal: scores of five ordered labels, from casual talk to what calls for help.

    label_match      is the label the right one? (accuracy, one example)
    macro_f1         the labels' F1, each label counting the same however rare it is (a whole
                     corpus)
    label_distance   how many steps an answer is away from the right label (a whole corpus; lower is
                     better)

A label is read whatever its case, underscores, hyphens and outer punctuation: ``__needs_caution__``
is "needs caution".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from cowest_dspy.report.corpus import corpus_metric

LABELS = (
    "casual",
    "possibly needs caution",
    "probably needs caution",
    "needs caution",
    "needs intervention",
)
LARGEST = float(len(LABELS) - 1)


def label_match(example: Any, prediction: Any, trace: object = None) -> float:
    """1.0 when the prediction's label is the example's, otherwise 0.0.

    Args:
        example: has ``answer``, the right label.
        prediction: has ``answer``; None or a missing one scores 0.0.
        trace: not used; DSPy passes it.
    """
    given = normalised(getattr(prediction, "answer", None))
    return float(bool(given) and given == normalised(example.answer))


@corpus_metric
def macro_f1(examples: Sequence[Any], predictions: Sequence[Any]) -> float:
    """The mean F1 of the labels that occur, as the right one or as an answer; in [0, 1], 1 for no
    examples.

    A label's F1 is 2 * hits / (times given + times right). A failure (None, or what is no label) is
    no answer: the right label has missed it, and no other one is charged for it.

    Raises:
        ValueError: an example whose ``answer`` is no label; or not as many predictions as examples.
    """
    pairs = _places(examples, predictions)
    occurring = {place for pair in pairs for place in pair if place is not None}
    scores: list[float] = []
    for label in occurring:
        hits = sum(pair == (label, label) for pair in pairs)
        scores.append(
            2
            * hits
            / (
                sum(right == label for right, _ in pairs)
                + sum(given == label for _, given in pairs)
            )
        )
    return sum(scores) / len(scores) if scores else 1.0


@corpus_metric
def label_distance(examples: Sequence[Any], predictions: Sequence[Any]) -> float:
    """The mean absolute distance between answer and right label, in steps of the order: 0 is best,
    4 the largest.

    Failures (None, or what is no label) have no distance and are left out: read it beside their
    number. When nothing was answered it is the largest, 4; for no examples 0.

    Raises:
        ValueError: as :func:`macro_f1`.
    """
    pairs = _places(examples, predictions)
    steps = [abs(right - given) for right, given in pairs if given is not None]
    return sum(steps) / len(steps) if steps else LARGEST if pairs else 0.0


def normalised(answer: object) -> str:
    """``normalised("__Needs_Caution__.")`` is ``"needs caution"``; None gives ``""``."""
    return " ".join(re.findall(r"[^\W_]+", str(answer).lower())) if answer is not None else ""


def _places(examples: Sequence[Any], predictions: Sequence[Any]) -> list[tuple[int, int | None]]:
    """For each example the place of its label in the order, and that of the answer; None is a
    failure."""
    if len(examples) != len(predictions):
        raise ValueError(
            f"There are {len(examples)} examples and {len(predictions)} predictions: give one for "
            "each, None if it failed."
        )
    pairs: list[tuple[int, int | None]] = []
    for example, prediction in zip(examples, predictions, strict=True):
        right, given = normalised(example.answer), normalised(getattr(prediction, "answer", None))
        if right not in LABELS:
            raise ValueError(f'"{right[:40]}" is no label. Labels, in order: {", ".join(LABELS)}.')
        pairs.append((LABELS.index(right), LABELS.index(given) if given in LABELS else None))
    return pairs
