"""Measures of texts: length in words, nearly equal ones, an answer that is said verbatim, rows that
nearly stand in another list."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from cowest_dspy.errors import PairsError
from cowest_dspy.influence.statistics import Interval, bootstrap_mean_interval
from cowest_dspy.utils.extras import check_extra

log = logging.getLogger(__name__)


# Chinese and Japanese are written without spaces: each of their signs counts as a word.
_SIGN = "\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{_SIGN}]|[^\W{_SIGN}]+")
_WORD_OR_MARK = re.compile(rf"[{_SIGN}]|[^\W{_SIGN}]+|[^\w\s]")
# Texts that differ by more words are not nearly equal, however long they are; it bounds the time
# for long drafts.
MOST_EDITS = 200


def word_count(text: str) -> int:
    """How many words a text has.

    >>> word_count("The Arbel may run at 4.5 bar.")
    8
    """
    return sum(1 for _ in _WORD.finditer(text))


def near(first: str, second: str, least: float) -> bool:
    """Whether the similarity of two texts is at least ``least``, in (0, 1].

    It is the share of words and marks that both have in the same order: 2 * common / (words of
    both), with ``common`` the longest common subsequence, whatever the case. Texts with other
    numbers in them are never near: in a domain of facts, the number may be all the difference that
    matters.

    >>> near("The press is hot today, be careful.", "the press is hot today, be careful!", 0.8)
    True
    >>> near("The press runs at 4 bar.", "The press runs at 6 bar.", 0.8)
    False
    """
    left, right = _WORD_OR_MARK.findall(first.casefold()), _WORD_OR_MARK.findall(second.casefold())
    edits = min(int((1 - least) * (len(left) + len(right)) + 1e-9), MOST_EDITS)
    counts, others = Counter(left), Counter(right)
    different = (counts - others) + (others - counts)
    if different.total() > edits or any(word[0].isdigit() for word in different):
        return False
    return _within(left, right, edits)


def _within(left: Sequence[str], right: Sequence[str], most: int) -> bool:
    """Whether ``left`` becomes ``right`` by at most so many insertions and deletions.

    The greedy algorithm of Myers (1986), "An O(ND) difference algorithm and its variations",
    section 4: for each number of edits, the place that is furthest along each diagonal.
    """
    furthest = {1: 0}
    for edits in range(most + 1):
        for diagonal in range(-edits, edits + 1, 2):
            down = diagonal == -edits or (
                diagonal != edits and furthest[diagonal - 1] < furthest[diagonal + 1]
            )
            x = furthest[diagonal + 1] if down else furthest[diagonal - 1] + 1
            while (
                x < len(left) and 0 <= x - diagonal < len(right) and left[x] == right[x - diagonal]
            ):
                x += 1
            furthest[diagonal] = x
            if x >= len(left) and x - diagonal >= len(right):
                return True
    return False


def says(text: str, answer: str) -> bool:
    """Whether a text says an answer verbatim, as whole words, whatever the case and the spacing. A
    number is not found inside another one; an empty answer is said nowhere.

    >>> says("It may run at up to 25  BAR.", "25 bar"), says("1,250 or 2.5 litres", "25")
    (True, False)
    """
    wanted = plain(answer)
    if not wanted:
        return False
    before = r"(?<!\w)" if wanted[0].isalnum() else ""
    after = r"(?!\w)" if wanted[-1].isalnum() else ""
    if wanted[0].isdigit():
        before += r"(?<!\d[.,:/])(?<!(?<!\w)[-\u2212])(?<!(?<!\w)[.,])"
    if wanted[-1].isdigit():
        after += r"(?![.,:/]\d)"
    return re.search(before + re.escape(wanted) + after, plain(text)) is not None


def plain(text: str) -> str:
    """The text as two are compared: NFKC, case folded, single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


# Lengths of chosen and rejected texts

# A mean difference of lengths that is certain, but a smaller part of the mean length, is not warned
# of.
STRONG_BIAS = 0.2


@dataclass(frozen=True)
class Lengths:
    """Words of chosen and rejected drafts, over all pairs: whether preference tuning would learn
    length first (Park et al. 2024, "Disentangling Length from Quality in Direct Preference
    Optimization", arXiv 2403.19159).

    ``difference`` is the mean of chosen less rejected, ``interval`` its 95 % bootstrap interval
    over examples (None for fewer than two); ``longer`` and ``shorter`` are the shares of pairs, in
    [0, 1], whose chosen draft is longer or shorter.
    """

    chosen: float
    rejected: float
    difference: float
    interval: Interval | None
    longer: float
    shorter: float

    @classmethod
    def of(cls, pairs: Iterable[tuple[Hashable, str, str]]) -> Lengths | None:
        """The lengths of pairs, each an example, a chosen and a rejected text; None when there are
        none. The same pairs give the same interval."""
        counted = [(key, word_count(one), word_count(other)) for key, one, other in pairs]
        if not counted:
            return None
        groups: dict[Hashable, list[float]] = {}
        for key, one, other in counted:
            groups.setdefault(key, []).append(one - other)
        differences = [one - other for _, one, other in counted]
        return cls(
            chosen=fmean(one for _, one, _ in counted),
            rejected=fmean(other for _, _, other in counted),
            difference=fmean(differences),
            interval=bootstrap_mean_interval(list(groups.values())),
            longer=fmean(one > 0 for one in differences),
            shorter=fmean(one < 0 for one in differences),
        )

    @property
    def warning(self) -> str | None:
        """What to say, and to try, when the difference is certain (0 is outside the interval) and
        more than a fifth of the mean length."""
        certain = self.interval is not None and not self.interval.low <= 0 <= self.interval.high
        size = abs(self.difference)
        if not certain or size <= STRONG_BIAS * (self.chosen + self.rejected) / 2:
            return None
        word = "longer" if self.difference > 0 else "shorter"
        return (
            f"Chosen drafts are {word} than rejected ones by {size:.1f} words: tuning may teach "
            "length instead of content. length_ratio = 1.5 keeps pairs of similar length "
            "only."
        )

    def __str__(self) -> str:
        spread = f" [{self.interval.low:+.1f}, {self.interval.high:+.1f}]" if self.interval else ""
        return (
            f"chosen {self.chosen:.1f} words, rejected {self.rejected:.1f}, difference "
            f"{self.difference:+.1f}{spread}; chosen is longer in {100 * self.longer:.0f} % and "
            f"shorter in {100 * self.shorter:.0f} % of the pairs"
        )


# Texts that nearly stand in another list

SHORT, CANDIDATES, THRESHOLD = 8, 20, 0.5
_ANY_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class NearDuplicate:
    """``others[other]`` nearly is ``held_out[held_out]``; ``similarity`` is in [threshold, 1]."""

    held_out: int
    other: int
    similarity: float


@dataclass(frozen=True)
class DistinctSplits:
    """Splits without near-duplicates of the more protected ones, and how many rows each lost by
    that."""

    splits: dict[str, list[dict[str, Any]]]
    dropped: dict[str, int]


def similarity(one: str, other: str) -> float:
    """How much of two texts is the same, in [0, 1]: 1 for the same words in the same order.

    It is the Jaccard similarity of their word 3-grams: shared 3-grams / all 3-grams of the two. Of
    texts with fewer than ``SHORT`` words the sets of words are compared. Case, punctuation and
    spacing do not count: ``similarity("How hot is iron?", "how hot is IRON")`` is 1.0. Texts
    without any word are alike only if they are equal.
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
        PairsError: the extra "retrieval" is not installed, and there are more than ``CANDIDATES``.
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


def drop_near_duplicates(
    splits: Mapping[str, Sequence[Mapping[str, Any]]],
    *texts: Callable[[Mapping[str, Any]], str],
    threshold: float = THRESHOLD,
) -> DistinctSplits:
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
    return DistinctSplits(done, dropped)


def _key(text: str) -> tuple[str, ...]:
    """The words of a text; of one without any, the text itself."""
    return tuple(_ANY_WORD.findall(unicodedata.normalize("NFKC", text).casefold())) or (
        text.strip(),
    )


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
    check_extra("retrieval", f"Looking for near-duplicates of {len(kept)} texts", PairsError)
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
