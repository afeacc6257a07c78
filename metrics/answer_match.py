"""answer_match: is a short answer the right one, whatever its case, punctuation and unit?

A short answer here is a number, a name, yes or no. Nothing is read out of longer text: "The answer
is 12" does not match "12", and an answer that hedges ("12 or 13", "yes and no") is wrong.
"""

from __future__ import annotations

import re
from typing import Any

UNITS = frozenset({"bar", "bars", "litre", "litres", "liter", "liters", "l", "week", "weeks"})
FILLERS = frozenset({"the", "a", "an"})
_WORD = re.compile(r"[-+]?\d+(?:\.\d+)?|[^\W\d_]+")


def answer_match(example: Any, prediction: Any, trace: object = None) -> float:
    """1.0 when the prediction's answer is the example's, otherwise 0.0.

    Case, punctuation, articles, units and a number's plus sign or empty decimals do not count: "12
    bar", "12.0" and "12" are one answer, so are "The Morva." and "Morva"; "-12" and "12" are two. A
    unit is dropped only after a number, so "bar" alone is not empty but wrong.

    Args:
        example: has ``answer``, the right one.
        prediction: has ``answer``; None or a missing one scores 0.0.
        trace: not used; DSPy passes it.
    """
    given = normalised(getattr(prediction, "answer", None))
    return float(bool(given) and given == normalised(example.answer))


def normalised(answer: object) -> str:
    """The bare answer: ``normalised("12 bar.")`` is ``"12"``, ``normalised("The Morva")`` is
    ``"morva"``; None gives ``""``."""
    if answer is None:
        return ""
    words: list[str] = []
    for word in _WORD.findall(str(answer).lower()):
        if word in FILLERS or (word in UNITS and words and words[-1][-1].isdigit()):
            continue
        words.append(_number(word) if word[-1].isdigit() else word)
    return " ".join(words)


def _number(word: str) -> str:
    """``"+07.50"`` as ``"7.5"``."""
    value = float(word)
    return str(int(value)) if value.is_integer() else str(value)
