"""Which drafts become preferences: pairs of one example by one of three strategies, or single
drafts by whether they helped; and the filters that both pass."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from cowest_dspy.errors import PairsError, nearest
from cowest_dspy.influence.report import failure_kind
from cowest_dspy.influence.trace import Trace
from cowest_dspy.pairs.dataset import (
    EQUAL,
    EVERY_FAILED,
    FAILED,
    NO_CHANGE,
    ONLY_ONE,
    Messages,
    Pair,
    PreferencePairs,
    UnpairedPreference,
    UnpairedPreferences,
)
from cowest_dspy.pairs.texts import near, says, word_count
from cowest_dspy.program.adapters import escape
from cowest_dspy.program.examples import Examples, inputs_key, mark_inputs
from cowest_dspy.utils.hiding import Hiding

# Scores are floats: 0.7 - 0.2 is a little less than 0.5, and meets a margin of 0.5 all the same.
ROUNDING = 1e-9

Strategy = Literal["ranked", "paper", "all"]
# Pairs of (chosen, rejected), of which the first that no filter has anything against is taken.
Alternatives = Sequence[tuple[Trace, Trace]]


def preference_pairs(
    traces: Iterable[Trace],
    *,
    strategy: Strategy = "ranked",
    margin: float = 0.5,
    per_example: int | None = None,
    near: float = 0.95,
    leak: str | None = None,
    length_ratio: float | None = None,
    held_out: Examples = (),
    run: str = "",
) -> PreferencePairs:
    """Pairs of drafts of one example, the chosen one with the larger influence, which is never
    below 0.

    Args:
        traces: read once, as a stream, in which the drafts of an example stand together (as
            ``collect`` gives them).
        strategy: "ranked": the best draft against the worst, the second worst, ..., each rejected
            once; where several are equally good, they take turns. "paper": every draft that helped
            against every one that did not (arXiv 2504.15188). "all": every two drafts, where the
            better one did not hurt. The last two begin with the largest differences.
        margin: smallest difference of influence, above 0 and at most 2.
        per_example: pairs of one example, at most; None: one for "ranked", no limit for the others,
            of which n drafts give up to n * (n - 1) / 2.
        near: texts of at least this similarity, in (0, 1], are no pair: DPO on such pairs can make
            even the chosen text less likely (Pal et al., 2024, arXiv 2402.13228). Similarity is
            counted in words and marks, and texts with different numbers are always different (see
            ``texts.near``). 1 drops only texts that are equal but for case and spacing.
        leak: a gold field; a draft that says what stands in it, verbatim, is never chosen. For
            tasks in which that is cheating. The field must hold an answer's text, not the letter of
            an option.
        length_ratio: drops pairs of which one text has more than so many times the words of the
            other.
        held_out: examples or rows that are tested on, none of which may be among the traces.
        run: the run's name, for the pairs' lineage.

    Ties are broken by the order in which drafts were sampled, so that equal traces give equal
    pairs.

    Raises:
        PairsError: a value out of range, an unknown strategy, a field that is not there, an example
            that is held out, or drafts of an example that do not stand together.
    """
    _check_strategy(strategy, per_example)
    filters = PairFilters(margin, near, leak, length_ratio, held_out)
    limit = 1 if per_example is None and strategy == "ranked" else per_example
    pairs: list[Pair] = []
    hiding = _hiding(traces)
    for drafts in filters.group_by_example(traces):
        made = _pairs_of_example(filters, drafts, strategy, limit)
        pairs.extend(_pair(chosen, rejected, run) for chosen, rejected in made)
        if made and hiding:
            hiding.note(drafts[0].example_id, drafts[0].inputs)
    rules = {"strategy": strategy, "margin": margin, "per_example": limit}
    rules |= {"near": near, "leak": leak, "length_ratio": length_ratio}
    return PreferencePairs(tuple(pairs), dict(sorted(filters.dropped.items())), rules, hiding)


def _check_strategy(strategy: str, per_example: int | None) -> None:
    if strategy not in _STRATEGIES:
        raise PairsError(
            f'There is no strategy "{strategy}".{nearest(strategy, _STRATEGIES)} Known: '
            f"{', '.join(_STRATEGIES)}."
        )
    if per_example is not None and per_example < 1:
        raise PairsError(
            f"per_example is {per_example}: at least one pair of an example is needed, or None "
            "for the default."
        )


def _hiding(traces: Iterable[Trace]) -> Hiding | None:
    """The inputs that a view does not show, where the traces' run hides some."""
    names = getattr(traces, "hide", ())
    return Hiding(names) if names else None


def _pairs_of_example(
    filters: PairFilters, drafts: Sequence[Trace], strategy: Strategy, limit: int | None
) -> list[tuple[Trace, Trace]]:
    """The pairs of one example; an example without any is counted with the reason."""
    ranked = filters.usable(drafts)
    choosable = filters.without_leaks([trace for trace in ranked if influence_of(trace) >= 0])
    made: list[tuple[Trace, Trace]] = []
    refused: list[str] = []
    for alternatives in _STRATEGIES[strategy](ranked, choosable, filters.margin - ROUNDING):
        if len(made) == limit:
            break
        objections = [filters.objection(*pair) for pair in alternatives]
        if None in objections:
            made.append(alternatives[objections.index(None)])
        else:
            refused.append(str(objections[0]))
    filters.dropped.update(f"pairs: {reason}" for reason in refused)
    if not made:
        filters.dropped[f"examples: {_why_none(ranked, choosable, refused, strategy)}"] += 1
    return made


def _why_none(
    ranked: Sequence[Trace], choosable: Sequence[Trace], refused: Sequence[str], strategy: Strategy
) -> str:
    if not ranked:
        return EVERY_FAILED
    if len(ranked) == 1:
        return ONLY_ONE
    best, worst = influence_of(ranked[0]), influence_of(ranked[-1])
    if best == worst:
        return "all drafts had the same influence"
    if best < 0:
        return "the best draft hurt"
    if refused:
        return refused[0]
    if not choosable or influence_of(choosable[0]) < best:
        return "the best drafts say the answer"
    if strategy == "paper" and not best > 0 >= worst:
        return "no draft helped" if best <= 0 else "every draft helped"
    return "the difference is below the margin"


def _ranked(
    ranked: Sequence[Trace], choosable: Sequence[Trace], margin: float
) -> Iterator[Alternatives]:
    if not choosable:
        return
    top = [trace for trace in choosable if trace.influence == choosable[0].influence]
    worst = [
        trace for trace in reversed(ranked) if influence_of(top[0]) - influence_of(trace) >= margin
    ]
    for place, rejected in enumerate(worst):
        turn = place % len(top)
        yield [(chosen, rejected) for chosen in [*top[turn:], *top[:turn]]]


def _paper(
    ranked: Sequence[Trace], choosable: Sequence[Trace], margin: float
) -> Iterator[Alternatives]:
    helped = [trace for trace in choosable if influence_of(trace) > 0]
    return _every([trace for trace in ranked if influence_of(trace) <= 0], helped, margin)


def _every(
    ranked: Sequence[Trace], choosable: Sequence[Trace], margin: float
) -> Iterator[Alternatives]:
    pairs = [
        (one, other)
        for one in choosable
        for other in ranked
        if influence_of(one) - influence_of(other) >= margin
    ]
    pairs.sort(
        key=lambda pair: (
            influence_of(pair[1]) - influence_of(pair[0]),
            pair[0].draft_index,
            pair[1].draft_index,
        )
    )
    return ([pair] for pair in pairs)


_STRATEGIES: dict[
    str, Callable[[Sequence[Trace], Sequence[Trace], float], Iterator[Alternatives]]
] = {
    "ranked": _ranked,
    "paper": _paper,
    "all": _every,
}


def _pair(chosen: Trace, rejected: Trace, run: str) -> Pair:
    return Pair(
        prompt=cast(Messages, chosen.prompt),
        chosen=({"role": "assistant", "content": escape(chosen.completion)},),
        rejected=({"role": "assistant", "content": escape(rejected.completion)},),
        example_id=chosen.example_id,
        chosen_index=chosen.draft_index,
        rejected_index=rejected.draft_index,
        chosen_influence=chosen.influence,
        rejected_influence=rejected.influence,
        weak_model=chosen.weak_model,
        strong_model=chosen.strong_model,
        round=chosen.round,
        chosen_score=chosen.refined_score,
        rejected_score=rejected.refined_score,
        alone_score=chosen.alone_score,
        run=run,
    )


def unpaired_preferences(
    traces: Iterable[Trace],
    *,
    same: bool | None = None,
    leak: str | None = None,
    held_out: Examples = (),
    run: str = "",
) -> UnpairedPreferences:
    """Every usable draft with its label: True for an influence above 0, False below 0.

    Args:
        traces: read once, as a stream, in which the drafts of an example stand together.
        same: the label of drafts that changed nothing; None drops them, False is the paper's (not
            above 0 is rejected).
        leak: as for :func:`~cowest_dspy.pairs.preference_pairs`: a draft that says the answer is
            never labelled True.
        held_out: as there, examples none of which may be among the traces.
        run: the run's name, for the drafts' lineage.

    Raises:
        PairsError: as for :func:`~cowest_dspy.pairs.preference_pairs`.
    """
    filters = PairFilters(leak=leak, held_out=held_out)
    made: list[UnpairedPreference] = []
    hiding = _hiding(traces)
    for drafts in filters.group_by_example(traces):
        if hiding:
            hiding.note(drafts[0].example_id, drafts[0].inputs)
        labels = {trace.draft_index: _label(trace, same) for trace in filters.usable(drafts)}
        if without := sum(label is None for label in labels.values()):
            filters.dropped[NO_CHANGE] += without
        good = filters.without_leaks([one for one in drafts if labels.get(one.draft_index)])
        kept = {trace.draft_index for trace in good}
        kept |= {index for index, label in labels.items() if label is False}
        made.extend(
            _unpaired(trace, bool(labels[trace.draft_index]), run)
            for trace in drafts
            if trace.draft_index in kept
        )
    return UnpairedPreferences(tuple(made), dict(sorted(filters.dropped.items())), hiding=hiding)


def _label(trace: Trace, same: bool | None) -> bool | None:
    return same if trace.influence == 0 else influence_of(trace) > 0


def _unpaired(trace: Trace, label: bool, run: str) -> UnpairedPreference:
    return UnpairedPreference(
        prompt=cast(Messages, trace.prompt),
        completion=({"role": "assistant", "content": escape(trace.completion)},),
        label=label,
        example_id=trace.example_id,
        draft_index=trace.draft_index,
        influence=influence_of(trace),
        score=trace.refined_score,
        alone_score=trace.alone_score,
        weak_model=trace.weak_model,
        strong_model=trace.strong_model,
        round=trace.round,
        run=run,
    )


# Filters


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
    held_out: Examples = ()
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
        self._held_out: dict[str, str] | None = None

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
            if (same := self._find_held_out(together[0].inputs)) is not None:
                overlap.append(f"{key[1]} (held out as {same})")
            yield together
        if overlap:
            raise PairsError(
                f"{len(overlap)} examples have the inputs of held-out ones: "
                f"{', '.join(overlap[:5])}{', ...' if len(overlap) > 5 else ''}. What is tested "
                "must not be trained on: drop one of the two."
            )

    def _find_held_out(self, inputs: Mapping[str, Any]) -> str | None:
        """The id of the held-out example that has these inputs; None where there is none."""
        if self._held_out is None:
            marked = (mark_inputs(one, inputs, "held_out") for one in self.held_out)
            self._held_out = {
                inputs_key(dict(one.inputs().items())): str(one.get("id", "?")) for one in marked
            }
        return self._held_out.get(inputs_key(inputs)) if self._held_out else None

    def usable(self, drafts: Sequence[Trace]) -> list[Trace]:
        """Drafts with an influence, each text once; best first, equally good ones in the order of
        sampling."""
        kept: dict[str, Trace] = {}
        for trace in drafts:
            text = " ".join(trace.completion.split())
            if trace.error is not None or trace.influence is None:
                self.dropped[f"{FAILED}{failure_kind(trace.error or 'no score')})"] += 1
            elif not text:
                self.dropped["drafts without any text"] += 1
            elif text in kept:
                self.dropped[EQUAL] += 1
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
