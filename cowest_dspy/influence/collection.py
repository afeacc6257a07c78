"""collect(): drafts of every example and their influence, within limits; it stops when too many
drafts fail. collect_again(): what failed, once more.

No thread waits for another: a step of an example that is done says what is next. A draft is refined
when it is there, whatever the others do; equal drafts are refined once. Drafts are made in one
pool, what the strong model is asked and what a metric says in another.
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import dspy

from cowest_dspy.errors import CollectionError
from cowest_dspy.influence.config import MAX_ERRORS
from cowest_dspy.influence.metric import Attempt, Metric, attempt, attempt_score
from cowest_dspy.influence.report import failure_kind, format_kinds, remedy
from cowest_dspy.influence.trace import FIRST_DRAFTS, KIND, Sampling, Trace, Traces
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.program.embedded import as_collaboration
from cowest_dspy.program.examples import Examples, prepare_examples
from cowest_dspy.store.call_context import Call, keeping, sampling, stoppable
from cowest_dspy.store.pool import OnProgress, results_in_order
from cowest_dspy.store.record import call_failed
from cowest_dspy.store.store import Store
from cowest_dspy.store.usage import total_usd
from cowest_dspy.utils.progress_bars import progress_bar
from cowest_dspy.utils.settings import read_settings

ENOUGH_TO_JUDGE = 20
"""Drafts that must be done before a collection is stopped because too many failed."""
TOGETHER, SECONDS = 200, 1.0
"""Traces are committed so many together, or so often. A crash in between loses none: they are made
again from kept answers."""
MOST_WEAK_THREADS = 256


def collect(
    program: dspy.Module,
    examples: Examples,
    metric: Metric,
    sampling: Sampling | Mapping[str, Any] | None = None,
    *,
    store: Store | None = None,
    num_threads: int = 8,
    weak_threads: int | None = None,
    answers: int = 1,
    draft_metric: Metric | None = None,
    max_errors: float | Tally = MAX_ERRORS,
    on_progress: OnProgress | None = None,
    display_progress: bool | None = None,
) -> Traces:
    """Samples drafts for every example and measures the influence of each; traces in the order of
    examples and drafts.

    N examples with n drafts cost N*(n+1) answers of the strong model, less what ``saved`` of the
    result says: equal drafts are refined once, and an adaptive sampling (:class:`Sampling`) stops
    at enough drafts. With ``answers`` = m it is m times that.

    Args:
        program: bound to its LMs (:meth:`Collaboration.bind`); or a module with one bound
            Collaboration in it, whose influence is measured on what the module returns.
        examples: ``dspy.Example``, dictionaries, or a ``datasets.Dataset``. Inputs that are not
            marked are the fields that the program's signatures take, and an ``id`` that is missing
            is made from the fields (:func:`~cowest_dspy.program.examples.prepare_examples`).
        metric: any DSPy metric with values in [0, 1]. A draft that has the fields of an answer is
            scored with it too.
        sampling: number of drafts, temperature, seed, or a dictionary of these. Drafts of one
            request differ by their seed.
        store: where calls and traces are kept and found again; the traces of this round replace
            those of an earlier collection. The result is then read from it when it is iterated
            over, so that memory does not grow with the number of traces. Without it, calls are kept
            where the caller keeps them (``keeping``), and traces in memory.
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
        display_progress: whether to show a bar, as in ``dspy.Evaluate``. None: in a terminal and in
            a notebook, unless there is ``on_progress``.

    Raises:
        ProgramError: the program is not bound.
        DataError: an example lacks an input that the program needs; nothing was asked.
        CollectionError: more than ``max_errors`` of the drafts failed (calls and traces are kept),
            or several answers were asked for of a strong model that does not sample.
        BudgetError: the budget of the store is used up; calls and traces are kept, and a larger one
            goes on.
    """
    program = as_collaboration(program)
    rules = read_settings(sampling, Sampling, "sampling")
    plan = Plan(program, metric, rules, answers, draft_metric)
    _check(plan)
    examples = prepare_examples(examples, program)
    threads = (num_threads, weak_threads)
    tally = max_errors if isinstance(max_errors, Tally) else Tally(max_errors)
    with progress_bar("Collecting drafts", display_progress, instead=on_progress) as draw:
        shown = [one for one in (on_progress, draw) if one]
        if store is None:
            made: list[Trace] = []
            _roll(plan, examples, made.extend, None, threads, tally, shown)
            return Traces(made, _saved(made, plan))
        with _Writer(store, plan) as writer:
            _roll(plan, examples, writer.add, store, threads, tally, shown)
    return Traces.load(store, round=plan.sampling.round, types=program.output_types)


def with_failed_calls(traces: Iterable[Trace]) -> set[str]:
    """The ids of examples of which a call got no answer, with one of their drafts at least."""
    return {trace.example_id for trace in traces if call_failed(trace.error)}


def collect_again(
    program: Collaboration,
    examples: Examples,
    metric: Metric,
    sampling: Sampling | Mapping[str, Any] | None = None,
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
    plan = Plan(program, metric, read_settings(sampling, Sampling, "sampling"), answers)
    _check(plan)
    examples = prepare_examples(examples, program)
    number, ids = plan.sampling.round, {example.id for example in examples}
    kept = Traces.load(store, round=number, types=program.output_types)
    before = [trace for trace in kept if trace.example_id in ids]
    made: list[Trace] = []
    threads = (num_threads, weak_threads)
    shown = [on_progress] if on_progress else []
    _roll(plan, examples, made.extend, store, threads, Tally(1.0), shown)
    store.keep_all(KIND, {trace.key: trace.to_dict() for trace in made})
    saved = Counter(store.record("saved", str(number)) or {})
    saved.subtract(_saved(before, plan))
    saved.update(_saved(made, plan))
    store.keep("saved", str(number), dict(saved))
    return Traces.load(store, round=number, types=program.output_types)


def _saved(traces: Iterable[Trace], plan: Plan) -> dict[str, int]:
    """What whole examples did not need: drafts that were not sampled, answers that were not
    asked."""
    drafts: dict[str, list[str]] = {}
    for trace in traces:
        drafts.setdefault(trace.example_id, []).append(trace.draft)
    most = plan.sampling.drafts
    # A draft that failed is none that equals another.
    asked = [len({text for text in texts if text}) + texts.count("") for texts in drafts.values()]
    return {
        "weak_calls": sum(most - len(texts) for texts in drafts.values()),
        "strong_calls": sum(most - one for one in asked) * plan.answers,
    }


def _roll(
    plan: Plan,
    examples: Sequence[dspy.Example],
    add: Callable[[list[Trace]], None],
    store: Store | None,
    threads: tuple[int, int | None],
    tally: Tally,
    on_progress: Iterable[OnProgress],
) -> None:
    """Rolls out every example and adds its traces, in their order."""
    many = threads[1] or min(threads[0] * plan.sampling.drafts, MOST_WEAK_THREADS)
    # DSPy's trace and history would hold every call of the run.
    with (
        nullcontext() if store is None else keeping(store),
        dspy.context(trace=None, disable_history=True),
        Rollouts(plan, threads[0], many) as rollouts,
        stoppable(),
    ):
        ahead = max(4 * threads[0], many, 16)
        promised = results_in_order(rollouts.start, examples, ahead=ahead)
        for done, traces in enumerate(promised, start=1):
            add(traces)
            for show in on_progress:
                show(done, len(examples))
            tally.add(traces, last=done == len(examples))


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
            "be one and the same. Give the strong model a temperature above 0, or set answers = 1."
        )


class _Writer:
    """Puts the traces of a round into the store in the place of earlier ones, several in one
    transaction."""

    def __init__(self, store: Store, plan: Plan) -> None:
        self._store, self._plan, self._round = store, plan, plan.sampling.round
        self._waiting: list[Trace] = []
        self._saved = Counter(weak_calls=0, strong_calls=0)
        self._since = time.monotonic()

    def __enter__(self) -> _Writer:
        self._store.forget(KIND, start=f"{self._round}/")
        return self

    def __exit__(self, *error: object) -> None:
        self._flush()
        self._store.keep("saved", str(self._round), dict(self._saved))

    def add(self, traces: list[Trace]) -> None:
        """Take the traces of one example."""
        self._waiting.extend(traces)
        self._saved.update(_saved(traces, self._plan))
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

    def add(self, traces: Sequence[Trace], *, last: bool) -> None:
        """Count the traces of an example; ``last``: there are no more.

        Raises:
            CollectionError: too many failed.
        """
        for trace in traces:
            if trace.error:
                self.first = self.first or trace.error
                self.kinds[failure_kind(trace.error)] += 1
        self.done += len(traces)
        self.check(last=last)

    def plus(self, others: Iterable[Tally]) -> Tally:
        """The sum of this one and others."""
        total = replace(self, kinds=self.kinds.copy())
        for other in others:
            total.done += other.done
            total.first = total.first or other.first
            total.kinds.update(other.kinds)
        return total

    def check(self, *, last: bool) -> None:
        """Raise CollectionError when too many failed."""
        failed = self.kinds.total()
        if failed > self.most * self.done and (last or self.done >= ENOUGH_TO_JUDGE):
            (kind, _), *_ = self.kinds.most_common(1)
            mend = remedy(kind)
            raise CollectionError(
                f"{failed} of {self.done} drafts failed ({format_kinds(self.kinds)}), more than "
                f"max_errors = {self.most}. {mend[:1].upper()}{mend[1:]} and run again, "
                "or raise max_errors; what a store has is not asked again. The first: "
                f"{self.first}"
            )


# One example


@dataclass(frozen=True)
class Plan:
    """What is done with every example."""

    program: Collaboration
    metric: Metric
    sampling: Sampling
    answers: int = 1
    draft_metric: Metric | None = None

    @cached_property
    def models(self) -> tuple[str, str]:
        """The ids of the weak and the strong model."""
        return self.program.weak.model, self.program.strong.model

    @cached_property
    def answer_fields(self) -> frozenset[str]:
        """What a draft must have to be an answer; nothing where none is one."""
        return frozenset(self.program.answer_fields)

    def ask(
        self, step: Callable[[], dspy.Prediction], example: dspy.Example, number: int
    ) -> Attempt:
        """The strong model's answer of that number to an example, and its score."""
        settings = self.sampling.answer_settings(example.id, number)
        with sampling(**settings) if settings else nullcontext():
            made = attempt(step)
        if made.outputs is None:
            return made
        return replace(attempt_score(self.metric, example, made.outputs), calls=made.calls)

    def draft_score(self, example: dspy.Example, draft: dict[str, Any]) -> float | None:
        """What a draft scores as an answer; None where it holds none, or where the metric
        failed."""
        metric = self.draft_metric
        if metric is None and self.answer_fields and self.answer_fields <= draft.keys():
            metric = self.metric
        return None if metric is None else attempt_score(metric, example, draft).score


class Rollouts:
    """Two pools of threads and the examples that are under way in them. Use as a context manager.

    Args:
        threads: what the strong model is asked at once, at most.
        weak_threads: drafts under way at once, at most.
    """

    def __init__(self, plan: Plan, threads: int, weak_threads: int) -> None:
        self.plan = plan
        self.strong = ThreadPoolExecutor(threads, "cowest-strong")
        self.weak = ThreadPoolExecutor(weak_threads, "cowest-weak")
        self._lock = threading.Lock()
        self._under_way: set[Rollout] = set()
        self._broken: BaseException | None = None

    def __enter__(self) -> Rollouts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        if error is not None:
            self.break_off(error)
        for pool in (self.weak, self.strong):
            pool.shutdown(wait=True, cancel_futures=True)

    def start(self, example: dspy.Example) -> Future[list[Trace]]:
        """Starts an example, under the caller's context."""
        rollout = Rollout(self, example)
        with self._lock:
            self._under_way.add(rollout)
        rollout.start()
        return rollout.done

    def finished(self, rollout: Rollout) -> None:
        """Forgets an example that is done."""
        with self._lock:
            self._under_way.discard(rollout)

    @property
    def broken(self) -> bool:
        """Whether something went wrong that is no failure of a model: nothing more is started."""
        return self._broken is not None

    def break_off(self, error: BaseException) -> None:
        """Ends everything under way with this error, so that nobody waits for what will not
        come."""
        with self._lock:
            self._broken, rollouts = self._broken or error, list(self._under_way)
        for rollout in rollouts:
            with suppress(InvalidStateError):
                rollout.done.set_exception(error)


class Rollout:
    """One example under way; ``done`` promises its traces."""

    def __init__(self, pools: Rollouts, example: dspy.Example) -> None:
        self.done: Future[list[Trace]] = Future()
        self._pools, self._plan, self._example = pools, pools.plan, example
        self._inputs = dict(example.inputs().items())
        self._lock, self._open = threading.Lock(), 0
        self._drafts: dict[int, Attempt] = {}
        self._refined: dict[str, dict[int, Attempt]] = {}
        self._draft_scores: dict[str, float | None] = {}
        self._alone: dict[int, Attempt] = {}
        self._context = contextvars.copy_context()

    def start(self) -> None:
        """Asks the strong model alone, and samples the first drafts."""
        rules = self._plan.sampling
        with self._lock:
            for number in range(self._plan.answers):
                self._do(self._pools.strong, lambda number=number: self._answer_alone(number))
            for index in range(min(FIRST_DRAFTS, rules.drafts) if rules.adaptive else rules.drafts):
                self._do(self._pools.weak, lambda index=index: self._draft(index))

    def _do(self, pool: ThreadPoolExecutor, step: Callable[[], None]) -> None:
        """Starts a step. Once something is broken, nothing is: the pools take no more work."""
        if not self._pools.broken:
            self._open += 1
            pool.submit(self._context.copy().run, self._run, step)

    def _run(self, step: Callable[[], None]) -> None:
        if self._pools.broken:
            return
        try:
            step()
            with self._lock:
                self._open -= 1
                made = self._next() if self._open == 0 else None
            if made is not None:
                self._pools.finished(self)
                with suppress(InvalidStateError):
                    self.done.set_result(made)
        except BaseException as error:
            self._pools.break_off(error)

    def _next(self) -> list[Trace] | None:
        """When nothing is under way: another draft, or what there is."""
        rules = self._plan.sampling
        traces = [self._trace(index) for index in range(len(self._drafts))]
        hopeless = any(answer.error for answer in self._alone.values())
        if len(traces) < rules.drafts and not hopeless and not rules.enough(traces):
            index = len(traces)
            self._do(self._pools.weak, lambda: self._draft(index))
            return None
        return traces

    # Steps

    def _draft(self, index: int) -> None:
        settings = self._plan.sampling.draft_settings(self._example.id, index)
        with sampling(**settings):
            made = attempt(lambda: self._plan.program.ask_draft(**self._inputs))
        with self._lock:
            self._drafts[index] = made
            if made.outputs is None or made.outputs["draft"] in self._refined:
                return
            self._refined[made.outputs["draft"]] = {}
            for number in range(self._plan.answers):
                self._do(
                    self._pools.strong,
                    lambda number=number: self._refine(made.outputs or {}, number),
                )

    def _refine(self, draft: dict[str, Any], number: int) -> None:
        plan, text = self._plan, draft["draft"]
        answer = plan.ask(
            lambda: plan.program.ask_refine(text, **self._inputs), self._example, number
        )
        if number == 0:
            self._draft_scores[text] = plan.draft_score(self._example, draft)
        with self._lock:
            self._refined[text][number] = answer

    def _answer_alone(self, number: int) -> None:
        plan = self._plan
        answer = plan.ask(lambda: plan.program.ask_alone(**self._inputs), self._example, number)
        with self._lock:
            self._alone[number] = answer

    # The traces

    def _trace(self, index: int) -> Trace:
        plan, example, drafted = self._plan, self._example, self._drafts[index]
        text = drafted.outputs["draft"] if drafted.outputs else ""
        answers = self._refined[text] if drafted.outputs else {}
        refined, alone = _Mean(answers), _Mean(self._alone)
        answered = (("refine", refined.error), ("alone", alone.error))
        error = drafted.error or next((f"{step} {why}" for step, why in answered if why), None)
        last = drafted.calls[-1] if drafted.calls else None
        strong = [call for answer in answers.values() for call in answer.calls]
        return Trace(
            example_id=example.id,
            draft_index=index,
            round=plan.sampling.round,
            inputs=self._inputs,
            gold={key: value for key, value in example.labels().items() if key != "id"},
            prompt=last.messages if last else (),
            completion=last.text if last else "",
            draft=text,
            refined=refined.outputs,
            alone=alone.outputs,
            refined_score=refined.score,
            alone_score=alone.score,
            influence=None
            if error or refined.score is None or alone.score is None
            else refined.score - alone.score,
            draft_score=self._draft_scores.get(text),
            weak_model=plan.models[0],
            strong_model=plan.models[1],
            tokens=_tokens(drafted.calls, strong),
            error=error,
            feedback=refined.feedback,
            usd=total_usd(call.usd for call in [*drafted.calls, *strong]),
            refined_scores=refined.scores,
            alone_scores=alone.scores,
            refined_parts=refined.parts,
            alone_parts=alone.parts,
            requests={
                name: calls[-1].request
                for name, calls in (
                    ("draft", drafted.calls),
                    ("alone", alone.calls),
                    ("refine", refined.calls),
                )
                if calls
            },
        )


class _Mean:
    """Several answers to one prompt as one: the first, and the mean of their scores. One that
    failed fails the whole: a mean of what is left would leave out the hard ones."""

    def __init__(self, answers: dict[int, Attempt]) -> None:
        ordered = [answers[number] for number in sorted(answers)]
        self.error = next((answer.error for answer in ordered if answer.error), None)
        scores = [answer.score for answer in ordered if answer.score is not None]
        self.scores = () if self.error else tuple(scores)
        self.score = sum(self.scores) / len(self.scores) if self.scores else None
        names = ordered[0].parts if ordered and not self.error else {}
        self.parts = {
            name: sum(one.parts[name] for one in ordered) / len(ordered) for name in names
        }
        self.outputs = ordered[0].outputs if ordered else None
        self.feedback = ordered[0].feedback if ordered else ""
        self.calls = ordered[0].calls if ordered else ()


def _tokens(weak: tuple[Call, ...], strong: list[Call]) -> dict[str, int]:
    return {
        "weak_in": sum(call.input_tokens for call in weak),
        "weak_out": sum(call.output_tokens for call in weak),
        "strong_in": sum(call.input_tokens for call in strong),
        "strong_out": sum(call.output_tokens for call in strong),
    }
