"""One example: its drafts, their refinements, the strong model alone, the scores. Each step starts
as soon as it can.

No thread waits for another: a step that is done says what is next. A draft is refined when it is
there, whatever the others do; equal drafts are refined once. Drafts are made in one pool, what the
strong model is asked and what a metric says in another.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import dspy

from cowest_dspy.influence.metric import Attempt, Metric, Scored, attempt, scored
from cowest_dspy.influence.trace import Sampling, Trace
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.store.call_context import Call, sampling
from cowest_dspy.store.usage import total_usd

FIRST_DRAFTS = 2
"""Of an adaptive collection: with fewer there is no pair."""
HOPELESS = 0.25
"""A smaller chance that a draft still to come differs in influence is not sampled for."""


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
        """What a draft must have to be an answer."""
        return frozenset(self.program.answer_fields)


@dataclass(frozen=True)
class Rolled:
    """The traces of one example, and the steps that it did not need: drafts that were not sampled,
    answers that were not asked."""

    traces: list[Trace]
    weak_saved: int
    strong_saved: int


@dataclass(frozen=True)
class Answered:
    """One answer of the strong model and its score, and what the draft itself scores."""

    made: Attempt
    scored: Scored
    draft_score: float | None = None

    @property
    def error(self) -> str | None:
        """Why there is no score."""
        return self.made.error or self.scored.error


def ask_and_score(
    step: Callable[[], dspy.Prediction],
    example: dspy.Example,
    metric: Metric,
    rules: Sampling,
    number: int,
) -> Answered:
    """The strong model's answer of that number to an example, and its score."""
    settings = rules.answer_settings(example.id, number)
    with sampling(**settings) if settings else nullcontext():
        made = attempt(step)
    return Answered(
        made, Scored(None) if made.outputs is None else scored(metric, example, made.outputs)
    )


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

    def start(self, example: dspy.Example) -> Future[Rolled]:
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
        self.done: Future[Rolled] = Future()
        self._pools, self._plan, self._example = pools, pools.plan, example
        self._inputs = dict(example.inputs().items())
        self._lock, self._open = threading.Lock(), 0
        self._drafts: dict[int, Attempt] = {}
        self._refined: dict[str, dict[int, Answered]] = {}
        self._alone: dict[int, Answered] = {}
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

    def _next(self) -> Rolled | None:
        """When nothing is under way: another draft, or what there is."""
        rules = self._plan.sampling
        traces = [self._trace(index) for index in range(len(self._drafts))]
        hopeless = any(answer.error for answer in self._alone.values())
        if len(traces) < rules.drafts and not hopeless and not enough(traces, rules):
            index = len(traces)
            self._do(self._pools.weak, lambda: self._draft(index))
            return None
        asked = len(self._refined) + sum(made.outputs is None for made in self._drafts.values())
        return Rolled(
            traces, rules.drafts - len(traces), (rules.drafts - asked) * self._plan.answers
        )

    # Steps

    def _draft(self, index: int) -> None:
        settings = self._plan.sampling.draft_settings(self._example.id, index)
        with sampling(**settings):
            made = attempt(lambda: self._plan.program.draft_outputs(**self._inputs))
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
        answer = self._ask(
            lambda: self._plan.program.refined(draft["draft"], **self._inputs), number
        )
        if number == 0:
            answer = Answered(answer.made, answer.scored, self._draft_score(draft))
        with self._lock:
            self._refined[draft["draft"]][number] = answer

    def _answer_alone(self, number: int) -> None:
        answer = self._ask(lambda: self._plan.program.ask_alone(**self._inputs), number)
        with self._lock:
            self._alone[number] = answer

    def _ask(self, step: Callable[[], dspy.Prediction], number: int) -> Answered:
        return ask_and_score(step, self._example, self._plan.metric, self._plan.sampling, number)

    def _draft_score(self, draft: dict[str, Any]) -> float | None:
        """What the draft scores as an answer; None where it holds none, or where the metric
        failed."""
        plan = self._plan
        if plan.draft_metric is not None:
            return scored(plan.draft_metric, self._example, draft).score
        return (
            scored(plan.metric, self._example, draft).score
            if plan.answer_fields <= draft.keys()
            else None
        )

    # The traces

    def _trace(self, index: int) -> Trace:
        plan, example, drafted = self._plan, self._example, self._drafts[index]
        text = drafted.outputs["draft"] if drafted.outputs else ""
        answers = self._refined[text] if drafted.outputs else {}
        refined, alone = _Mean(answers), _Mean(self._alone)
        error = drafted.error or refined.error or (f"alone {alone.error}" if alone.error else None)
        whole = error is None and refined.score is not None and alone.score is not None
        last = drafted.calls[-1] if drafted.calls else None
        strong = [call for answer in answers.values() for call in answer.made.calls]
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
            influence=refined.score - alone.score
            if whole and refined.score is not None and alone.score is not None
            else None,
            draft_score=answers[0].draft_score if answers else None,
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
        )


class _Mean:
    """Several answers to one prompt as one: the first, and the mean of their scores. One that
    failed fails the whole: a mean of what is left would leave out the hard ones."""

    def __init__(self, answers: dict[int, Answered]) -> None:
        ordered = [answers[number] for number in sorted(answers)]
        self.error = next((answer.error for answer in ordered if answer.error), None)
        scores = [answer.scored.score for answer in ordered if answer.scored.score is not None]
        self.scores = () if self.error else tuple(scores)
        self.score = sum(self.scores) / len(self.scores) if self.scores else None
        names = ordered[0].scored.parts if ordered and not self.error else {}
        self.parts = {
            name: sum(one.scored.parts[name] for one in ordered) / len(ordered) for name in names
        }
        self.outputs = ordered[0].made.outputs if ordered else None
        self.feedback = ordered[0].scored.feedback if ordered else ""


def enough(made: Sequence[Trace], sampling: Sampling) -> bool:
    """Whether to sample no more drafts of an example after these.

    There is a pair when one draft that did not hurt is better than another text by the margin.
    There will hardly be one when all drafts so far had the same influence, and the chance of
    another one in what is left is below ``HOPELESS``.
    """
    left = sampling.drafts - len(made)
    scored = [trace for trace in made if trace.influence is not None]
    if any(_apart(better, worse, sampling.margin) for better in scored for worse in scored):
        return True
    if not scored:
        return left == 0
    same = len({trace.influence for trace in scored}) == 1
    return left == 0 or (same and chance_of_another(len(scored), left) < HOPELESS)


def chance_of_another(same: int, left: int) -> float:
    """The chance that one of ``left`` draws differs, after ``same`` draws that were all alike: 1 -
    (same + 1) / (same + left + 1).

    Laplace's rule of succession: with every rate of "alike" equally likely beforehand, the next
    draw is alike with probability (same + 1) / (same + 2), and the product over ``left`` draws
    telescopes (Laplace, Essai philosophique sur les probabilites, 1814; Jaynes, Probability Theory,
    2003, chapter 18).
    """
    return 1 - (same + 1) / (same + left + 1)


def _apart(better: Trace, worse: Trace, margin: float) -> bool:
    high, low = better.influence or 0.0, worse.influence or 0.0
    return (
        high >= 0
        and high - low >= margin
        and " ".join(better.completion.split()) != " ".join(worse.completion.split())
    )


def _tokens(weak: tuple[Call, ...], strong: list[Call]) -> dict[str, int]:
    return {
        "weak_in": sum(call.input_tokens for call in weak),
        "weak_out": sum(call.output_tokens for call in weak),
        "strong_in": sum(call.input_tokens for call in strong),
        "strong_out": sum(call.output_tokens for call in strong),
    }
