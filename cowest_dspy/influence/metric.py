"""Influence: how much a draft changed the strong model's answer for the better, against the strong
model alone.

    influence = score(refine) - score(alone)        in [-1, 1]; above 0 the draft helped

``Influence(metric, program)`` is a DSPy metric: it works in ``dspy.Evaluate`` and in any optimiser.
A failure is not a score: a timeout, an answer that cannot be parsed or one that was cut off has no
influence, and is counted as failed.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import dspy

from cowest_dspy.errors import DataError
from cowest_dspy.influence.report import InfluenceReport, failure_kind
from cowest_dspy.program.collaboration import (
    FAILED_CALL,
    outputs_of,
    sanitize_draft,
)
from cowest_dspy.program.embedded import as_collaboration
from cowest_dspy.program.examples import Examples, check_inputs, prepare_examples
from cowest_dspy.store.call_context import Call, listening
from cowest_dspy.store.pool import map_in_threads
from cowest_dspy.store.record import EXPECTED_FAILURES, count_unusable, failure, failure_in
from cowest_dspy.utils.progress_bars import progress_bar

Metric = Callable[..., Any]


def metric_name(metric: Metric) -> str:
    """A metric's name for people: a function's own, otherwise that of its type."""
    return getattr(metric, "__name__", type(metric).__name__)


@dataclass(frozen=True)
class Attempt:
    """One step of a program: its outputs, and the calls that it made; where it was scored, its
    ``score`` in [0, 1], higher is better, with the metric's words beside it. ``error`` says why
    there are no outputs, or no score. ``parts`` are the scores that the score is made of, where it
    is made of several."""

    outputs: dict[str, Any] | None
    error: str | None = None
    calls: tuple[Call, ...] = ()
    score: float | None = None
    feedback: str = ""
    parts: dict[str, float] = field(default_factory=dict)


def attempt(step: Callable[[], dspy.Prediction]) -> Attempt:
    """Runs one step of a program. An expected failure (of the LM, its connection, parsing, a
    refused or cut-off answer) becomes its error; anything else is a bug in the program and is
    raised."""
    with listening(counted=True) as calls:
        try:
            prediction = step()
        except EXPECTED_FAILURES as error:
            made = Attempt(None, failure(error), tuple(calls))
        else:
            made = Attempt(outputs_of(prediction), None, tuple(calls))
    # What was refused or cut off may also fail to parse: the cause is named, not what followed from
    # it.
    if unfinished := failure_in(calls):
        made = Attempt(None, unfinished, made.calls)
    if made.error:
        count_unusable(failure_kind(made.error))
    return made


def score_of(metric: Metric, example: dspy.Example, outputs: Mapping[str, Any]) -> float:
    """E(answer): the metric's value for these outputs, in [0, 1].

    A metric may return a number, a bool, or ``dspy.Prediction(score=..., feedback=...)``. It is
    called as in an evaluation, ``trace=None``.

    Raises:
        DataError: the metric's value is not in [0, 1].
        Exception: what the metric raises.
    """
    return evaluate(metric, example, dspy.Prediction(**outputs))[0]


def evaluate(
    metric: Metric, example: dspy.Example, prediction: Any
) -> tuple[float, str, dict[str, float]]:
    """The score, the feedback and the parts that a metric gives (:func:`score_of`)."""
    given = metric(example, prediction, trace=None)
    score = float(given)
    if not 0.0 <= score <= 1.0:
        raise DataError(
            f"The metric gave {score} for example {example.get('id', '?')}: scores are between 0 "
            "and 1, higher is better."
        )
    beside = given if isinstance(given, dspy.Prediction) else {}
    return score, str(beside.get("feedback") or ""), dict(beside.get("parts") or {})


def attempt_score(metric: Metric, example: dspy.Example, outputs: Mapping[str, Any]) -> Attempt:
    """E(answer), where the metric itself may ask a model: an expected failure of it is a failure
    here, and never a score. ``calls`` are the metric's own.

    Raises:
        DataError: the metric's value is not in [0, 1].
    """
    given = dict(outputs)
    with listening(counted=True) as calls:
        try:
            score, feedback, parts = evaluate(metric, example, dspy.Prediction(**given))
        except EXPECTED_FAILURES as error:
            return Attempt(given, f"judge {failure(error)}", tuple(calls))
    return Attempt(given, None, tuple(calls), score, feedback, parts)


class Influence:
    """A DSPy metric: the score of a collaboration's prediction less the score of the strong model
    alone.

    Args:
        metric: any DSPy metric with values in [0, 1], higher is better; also a Judge, a
            GoldLikelihood or several, Weighted.
        program: a bound :class:`Collaboration`, or a module with one in it, which is measured by
            what it returns; its ``alone`` is asked once per example, however many drafts there
            are, and whatever an optimiser makes of the program that it optimises.

    ``influence(example, prediction)`` is in [-1, 1]. Where an optimiser looks for demonstrations,
    as BootstrapFewShot and MIPROv2 do (``trace`` is given), it is whether the draft helped, since
    -1.0 is true; BootstrapFinetune, which gives no trace, needs ``lambda example, prediction,
    trace=None: influence(example, prediction) > 0``. Where an optimiser asks for words, as GEPA
    does (``pred_name`` is given), it is a ``dspy.Prediction(score, feedback)``: what the draft
    changed, and what the metric said of it.

    Raises, when called:
        DataError: the strong model alone failed on the example, so that there is nothing to compare
            with; the example lacks an input that the program needs; or the prediction comes of a
            call that was cut off or refused. ``dspy.Evaluate`` logs it and gives the example its
            ``failure_score``, which is 0.0 by default: ``failure_score=math.nan`` makes a mean that
            has failures in it no number. :meth:`report` leaves failures out and counts them by
            kind.
    """

    # As a function has one: what logs a metric, such as MLflow's autolog, calls it by its name.
    __name__ = "influence"

    def __init__(self, metric: Metric, program: dspy.Module) -> None:
        self.metric, self.program = metric, as_collaboration(program)
        self._alone: dict[str, _Evaluated] = {}
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Influence({metric_name(self.metric)}, {self.program!r})"

    def __call__(
        self,
        example: dspy.Example,
        prediction: Any,
        trace: Any = None,
        pred_name: Any = None,
        pred_trace: Any = None,
    ) -> float | bool | dspy.Prediction:
        """Compute the influence of a prediction's draft (see above)."""
        explained = self.explain(example, prediction)
        if pred_name is not None:
            return explained
        return explained.score if trace is None else explained.score > 0

    def explain(self, example: dspy.Example, prediction: Any) -> dspy.Prediction:
        """``score``, the influence, and ``feedback``: what the draft changed in words."""
        if failed := getattr(prediction, FAILED_CALL, None):
            raise DataError(
                f"The collaboration failed on example {example.get('id', '?')} ({failed}): no "
                "influence. A failure is not a score: "
                "Influence.report(examples) counts failures apart; dspy.Evaluate takes "
                "failure_score=math.nan and max_errors."
            )
        refined = self._evaluate(example, dict(prediction.items()))
        alone = self._ask_alone(example)
        words = self._describe_change(refined, alone)
        return dspy.Prediction(score=refined.score - alone.score, feedback=words)

    def alone_score(self, example: dspy.Example) -> float:
        """The score of the strong model alone, computed at the first question for this example and
        kept."""
        return self._ask_alone(example).score

    def report(
        self, examples: Examples, *, num_threads: int = 8, display_progress: bool | None = None
    ) -> InfluenceReport:
        """The influence of the program's own drafts on these examples, failures counted apart.

        Args:
            examples: examples, dictionaries or a ``datasets.Dataset``, as :func:`collect` takes
                them.
            num_threads: examples under way at once, at most.
            display_progress: whether to show a bar, as in ``dspy.Evaluate``. None: in a terminal
                and in a notebook.

        Raises:
            DataError: an example lacks an input that the program needs; nothing was asked.
        """
        examples = prepare_examples(examples, self.program)
        with progress_bar("Measuring influence", display_progress) as draw:
            measured = map_in_threads(
                self._one, examples, num_threads=num_threads, on_progress=draw
            )
        failures = Counter(failure_kind(error) for _, error in measured if error)
        return InfluenceReport(tuple(value for value, _ in measured), failures=dict(failures))

    def _evaluate(self, example: dspy.Example, outputs: dict[str, Any]) -> _Evaluated:
        score, feedback, _ = evaluate(self.metric, example, dspy.Prediction(**outputs))
        return _Evaluated(outputs, score, feedback)

    def _ask_alone(self, example: dspy.Example) -> _Evaluated:
        key = repr(sorted(example.toDict().items(), key=lambda item: item[0]))
        with self._lock:
            if key in self._alone:
                return self._alone[key]
        check_inputs(self.program, [example])
        made = attempt(lambda: self.program.ask_alone(**example.inputs()))
        if made.outputs is None:
            raise _AloneFailed(example, made.error or "")
        answered = self._evaluate(example, made.outputs)
        with self._lock:
            return self._alone.setdefault(key, answered)

    def _describe_change(self, refined: _Evaluated, alone: _Evaluated) -> str:
        named = self.program.answer_fields or [one for one in refined.outputs if one != "draft"]
        field = named[-1]
        one, other = (
            sanitize_draft(str(answered.outputs.get(field, ""))) for answered in (alone, refined)
        )
        before, after = alone.score, refined.score
        change = f'"{one}" (score {before:.2f}) to "{other}" (score {after:.2f})'
        if after > before:
            words = (
                f"The draft helped: it changed the strong model's answer from {change}. Keep "
                "what made the difference."
            )
        elif after < before:
            words = (
                f"The draft hurt: it changed the strong model's answer from {change}. It "
                "misled a model that did better alone."
            )
        elif one == other:
            words = (
                f'The draft changed nothing: with and without it the answer is "{one}" (score '
                f"{before:.2f})."
            )
        else:
            words = f"The draft changed the answer but not its score: from {change}."
        if after == before and after < 1:
            words += " It lacks what the strong model does not know."
        return f"{words}\n{refined.feedback}" if refined.feedback else words

    def _one(self, example: dspy.Example) -> tuple[float | None, str | None]:
        """The influence on one example, or the error that left it without one."""
        inputs = example.inputs()
        drafted = attempt(lambda: self.program.ask_draft(**inputs))
        if drafted.outputs is None:
            return None, drafted.error
        text = drafted.outputs["draft"]
        refined = attempt(lambda: self.program.ask_refine(text, **inputs))
        if refined.outputs is not None:
            refined = attempt_score(self.metric, example, refined.outputs)
        if refined.score is None:
            return None, f"refine {refined.error}"
        try:
            return refined.score - self.alone_score(example), None
        except _AloneFailed as error:
            return None, f"alone {error.failure}"
        except EXPECTED_FAILURES as error:
            return None, f"alone judge {failure(error)}"


class _AloneFailed(DataError):
    """The strong model alone has no answer to an example; ``failure`` says why, as ``"kind:
    text"``."""

    def __init__(self, example: dspy.Example, failure: str) -> None:
        super().__init__(
            f"The strong model alone failed on example {example.get('id', '?')} ({failure}): no "
            "influence."
        )
        self.failure = failure


@dataclass(frozen=True)
class _Evaluated:
    """An answer of the strong model, and what the metric gave for it."""

    outputs: dict[str, Any]
    score: float
    feedback: str
