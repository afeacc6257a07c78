"""exact_match and token_f1: a short answer against several accepted ones, normalised as SQuAD does
(Rajpurkar et al., 2016).

Case, punctuation, articles and spacing do not count; words do. So "The Eiffel Tower!" is "eiffel
tower", and "2" is not "two", unless both are among the accepted answers. As in SQuAD signs vanish
without a gap: "1,000" is "1000", and "3.5" is "35".
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from typing import Any

ARTICLES = frozenset({"a", "an", "the"})


def exact_match(example: Any, prediction: Any, trace: object = None) -> float:
    """1.0 when the prediction's answer is, normalised, one of the accepted answers, otherwise 0.0.

    Args:
        example: has ``answers``, a list of accepted answers, or only ``answer``.
        prediction: has ``answer``; None, a missing or an empty one scores 0.0.
        trace: not used; DSPy passes it.
    """
    given = normalised(getattr(prediction, "answer", None))
    return float(bool(given) and any(given == normalised(answer) for answer in accepted(example)))


def token_f1(example: Any, prediction: Any, trace: object = None) -> float:
    """The F1 of the words that prediction and accepted answer share, the best over the accepted
    ones; in [0, 1].

    F1 is 2 shared / (words of the one + words of the other), a word counted as often as it stands
    in both. "blue whale" against "the whale" is 2 * 1 / (2 + 1) = 2/3. Arguments as those of
    :func:`exact_match`.
    """
    given = normalised(getattr(prediction, "answer", None))
    return max((overlap_f1(given, normalised(answer)) for answer in accepted(example)), default=0.0)


def accepted(example: Any) -> list[str]:
    """The accepted answers of an example: ``answers``, or when there are none, ``answer`` alone."""
    answers = getattr(example, "answers", None)
    if answers:
        return [str(answer) for answer in answers]
    answer = getattr(example, "answer", None)
    return [] if answer is None else [str(answer)]


def overlap_f1(one: str, other: str) -> float:
    """F1 of the words of two normalised answers: symmetric, 1 when they have the same words, 0 when
    one of them has none."""
    words, others = Counter(one.split()), Counter(other.split())
    shared = (words & others).total()
    return 2 * shared / (words.total() + others.total()) if shared else 0.0


def normalised(answer: object) -> str:
    """Lower case, without punctuation, symbols and articles, one space between words; None gives
    ``""``.

    An answer that is nothing but articles and signs, such as the blood group "A", is kept instead
    of emptied.
    """
    text = "" if answer is None else unicodedata.normalize("NFKC", str(answer)).casefold()
    bare = "".join(char for char in text if unicodedata.category(char)[0] not in "PS").split()
    words = [word for word in bare if word not in ARTICLES]
    return " ".join(words or bare or text.split())
