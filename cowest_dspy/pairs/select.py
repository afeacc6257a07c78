"""Which drafts become preferences: pairs of one example by one of three strategies, or single
drafts by whether they helped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import dspy

from cowest_dspy.errors import PairsError, nearest
from cowest_dspy.influence.trace import Trace
from cowest_dspy.pairs.dataset import PreferencePairs, UnpairedPreferences
from cowest_dspy.pairs.filters import (
    EVERY_FAILED,
    NO_CHANGE,
    ONLY_ONE,
    ROUNDING,
    PairFilters,
    influence_of,
)
from cowest_dspy.pairs.formats import Pair, UnpairedPreference
from cowest_dspy.program.adapters import escape
from cowest_dspy.utils.hiding import Hiding

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
    held_out: Iterable[dspy.Example] = (),
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
            ``filters.near``). 1 drops only texts that are equal but for case and spacing.
        leak: a gold field; a draft that says what stands in it, verbatim, is never chosen. For
            tasks in which that is cheating. The field must hold an answer's text, not the letter of
            an option.
        length_ratio: drops pairs of which one text has more than so many times the words of the
            other.
        held_out: examples that are tested on, none of which may be among the traces.
        run: the run's name, for the pairs' lineage.

    Ties are broken by the order in which drafts were sampled, so that equal traces give equal
    pairs.

    Raises:
        PairsError: a value out of range, an unknown strategy, a field that is not there, an example
            that is held out, or drafts of an example that do not stand together.
    """
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


def _hiding(traces: Iterable[Trace]) -> Hiding | None:
    """Of inputs that a view does not show, where the traces' run hides some."""
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
        prompt=chosen.prompt,
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
    held_out: Iterable[dspy.Example] = (),
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
        prompt=trace.prompt,
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
