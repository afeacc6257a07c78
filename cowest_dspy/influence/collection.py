"""collect(): every example, within its limits. It stops when too many drafts fail. collect_again():
what failed, once more."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType

import dspy

from cowest_dspy.errors import CollectionError
from cowest_dspy.influence.config import MAX_ERRORS
from cowest_dspy.influence.metric import Metric
from cowest_dspy.influence.report import failure_kind, format_kinds, remedy
from cowest_dspy.influence.rollout import Plan, Rolled, Rollouts
from cowest_dspy.influence.trace import KIND, Sampling, Trace, Traces
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.program.inputs import check_inputs
from cowest_dspy.store.pool import Progress, given_in_order
from cowest_dspy.store.rate_limit import stoppable
from cowest_dspy.store.record import call_failed, keeping
from cowest_dspy.store.store import Store

ENOUGH_TO_JUDGE = 20
"""Drafts that must be done before a collection is stopped because too many failed."""
TOGETHER, SECONDS = 200, 1.0
"""Traces are committed so many together, or so often. A crash in between loses none: they are made
again from kept answers."""
MOST_WEAK_THREADS = 256


def collect(
    program: Collaboration,
    examples: Sequence[dspy.Example],
    metric: Metric,
    sampling: Sampling | None = None,
    *,
    store: Store | None = None,
    num_threads: int = 8,
    weak_threads: int | None = None,
    answers: int = 1,
    draft_metric: Metric | None = None,
    max_errors: float | Tally = MAX_ERRORS,
    on_progress: Progress | None = None,
) -> Traces:
    """Samples drafts for every example and measures the influence of each; traces in the order of
    examples and drafts.

    N examples with n drafts cost N*(n+1) answers of the strong model, less what ``saved`` of the
    result says: equal drafts are refined once, and an adaptive sampling (:class:`Sampling`) stops
    at enough drafts. With ``answers`` = m it is m times that.

    Args:
        program: bound to its LMs (:meth:`Collaboration.bind`).
        metric: any DSPy metric with values in [0, 1]. A draft that has the fields of an answer is
            scored with it too.
        sampling: number of drafts, temperature, seed. Drafts of one request differ by their seed.
        store: where calls and traces are kept and found again; the traces of this round replace
            those of an earlier collection. The result is then read from it when it is iterated
            over, so that memory does not grow with the number of traces.
        num_threads: questions to the strong model (and metrics) under way at once, at most.
        weak_threads: drafts under way at once, at most; by default ``num_threads`` times the drafts of
            an example, up to 256.
        answers: how often the strong model is asked, with and without a draft, when it samples; the
            scores are averaged.
        draft_metric: scores drafts instead of ``metric``, whatever their format; it gets the
            drafter's outputs and ``draft``.
        max_errors: the largest share of drafts that may fail, in [0, 1], as [collect] max_errors; it
            is looked at from 20 drafts on, and at the end. A :class:`Tally` counts them elsewhere too.
        on_progress: called with (examples done, examples in all).

    Raises:
        ProgramError: the program is not bound.
        DataError: an example lacks an input that the program needs; nothing was asked.
        CollectionError: more than ``max_errors`` of the drafts failed (calls and traces are kept),
            or several answers were asked for of a strong model that does not sample.
        BudgetError: the budget of the store is used up; calls and traces are kept, and a larger one
            goes on.
    """
    plan = Plan(program, metric, sampling or Sampling(), answers, draft_metric)
    _check(plan)
    check_inputs(program, examples)
    keeper = _Keeper(store, plan)
    tally = max_errors if isinstance(max_errors, Tally) else Tally(max_errors)
    _roll(plan, examples, keeper, store, (num_threads, weak_threads), tally, on_progress)
    return keeper.traces()


def with_failed_calls(traces: Iterable[Trace]) -> set[str]:
    """The ids of examples of which a call got no answer, with one of their drafts at least."""
    return {trace.example_id for trace in traces if call_failed(trace.error)}


def collect_again(
    program: Collaboration,
    examples: Sequence[dspy.Example],
    metric: Metric,
    sampling: Sampling | None = None,
    *,
    store: Store,
    num_threads: int = 8,
    weak_threads: int | None = None,
    answers: int = 1,
    on_progress: Progress | None = None,
) -> Traces:
    """Collects some examples of a whole collection once more: calls that failed are made again,
    answers are kept. All traces of the collection, those of these examples replaced; arguments are
    those of :func:`collect`.

    Whatever ends it early leaves the collection as it was; what was answered is kept.

    Raises:
        ProgramError, CollectionError, BudgetError: as :func:`collect`, but however many drafts
        fail.
    """
    plan = Plan(program, metric, sampling or Sampling(), answers)
    _check(plan)
    number, ids = plan.sampling.round, {example.id for example in examples}
    before = [
        trace
        for trace in Traces.load(store, round=number, types=program.output_types)
        if trace.example_id in ids
    ]
    keeper = _Keeper(None, plan)
    _roll(plan, examples, keeper, store, (num_threads, weak_threads), Tally(1.0), on_progress)
    made, saved = keeper.traces(), store.record("saved", str(number)) or {}
    store.keep_all(KIND, {trace.key: trace.to_dict() for trace in made})
    old, new = _spared(before, plan), _spared(made, plan)
    store.keep(
        "saved", str(number), {name: saved.get(name, 0) - old[name] + new[name] for name in new}
    )
    return Traces.load(store, round=number, types=program.output_types)


def _spared(traces: Iterable[Trace], plan: Plan) -> dict[str, int]:
    """What ``saved`` says of these traces: drafts that were not sampled, answers that were not
    asked."""
    drafts: dict[str, list[str]] = {}
    for trace in traces:
        drafts.setdefault(trace.example_id, []).append(trace.draft)
    most = plan.sampling.drafts
    asked = [len({text for text in texts if text}) + texts.count("") for texts in drafts.values()]
    return {
        "weak_calls": sum(most - len(texts) for texts in drafts.values()),
        "strong_calls": sum(most - one for one in asked) * plan.answers,
    }


def _roll(
    plan: Plan,
    examples: Sequence[dspy.Example],
    keeper: _Keeper,
    ledger: Store | None,
    threads: tuple[int, int | None],
    tally: Tally,
    on_progress: Progress | None,
) -> None:
    """Gives the keeper the traces of every example, in their order."""
    many, ahead = under_way(threads[0], plan.sampling.drafts, threads[1])
    # DSPy's trace and history would hold every call of the run.
    with (
        keeper,
        keeping(ledger),
        dspy.context(trace=None, disable_history=True),
        Rollouts(plan, threads[0], many) as rollouts,
        stoppable(),
    ):
        for done, rolled in enumerate(
            given_in_order(rollouts.start, examples, ahead=ahead), start=1
        ):
            keeper.add(rolled)
            if on_progress:
                on_progress(done, len(examples))
            tally.add(rolled.traces, last=done == len(examples))


def under_way(threads: int, drafts: int, weak_threads: int | None = None) -> tuple[int, int]:
    """Of a collection: drafts under way at once, and examples that are begun before the first of
    them is done, at most."""
    many = weak_threads or min(threads * drafts, MOST_WEAK_THREADS)
    return many, max(4 * threads, many, 16)


def _check(plan: Plan) -> None:
    """Raises what can be known to be wrong before anything is asked."""
    _ = plan.models
    temperature = plan.program.strong.kwargs.get("temperature")
    if plan.answers < 1:
        raise CollectionError(f"answers is {plan.answers}: it must be 1 or more.")
    if plan.answers > 1 and temperature == 0:
        raise CollectionError(
            f"{plan.answers} answers were asked for, but {plan.program.strong.model} does not "
            "sample (temperature 0): they would "
            "be one and the same. Set [strong] temperature above 0, or [collect] answers = 1."
        )


class _Keeper:
    """Where traces go as they come: into the store, several in one transaction, or into a list."""

    def __init__(self, store: Store | None, plan: Plan) -> None:
        self._store, self._round, self._types = (
            store,
            plan.sampling.round,
            plan.program.output_types,
        )
        self._held: list[Trace] = []
        self._saved: dict[str, int] = {"weak_calls": 0, "strong_calls": 0}
        self._since = time.monotonic()

    def __enter__(self) -> _Keeper:
        if self._store:
            self._store.forget(KIND, start=f"{self._round}/")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._store:
            self._flush(self._store)
            self._store.keep("saved", str(self._round), self._saved)

    def add(self, rolled: Rolled) -> None:
        """Takes the traces of one example."""
        self._held.extend(rolled.traces)
        self._saved["weak_calls"] += rolled.weak_saved
        self._saved["strong_calls"] += rolled.strong_saved
        if self._store and (
            len(self._held) >= TOGETHER or time.monotonic() - self._since > SECONDS
        ):
            self._flush(self._store)

    def traces(self) -> Traces:
        """All of them."""
        if self._store:
            return Traces.load(self._store, round=self._round, types=self._types)
        return Traces(self._held, self._saved)

    def _flush(self, store: Store) -> None:
        if self._held:
            store.keep_all(KIND, {trace.key: trace.to_dict() for trace in self._held})
        self._held, self._since = [], time.monotonic()


@dataclass
class Tally:
    """Drafts that are done, and those that failed by kind. ``most`` is the largest part that may
    fail."""

    most: float
    done: int = 0
    first: str = ""
    kinds: Counter[str] = field(default_factory=Counter[str])
    remedies: dict[str, str] = field(default_factory=dict[str, str])

    def add(self, traces: Sequence[Trace], *, last: bool) -> None:
        """Counts the traces of an example; ``last``: there are no more.

        Raises:
            CollectionError: too many failed.
        """
        for trace in traces:
            if trace.error:
                self.first = self.first or trace.error
                kind = failure_kind(trace.error)
                self.kinds[kind] += 1
                self.remedies.setdefault(kind, _remedy(trace, kind))
        self.done += len(traces)
        self.check(last=last)

    def plus(self, others: Iterable[Tally]) -> Tally:
        """The sum of this one and others."""
        made = replace(self, kinds=self.kinds.copy(), remedies=dict(self.remedies))
        for other in others:
            made.done += other.done
            made.first = made.first or other.first
            made.kinds.update(other.kinds)
            made.remedies = {**other.remedies, **made.remedies}
        return made

    def check(self, *, last: bool) -> None:
        """Raises CollectionError when too many failed."""
        failed = self.kinds.total()
        if failed > self.most * self.done and (last or self.done >= ENOUGH_TO_JUDGE):
            (kind, _), *_ = self.kinds.most_common(1)
            raise CollectionError(
                f"{failed} of {self.done} drafts failed ({format_kinds(self.kinds)}), more than "
                "[collect] max_errors = "
                f"{self.most}. {_sentence(self.remedies[kind])} and run again, or raise "
                "max_errors; what a store has is not "
                f"asked again. The first: {self.first}"
            )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _remedy(trace: Trace, kind: str) -> str:
    """What to do about a draft that failed; of one that was cut off it is known whose limit it
    was."""
    if "truncated" not in kind:
        return remedy(kind)
    if trace.draft:
        return "raise [strong] max_tokens"
    return (
        "raise [weak] max_tokens, or fine-tune the weak model longer ([sft.settings] num_train_epochs), "
        "until its drafts come to an end"
    )
