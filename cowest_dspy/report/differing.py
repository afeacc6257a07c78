"""Two texts side by side, word by word: what only the one has, and what only the other has."""

from __future__ import annotations

import dataclasses
import difflib
from functools import partial

from markupsafe import Markup, escape

from cowest_dspy.utils.notebook import WORD, marked_sides

MOST_WORDS = 1500


@dataclasses.dataclass(frozen=True)
class WordDiff:
    """HTML, escaped: the ``old`` text with what the new one lacks in ``<del>``, the ``new`` one
    with what it adds in ``<ins>``.

    ``kept`` is the share of their words that both have, in [0, 1].
    """

    old: Markup
    new: Markup
    kept: float


def word_diff(old: str, new: str) -> WordDiff:
    """
    >>> word_diff("it is 12 mm", "it is 14 mm")
    WordDiff(old=Markup('it is <del>12</del> mm'), new=Markup('it is <ins>14</ins> mm'), kept=0.75)

    Texts of more than 1,500 words and signs are not compared: they come back as they are. So do
    texts that have so little in common (less than a fifth of their words) that marks would only be
    noise.
    """
    before, after = WORD.findall(old), WORD.findall(new)
    if max(len(before), len(after)) > MOST_WORDS:
        return WordDiff(escape(old), escape(new), 0.0)
    # Lower case: a word that only begins a sentence is the same word.
    matcher = difflib.SequenceMatcher(
        None, [word.lower() for word in before], [word.lower() for word in after], autojunk=False
    )
    kept = _kept(matcher, before, after)
    if kept < 0.2:
        return WordDiff(escape(old), escape(new), kept)
    sides = marked_sides(
        matcher, (before, after), (partial(_marked, "del"), partial(_marked, "ins"))
    )
    return WordDiff(*sides, kept)


def _kept(matcher: difflib.SequenceMatcher[str], before: list[str], after: list[str]) -> float:
    words = sum(not word.isspace() for word in (*before, *after))
    same = sum(
        not before[i].isspace()
        for i1, _, size in matcher.get_matching_blocks()
        for i in range(i1, i1 + size)
    )
    return 2 * same / words if words else 1.0


def _marked(tag: str, text: str) -> Markup:
    """The text in the tag, spaces at its ends outside of it."""
    inner = text.strip()
    if not inner:
        return escape(text)
    start, _, end = text.partition(inner)
    return Markup("{}<{}>{}</{}>{}").format(start, Markup(tag), inner, Markup(tag), end)
