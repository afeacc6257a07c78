"""Texts that nearly stand in another list: what is tested must not have been trained on, also not
in other words' order.

Two texts are alike by the Jaccard similarity of their word 3-grams: shared 3-grams / all 3-grams of
the two. Texts of fewer than ``SHORT`` words have too few for that, so of a pair with a short one
the sets of words are compared. Case, punctuation and spacing do not count. Candidates are found by
BM25; only what the similarity confirms is reported.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SHORT = 8
CANDIDATES = 20
THRESHOLD = 0.5

log = logging.getLogger(__name__)
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class NearDuplicate:
    """``others[other]`` nearly is ``held_out[held_out]``; ``similarity`` is in [threshold, 1]."""

    held_out: int
    other: int
    similarity: float


@dataclass(frozen=True)
class Apart:
    """Splits without near-duplicates of the more protected ones, and how many rows each lost by
    that."""

    splits: dict[str, list[dict[str, Any]]]
    dropped: dict[str, int]


def similarity(one: str, other: str) -> float:
    """How much of two texts is the same, in [0, 1]: 1 for the same words in the same order;
    symmetric.

    ``similarity("How hot is iron?", "how hot is IRON")`` is 1.0. Texts without any word are alike
    only if they are equal.
    """
    return _alike(_key(one), _key(other))


def near_duplicates(
    held_out: Sequence[str], others: Sequence[str], *, threshold: float = THRESHOLD
) -> list[NearDuplicate]:
    """Which of ``others`` nearly stand in ``held_out``: at most one finding each, the most similar
    one (the first of equals).

    The same words in the same order are always found. Otherwise the ``CANDIDATES`` texts of
    ``held_out`` that BM25 ranks highest are compared, so with no more of them than that it is as if
    all were compared with all.

    Args:
        held_out: the texts that must not be trained on.
        others: the texts to look through.
        threshold: the least similarity of a finding, in (0, 1].

    Raises:
        ValueError: a threshold out of range.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is a similarity in (0, 1], not {threshold}.")
    kept, asked = [_key(text) for text in held_out], [_key(text) for text in others]
    first: dict[tuple[str, ...], int] = {}
    for place, words in enumerate(kept):
        first.setdefault(words, place)
    ranked = _ranked(kept, [words for words in asked if words not in first])
    found: list[NearDuplicate] = []
    for place, words in enumerate(asked):
        if words in first:
            found.append(NearDuplicate(first[words], place, 1.0))
            continue
        scored = [(_alike(kept[candidate], words), -candidate) for candidate in next(ranked)]
        best = max(scored, default=(0.0, 0))
        if best[0] >= threshold:
            found.append(NearDuplicate(-best[1], place, best[0]))
    return found


def kept_apart(
    splits: Mapping[str, Sequence[Mapping[str, Any]]],
    *texts: Callable[[Mapping[str, Any]], str],
    threshold: float = THRESHOLD,
) -> Apart:
    """The splits without rows that nearly stand in an earlier one: give the most protected first,
    such as test, dev, train.

    The first split is never touched, so what is measured does not depend on what is trained on.

    Args:
        splits: rows by split, the most protected first.
        texts: what of a row is compared; a row is dropped when any of these texts is a
            near-duplicate.
        threshold: as in :func:`near_duplicates`.
    """
    done: dict[str, list[dict[str, Any]]] = {}
    before: list[Mapping[str, Any]] = []
    for name, rows in splits.items():
        lost = {
            near.other
            for text in texts
            for near in near_duplicates(
                [text(row) for row in before], [text(row) for row in rows], threshold=threshold
            )
        }
        done[name] = [dict(row) for place, row in enumerate(rows) if place not in lost]
        before += done[name]
    dropped = {name: len(rows) - len(done[name]) for name, rows in splits.items()}
    if any(dropped.values()):
        log.info("near-duplicates of more protected splits were dropped: %s", dropped)
    return Apart(done, dropped)


def _key(text: str) -> tuple[str, ...]:
    """The words of a text; of one without any, the text itself."""
    return tuple(_WORD.findall(unicodedata.normalize("NFKC", text).casefold())) or (text.strip(),)


def _alike(one: tuple[str, ...], other: tuple[str, ...]) -> float:
    size = 1 if min(len(one), len(other)) < SHORT else 3
    if one == other:
        return 1.0
    grams, others = (
        {words[i : i + size] for i in range(len(words) - size + 1)} for words in (one, other)
    )
    return len(grams & others) / max(1, len(grams | others))


def _ranked(kept: list[tuple[str, ...]], asked: list[tuple[str, ...]]) -> Iterator[Sequence[int]]:
    """For each of ``asked`` the places of the candidates among ``kept``, as an iterator."""
    if len(kept) <= CANDIDATES or not asked:
        return iter([range(len(kept))] * len(asked))
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG
    # Sets of words: a text that says one word often must not push out the one that says the same
    # words.
    index = bm25s.BM25()
    index.index([sorted(set(words)) for words in kept], show_progress=False)
    places, _ = index.retrieve(
        [sorted(set(words)) for words in asked], k=CANDIDATES, show_progress=False
    )
    return iter(places.tolist())
