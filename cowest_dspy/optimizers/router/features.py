"""What the router sees: an input and its draft as a few numbers. Nothing here knows the answer, and
nothing is asked.

Lengths are natural logarithms of 1 + a count, shares are in [0, 1]. A draft that is one of a few
frequent texts (a label, yes or no) is also seen as that text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

_WORD, _NUMBER = re.compile(r"\w+"), re.compile(r"\d+(?:\.\d+)?")

TEXT = ("input_words", "draft_words", "draft_numbers", "new_numbers", "overlap", "whole_sentence")
SAMPLES = ("agreement", "likeness")
LIKELIHOOD = ("logprob",)
LONGEST_CATEGORY = 60


def draft_features(
    inputs: Mapping[str, Any],
    draft: str,
    *,
    others: Sequence[str] = (),
    logprob: float | None = None,
) -> dict[str, float]:
    """The features of one draft, by name.

    Args:
        inputs: the fields that the program was given.
        others: further samples of the draft for the same input; "agreement" is the share of them
            that say the same, "likeness" the mean overlap of their words with the draft's. Without
            any, the two are left out.
        logprob: the mean natural log-probability of the draft's tokens under the weak model; None
            leaves "logprob" out.
    """
    asked = " ".join(str(value) for value in inputs.values())
    said, known = _words(draft), _words(asked)
    numbers, given = set(_NUMBER.findall(draft)), set(_NUMBER.findall(asked))
    found = {
        "input_words": math.log1p(len(_WORD.findall(asked))),
        "draft_words": math.log1p(len(_WORD.findall(draft))),
        "draft_numbers": math.log1p(len(numbers)),
        "new_numbers": math.log1p(len(numbers - given)),
        "overlap": len(said & known) / len(said) if said else 0.0,
        "whole_sentence": float(draft.rstrip().endswith((".", "!", "?"))),
    }
    if others:
        found["agreement"] = sum(category(one) == category(draft) for one in others) / len(others)
        found["likeness"] = sum(_likeness(said, _words(one)) for one in others) / len(others)
    if logprob is not None:
        found["logprob"] = logprob
    return found


def category(draft: str) -> str:
    """A draft as one of a few frequent texts: lower case, spaces and full stops at its ends left
    out."""
    return " ".join(draft.lower().split()).strip(" .")[:LONGEST_CATEGORY]


def _words(text: str) -> set[str]:
    return {word.lower() for word in _WORD.findall(text)}


def _likeness(one: set[str], other: set[str]) -> float:
    """The share of the words of both that both have (Jaccard); 1 for two empty texts."""
    return len(one & other) / len(one | other) if one | other else 1.0
