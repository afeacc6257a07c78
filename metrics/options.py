"""option_match and macro_f1: accuracy and macro-F1 over the options of a question, or over any
fixed set of labels.

An answer counts for what it names first: "B", "b)", "(B)" and "B. Iron" all name B. A letter is
read only where it stands alone or has a sign behind it, so "a fever" and "A or B" name no option.
Nothing is looked for further inside of a text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import dspy

from cowest_dspy.errors import DataError
from cowest_dspy.report.corpus import corpus_metric

_LETTER = re.compile(r"""["'*(\[]*([a-z])(?:["'*\s]*$|["'*]*[.):\]]|\s+-\s)""", re.IGNORECASE)


def option_match(example: Any, prediction: Any, trace: object = None) -> float:
    """1.0 when the prediction's answer names the example's, otherwise 0.0. Its mean is the
    accuracy.

    Args:
        example: has ``answer``, a letter such as "B", or another label such as "needs care".
        prediction: has ``answer``; None or a missing one scores 0.0.
        trace: not used; DSPy passes it.
    """
    given = label(getattr(prediction, "answer", None))
    return float(bool(given) and given == label(example.answer))


@corpus_metric
def macro_f1(
    examples: Sequence[dspy.Example], predictions: Sequence[dspy.Prediction | None]
) -> float:
    """The mean of the F1 of every label that the examples have, each label counting the same; in
    [0, 1], higher is better.

    F1 of a label is 2 TP / (2 TP + FP + FN). A failed or missing answer (None), and an answer that
    is no example's label, is a wrong one of the example's label (FN), but makes no label of its
    own: only what examples have is averaged over.

    With the right answers A, A, B and the predictions A, B, B both labels have F1 2/3.

    Raises:
        DataError: no examples, or not as many predictions.
    """
    if not examples or len(examples) != len(predictions):
        raise DataError(
            f"macro_f1 needs as many predictions as examples, at least one: {len(predictions)} "
            f"and {len(examples)}."
        )
    right = [label(example.answer) for example in examples]
    given = [label(getattr(prediction, "answer", None)) for prediction in predictions]
    scores: list[float] = []
    for one in sorted(set(right)):
        both = sum(gold == one == guess for gold, guess in zip(right, given, strict=True))
        scores.append(2 * both / (right.count(one) + given.count(one)))
    return sum(scores) / len(scores)


def label(answer: object) -> str:
    """What an answer names: ``label("b) Iron")`` is ``"B"``, ``label("Needs  Care")`` is ``"needs
    care"``; None gives ``""``."""
    text = "" if answer is None else " ".join(str(answer).split())
    letter = _LETTER.match(text)
    return letter.group(1).upper() if letter else text.casefold()
