"""What may become a pair: drafts with an influence, that do not leak the answer, of examples that
are not tested on."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dspy

from cowest_dspy.errors import PairsError, nearest
from cowest_dspy.influence.report import failure_kind
from cowest_dspy.influence.trace import Trace
from cowest_dspy.pairs.texts import near, says, word_count
from cowest_dspy.program.examples import inputs_key

# Scores are floats: 0.7 - 0.2 is a little less than 0.5, and meets a margin of 0.5 all the same.
ROUNDING = 1e-9
EVERY_FAILED, ONLY_ONE = "every draft failed", "only one draft"
NO_CHANGE = "drafts that changed nothing"
_FAILED = "drafts that failed ("


def failed_kinds(dropped: Mapping[str, int]) -> dict[str, int]:
    """Drafts that failed, by kind, of what was dropped.

    >>> failed_kinds({"drafts that failed (timeout)": 3, "drafts equal to another": 1})
    {'timeout': 3}
    """
    return {
        name[len(_FAILED) : -1]: count
        for name, count in dropped.items()
        if name.startswith(_FAILED)
    }


def lost_otherwise(dropped: Mapping[str, int]) -> int:
    """Examples without a pair for another reason than that drafts failed, and drafts without a
    label: they changed nothing."""
    by_failure = (f"examples: {EVERY_FAILED}", f"examples: {ONLY_ONE}")
    counted = ("examples: ", NO_CHANGE)
    return sum(
        count
        for name, count in dropped.items()
        if name.startswith(counted) and name not in by_failure
    )


@dataclass(frozen=True)
class Rules:
    """What the gate lets through; see :func:`~cowest_dspy.pairs.preference_pairs`.

    Raises:
        PairsError: a value out of range.
    """

    margin: float
    near: float
    leak: str | None
    length_ratio: float | None

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


class Gate:
    """Judges drafts and pairs of drafts, and counts in ``dropped`` what it does not let through."""

    def __init__(self, rules: Rules, held_out: Iterable[dspy.Example] = ()) -> None:
        self.rules = rules
        self.dropped: Counter[str] = Counter()
        self._held_out = {
            inputs_key(dict(example.inputs().items())): str(example.get("id", "?"))
            for example in held_out
        }
        self._overlap: list[str] = []

    def examples(self, traces: Iterable[Trace]) -> Iterator[list[Trace]]:
        """The drafts of each example in the order of sampling; one example at a time is in memory.

        Raises:
            PairsError: the drafts of an example do not stand together; or, after the last example,
                some have the inputs of held-out ones.
        """
        finished: set[tuple[int, str]] = set()
        for key, drafts in itertools.groupby(
            traces, key=lambda trace: (trace.round, trace.example_id)
        ):
            if key in finished:
                raise PairsError(
                    f'The drafts of example "{key[1]}" (round {key[0]}) do not stand together in '
                    "the traces, which are read as a "
                    "stream. Sort them first: sorted(traces, key=lambda trace: (trace.round, "
                    "trace.example_id))."
                )
            finished.add(key)
            together = sorted(drafts, key=lambda trace: trace.draft_index)
            self._note_overlap(together[0])
            yield together
        if self._overlap:
            raise PairsError(
                f"{len(self._overlap)} examples have the inputs of held-out ones: "
                f"{', '.join(self._overlap[:5])}"
                f"{', ...' if len(self._overlap) > 5 else ''}. What is tested must not be trained "
                "on: drop one of the two."
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

    def honest(self, drafts: Sequence[Trace]) -> list[Trace]:
        """The drafts that do not say the gold answer, where that is cheating; all of them where it
        is not.

        Raises:
            PairsError: an example without the field that ``leak`` names.
        """
        field = self.rules.leak
        if field is None:
            return list(drafts)
        kept = [
            trace
            for trace in drafts
            if not any(says(trace.completion, answer) for answer in _answers(trace, field))
        ]
        if len(kept) < len(drafts):
            self.dropped["drafts that say the answer (never chosen)"] += len(drafts) - len(kept)
        return kept

    def objection(self, chosen: Trace, rejected: Trace) -> str | None:
        """Why two drafts, one of which did better, are no pair all the same; None if they are
        one."""
        if chosen.prompt != rejected.prompt:
            return "drafts of different prompts"
        if near(chosen.completion, rejected.completion, self.rules.near):
            return "nearly equal texts"
        ratio = self.rules.length_ratio
        if ratio is not None:
            short, long = sorted((word_count(chosen.completion), word_count(rejected.completion)))
            if long > ratio * short:
                return "lengths that differ by more than length_ratio"
        return None

    def _note_overlap(self, trace: Trace) -> None:
        if not self._held_out:
            return
        same = self._held_out.get(inputs_key(trace.inputs))
        if same is not None:
            self._overlap.append(f"{trace.example_id} (held out as {same})")


def influence_of(trace: Trace) -> float:
    """The influence of a draft that has one."""
    return trace.influence or 0.0


def _answers(trace: Trace, field: str) -> list[str]:
    """The gold answers in a field: one, or several that are accepted."""
    if field not in trace.gold:
        raise PairsError(
            f'leak names the field "{field}", which example "{trace.example_id}" does not '
            f"have.{nearest(field, trace.gold)} It has "
            f"{sorted(trace.gold)}."
        )
    value: Any = trace.gold[field]
    values = value if isinstance(value, list | tuple | set) else [value]
    return [str(answer) for answer in values if answer is not None]
