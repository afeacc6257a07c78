"""Which drafts may become a preference: filters over drafts and pairs of drafts, and the measures
of text that they use (length in words, nearly equal texts, an answer that is said verbatim)."""

from __future__ import annotations

import itertools
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import dspy

from cowest_dspy.errors import PairsError, nearest
from cowest_dspy.influence.report import failure_kind, remedy
from cowest_dspy.influence.trace import Trace
from cowest_dspy.program.examples import inputs_key
from cowest_dspy.utils.notebook import format_plural

# Scores are floats: 0.7 - 0.2 is a little less than 0.5, and meets a margin of 0.5 all the same.
ROUNDING = 1e-9
EVERY_FAILED, ONLY_ONE = "every draft failed", "only one draft"
NO_CHANGE = "drafts that changed nothing"
_FAILED = "drafts that failed ("

log = logging.getLogger(__name__)


@dataclass
class PairFilters:
    """What becomes a preference pair (see :func:`~cowest_dspy.pairs.preference_pairs`). Counts in
    ``dropped``, by reason, what does not.

    Raises:
        PairsError: a value out of range.
    """

    margin: float = 0.5
    near: float = 0.95
    leak: str | None = None
    length_ratio: float | None = None
    held_out: Iterable[dspy.Example] = ()
    dropped: Counter[str] = field(default_factory=Counter[str])

    def __post_init__(self) -> None:
        if not 0 < self.margin <= 2:
            raise PairsError(
                f"margin is {self.margin}: it must be above 0 (a tie is no preference) and at "
                "most 2."
            )
        if not 0 < self.near <= 1:
            raise PairsError(
                f"near is {self.near}: it must be above 0 and at most 1, where only equal texts "
                "are dropped."
            )
        if self.length_ratio is not None and self.length_ratio < 1:
            raise PairsError(
                f"length_ratio is {self.length_ratio}: it must be at least 1, the longer text by "
                "the shorter one."
            )
        self._held_out = {
            inputs_key(dict(example.inputs().items())): str(example.get("id", "?"))
            for example in self.held_out
        }

    def group_by_example(self, traces: Iterable[Trace]) -> Iterator[list[Trace]]:
        """The drafts of each example in the order of sampling; one example at a time is in memory.

        Raises:
            PairsError: the drafts of an example do not stand together; or, after the last example,
                some have the inputs of held-out ones.
        """
        finished: set[tuple[int, str]] = set()
        overlap: list[str] = []
        for key, drafts in itertools.groupby(traces, key=lambda one: (one.round, one.example_id)):
            if key in finished:
                raise PairsError(
                    f'The drafts of example "{key[1]}" (round {key[0]}) do not stand together in '
                    "the traces, which are read as a stream. Sort them first: sorted(traces, "
                    "key=lambda trace: (trace.round, trace.example_id))."
                )
            finished.add(key)
            together = sorted(drafts, key=lambda trace: trace.draft_index)
            if self._held_out:
                same = self._held_out.get(inputs_key(together[0].inputs))
                overlap += [] if same is None else [f"{key[1]} (held out as {same})"]
            yield together
        if overlap:
            raise PairsError(
                f"{len(overlap)} examples have the inputs of held-out ones: "
                f"{', '.join(overlap[:5])}{', ...' if len(overlap) > 5 else ''}. What is tested "
                "must not be trained on: drop one of the two."
            )

    def usable(self, drafts: Sequence[Trace]) -> list[Trace]:
        """Drafts with an influence, each text once; best first, equally good ones in the order of
        sampling."""
        kept: dict[str, Trace] = {}
        for trace in drafts:
            text = " ".join(trace.completion.split())
            if trace.error is not None or trace.influence is None:
                self.dropped[f"{_FAILED}{failure_kind(trace.error or 'no score')})"] += 1
            elif not text:
                self.dropped["drafts without any text"] += 1
            elif text in kept:
                self.dropped["drafts equal to another"] += 1
            else:
                kept[text] = trace
        return sorted(kept.values(), key=lambda trace: (-influence_of(trace), trace.draft_index))

    def without_leaks(self, drafts: Sequence[Trace]) -> list[Trace]:
        """The drafts that do not say the gold answer, where ``leak`` names its field.

        Raises:
            PairsError: an example without that field.
        """
        if self.leak is None:
            return list(drafts)
        kept = [
            trace
            for trace in drafts
            if not any(says(trace.completion, answer) for answer in _answers(trace, self.leak))
        ]
        if len(kept) < len(drafts):
            self.dropped["drafts that say the answer (never chosen)"] += len(drafts) - len(kept)
        return kept

    def objection(self, chosen: Trace, rejected: Trace) -> str | None:
        """Why two drafts of which one did better are no pair all the same; None if they are one."""
        if chosen.prompt != rejected.prompt:
            return "drafts of different prompts"
        if near(chosen.completion, rejected.completion, self.near):
            return "nearly equal texts"
        if self.length_ratio is not None:
            short, long = sorted(word_count(one.completion) for one in (chosen, rejected))
            if long > self.length_ratio * short:
                return "lengths that differ by more than length_ratio"
        return None


def influence_of(trace: Trace) -> float:
    """The influence of a draft that has one."""
    return trace.influence or 0.0


def _answers(trace: Trace, name: str) -> list[str]:
    """The gold answers in a field: one, or several that are accepted."""
    if name not in trace.gold:
        raise PairsError(
            f'leak names the field "{name}", which example "{trace.example_id}" does not '
            f"have.{nearest(name, trace.gold)} It has {sorted(trace.gold)}."
        )
    value: Any = trace.gold[name]
    values = value if isinstance(value, list | tuple | set) else [value]
    return [str(answer) for answer in values if answer is not None]


def advice(dropped: Mapping[str, int], more: str) -> str:
    """What to try when there are too few pairs, the cause first: what mends the failures that cost
    most drafts, before ``more``, the advice to sample more, where more was lost by failures than
    otherwise. ``dropped``: counts by reason."""
    failed = {
        name[len(_FAILED) : -1]: count
        for name, count in dropped.items()
        if name.startswith(_FAILED)
    }
    if not failed:
        return more
    by_failure = (f"examples: {EVERY_FAILED}", f"examples: {ONLY_ONE}")
    otherwise = sum(
        count
        for name, count in dropped.items()
        if name.startswith(("examples: ", NO_CHANGE)) and name not in by_failure
    )
    kind = max(failed, key=lambda one: failed[one])
    mend = f"{format_plural(failed[kind], 'draft')} failed ({kind}): {remedy(kind)}."
    return f"{mend} {more}" if sum(failed.values()) >= otherwise else f"{more} {mend}"


# Texts

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
