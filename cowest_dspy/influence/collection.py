"""collect(): drafts of every example and their influence, within limits; it stops when too many
drafts fail. collect_again(): what failed, once more. noise_floor(): the strong model, asked twice.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import dspy

from cowest_dspy.errors import CollectionError
from cowest_dspy.influence.config import MAX_ERRORS
from cowest_dspy.influence.metric import Metric
from cowest_dspy.influence.report import NoiseFloor, failure_kind, format_kinds, remedy
from cowest_dspy.influence.rollout import Plan, Rolled, Rollouts, ask_and_score
from cowest_dspy.influence.trace import KIND, Sampling, Trace, Traces
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.program.examples import check_inputs
from cowest_dspy.store.call_context import keeping, stoppable
from cowest_dspy.store.pool import OnProgress, map_in_threads, results_in_order
from cowest_dspy.store.record import call_failed
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
    on_progress: OnProgress | None = None,
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
        weak_threads: drafts under way at once, at most; by default ``num_threads`` times the drafts
            of an example, up to 256.
        answers: how often the strong model is asked, with and without a draft, when it samples; the
            scores are averaged.
        draft_metric: scores drafts instead of ``metric``, whatever their format; it gets the
            drafter's outputs and ``draft``.
        max_errors: the largest share of drafts that may fail, in [0, 1], as [collect] max_errors:
            a share, not a count. It is looked at from 20 drafts on, and at the end. A
            :class:`Tally` is shared with other collections.
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
    threads = (num_threads, weak_threads)
    tally = max_errors if isinstance(max_errors, Tally) else Tally(max_errors)
    if store is None:
        rolled: list[Rolled] = []
        _roll(plan, examples, rolled.append, None, threads, tally, on_progress)
        return Traces([trace for one in rolled for trace in one.traces], _sum_saved(rolled))
    with _Writer(store, plan.sampling.round) as writer:
        _roll(plan, examples, writer.add, store, threads, tally, on_progress)
    return Traces.load(store, round=plan.sampling.round, types=program.output_types)


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
    on_progress: OnProgress | None = None,
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
    kept = Traces.load(store, round=number, types=program.output_types)
    before = [trace for trace in kept if trace.example_id in ids]
    rolled: list[Rolled] = []
    threads = (num_threads, weak_threads)
    _roll(plan, examples, rolled.append, store, threads, Tally(1.0), on_progress)
    store.keep_all(KIND, {trace.key: trace.to_dict() for one in rolled for trace in one.traces})
    saved, old, new = (
        store.record("saved", str(number)) or {},
        _saved(before, plan),
        _sum_saved(rolled),
    )
    counts = {name: saved.get(name, 0) - old[name] + new[name] for name in new}
    store.keep("saved", str(number), counts)
    return Traces.load(store, round=number, types=program.output_types)


def _sum_saved(rolled: Iterable[Rolled]) -> dict[str, int]:
    counts = {"weak_calls": 0, "strong_calls": 0}
    for one in rolled:
        counts["weak_calls"] += one.weak_saved
        counts["strong_calls"] += one.strong_saved
    return counts


def _saved(traces: Iterable[Trace], plan: Plan) -> dict[str, int]:
    """``saved`` of stored traces: drafts that were not sampled, answers that were not asked."""
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
    add: Callable[[Rolled], None],
    ledger: Store | None,
    threads: tuple[int, int | None],
    tally: Tally,
    on_progress: OnProgress | None,
) -> None:
    """Rolls out every example and adds it, in their order."""
    many, ahead = under_way(threads[0], plan.sampling.drafts, threads[1])
    # DSPy's trace and history would hold every call of the run.
    with (
        keeping(ledger),
        dspy.context(trace=None, disable_history=True),
        Rollouts(plan, threads[0], many) as rollouts,
        stoppable(),
    ):
        promised = results_in_order(rollouts.start, examples, ahead=ahead)
        for done, rolled in enumerate(promised, start=1):
            add(rolled)
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


class _Writer:
    """Puts the traces of a round into the store in the place of earlier ones, several in one
    transaction."""

    def __init__(self, store: Store, number: int) -> None:
        self._store, self._round = store, number
        self._waiting: list[Trace] = []
        self._saved = _sum_saved([])
        self._since = time.monotonic()

    def __enter__(self) -> _Writer:
        self._store.forget(KIND, start=f"{self._round}/")
        return self

    def __exit__(self, *error: object) -> None:
        self._flush()
        self._store.keep("saved", str(self._round), self._saved)

    def add(self, rolled: Rolled) -> None:
        """Take the traces of one example."""
        self._waiting.extend(rolled.traces)
        self._saved["weak_calls"] += rolled.weak_saved
        self._saved["strong_calls"] += rolled.strong_saved
        if len(self._waiting) >= TOGETHER or time.monotonic() - self._since > SECONDS:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._store.keep_all(KIND, {trace.key: trace.to_dict() for trace in self._waiting})
        self._waiting, self._since = [], time.monotonic()


@dataclass
class Tally:
    """Drafts that are done, and those that failed by kind. ``most`` is the largest share that may
    fail."""

    most: float
    done: int = 0
    first: str = ""
    kinds: Counter[str] = field(default_factory=Counter[str])
    remedies: dict[str, str] = field(default_factory=dict[str, str])

    def add(self, traces: Sequence[Trace], *, last: bool) -> None:
        """Count the traces of an example; ``last``: there are no more.

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
        total = replace(self, kinds=self.kinds.copy(), remedies=dict(self.remedies))
        for other in others:
            total.done += other.done
            total.first = total.first or other.first
            total.kinds.update(other.kinds)
            total.remedies = {**other.remedies, **total.remedies}
        return total

    def check(self, *, last: bool) -> None:
        """Raise CollectionError when too many failed."""
        failed = self.kinds.total()
        if failed > self.most * self.done and (last or self.done >= ENOUGH_TO_JUDGE):
            (kind, _), *_ = self.kinds.most_common(1)
            mend = self.remedies[kind]
            raise CollectionError(
                f"{failed} of {self.done} drafts failed ({format_kinds(self.kinds)}), more than "
                f"[collect] max_errors = {self.most}. {mend[:1].upper()}{mend[1:]} and run again, "
                "or raise max_errors; what a store has is not asked again. The first: "
                f"{self.first}"
            )


def _remedy(trace: Trace, kind: str) -> str:
    """What to do about a draft that failed; of one that was cut off it is known whose limit it
    was."""
    if "truncated" not in kind:
        return remedy(kind)
    if trace.draft:
        return "raise [strong] max_tokens"
    return (
        "raise [weak] max_tokens, or fine-tune the weak model longer ([sft.settings] "
        "num_train_epochs), "
        "until its drafts come to an end"
    )


def noise_floor(
    program: Collaboration,
    examples: Sequence[dspy.Example],
    metric: Metric,
    rules: Sampling | None = None,
    *,
    store: Store | None = None,
    num_threads: int = 8,
    on_progress: OnProgress | None = None,
) -> NoiseFloor | None:
    """Asks the strong model alone twice for each example, as :func:`collect` does and again with
    another seed.

    The first answer is the one that collecting asked for, so that a store has it: the floor costs
    one strong call per example. Examples of which an answer failed are left out. A strong model of
    temperature 0 is not asked: what it says does not change.

    Returns:
        the floor, or None where every example failed.
    """
    if program.strong.kwargs.get("temperature") == 0:
        return NoiseFloor(0, 0, 0.0, 0.0)
    seeds = rules or Sampling()

    def one(example: dspy.Example) -> list[float]:
        ask = lambda: program.ask_alone(**example.inputs())  # noqa: E731
        made = [
            ask_and_score(ask, example, metric, seeds, number).scored.score for number in (0, 1)
        ]
        return [score for score in made if score is not None]

    with keeping(store):
        return NoiseFloor.of(
            map_in_threads(one, examples, num_threads=num_threads, on_progress=on_progress)
        )
