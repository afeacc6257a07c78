"""Influence: how much a draft changed the strong model's answer for the better, against the strong model alone.

    influence = score(refine) - score(alone)        in [-1, 1]; above 0 the draft helped, below 0 it hurt

``Influence(metric, program)`` is a DSPy metric: it works in ``dspy.Evaluate`` and in any optimiser. A failure is not a score: a
timeout, an answer that cannot be parsed or one that was cut off has no influence, and is counted as failed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dspy

from cowest_dspy.errors import DataError
from cowest_dspy.intervals import Interval, bootstrap_mean_interval
from cowest_dspy.lms.recording import EXPECTED_FAILURES, Call, failure, listening
from cowest_dspy.program import Collaboration

Metric = Callable[..., Any]


@dataclass(frozen=True)
class Attempt:
    """One step of a program: its outputs, or why there are none; and the calls that it made."""

    outputs: dict[str, Any] | None
    error: str | None
    calls: tuple[Call, ...]

    @property
    def cut_off(self) -> bool:
        """Whether any of its calls ended because ``max_tokens`` was reached."""
        return any(call.finish_reason == "length" for call in self.calls)

    @property
    def refused(self) -> bool:
        """Whether a provider's filter, or the model itself, refused one of its calls."""
        return any(call.finish_reason == "content_filter" for call in self.calls)


def attempt(step: Callable[[], dspy.Prediction]) -> Attempt:
    """Runs one step of a program. An expected failure (of the LM, its connection, parsing, a refused or cut-off answer) becomes
    its error; anything else is a bug in the program and is raised."""
    with listening() as calls:
        try:
            prediction = step()
        except EXPECTED_FAILURES as error:
            made = Attempt(None, failure(error), tuple(calls))
        else:
            made = Attempt({key: value for key, value in prediction.items() if key != "logprobs"}, None, tuple(calls))
    # What was refused or cut off may also fail to parse: the cause is named, not what followed from it.
    if made.refused:
        return Attempt(None, "refusal: the provider or the model refused to answer", made.calls)
    if made.cut_off:
        return Attempt(None, "truncated: max_tokens was reached before the end", made.calls)
    return made


def score_of(metric: Metric, example: dspy.Example, outputs: Mapping[str, Any]) -> float:
    """E(answer): the metric's value for these outputs, in [0, 1].

    A metric may return a number, a bool, or ``dspy.Prediction(score=...)``. It is called as in an evaluation, ``trace=None``.

    Raises:
        DataError: the metric's value is not in [0, 1].
    """
    return in_range(metric(example, dspy.Prediction(**outputs), trace=None), example)


def in_range(given: Any, example: dspy.Example) -> float:
    """What a metric gave for an example, as a number.

    Raises:
        DataError: it is not in [0, 1].
    """
    value = float(given)
    if not 0.0 <= value <= 1.0:
        raise DataError(
            f"The metric gave {value} for example {example.get('id', '?')}: scores are between 0 and 1, higher is better."
        )
    return value


@dataclass(frozen=True)
class Scored:
    """What a metric said of an answer: a score in [0, 1] with words beside it, or why there is none; and the calls that it made
    (a judge's)."""

    score: float | None
    feedback: str = ""
    error: str | None = None
    calls: tuple[Call, ...] = ()


def scored(metric: Metric, example: dspy.Example, outputs: Mapping[str, Any]) -> Scored:
    """E(answer), where the metric itself may ask a model: an expected failure of it is a failure here, and never a score.

    A metric may return a number, a bool, or ``dspy.Prediction(score=..., feedback=...)``. It is called as in an evaluation.

    Raises:
        DataError: the metric's value is not in [0, 1].
    """
    with listening() as calls:
        try:
            given = metric(example, dspy.Prediction(**outputs), trace=None)
        except EXPECTED_FAILURES as error:
            return Scored(None, error=f"judge {failure(error)}", calls=tuple(calls))
    value = in_range(given, example)
    feedback = given.get("feedback") if isinstance(given, dspy.Prediction) else None
    return Scored(value, str(feedback or ""), calls=tuple(calls))


class Influence:
    """A DSPy metric: the score of a collaboration's prediction less the score of the strong model alone.

    Args:
        metric: any DSPy metric with values in [0, 1], higher is better.
        program: a bound :class:`Collaboration`; its ``alone`` is asked once per example, however many drafts there are.

    ``influence(example, prediction)`` is in [-1, 1].

    Raises, when called:
        DataError: the strong model alone failed on the example, so that there is nothing to compare with.
    """

    def __init__(self, metric: Metric, program: Collaboration) -> None:
        self.metric, self.program = metric, program
        self._alone: dict[str, float] = {}
        self._lock = threading.Lock()

    def __call__(
        self, example: dspy.Example, prediction: Any, trace: Any = None, pred_name: Any = None, pred_trace: Any = None
    ) -> float:
        return score_of(self.metric, example, dict(prediction.items())) - self.alone_score(example)

    def alone_score(self, example: dspy.Example) -> float:
        """The score of the strong model alone, computed at the first question for this example and kept."""
        key = repr(sorted(example.toDict().items(), key=lambda item: item[0]))
        with self._lock:
            if key in self._alone:
                return self._alone[key]
        made = attempt(lambda: self.program.answered_alone(**example.inputs()))
        if made.outputs is None:
            raise DataError(f"The strong model alone failed on example {example.get('id', '?')} ({made.error}): no influence.")
        score = score_of(self.metric, example, made.outputs)
        with self._lock:
            return self._alone.setdefault(key, score)

    def report(self, examples: Sequence[dspy.Example], *, threads: int = 8) -> InfluenceReport:
        """The influence of the program's own drafts on these examples, failures counted apart."""
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(threads) as pool:
            return InfluenceReport(tuple(pool.map(self._one, examples)))

    def _one(self, example: dspy.Example) -> float | None:
        made = attempt(lambda: self.program(**example.inputs()))
        if made.outputs is None:
            return None
        try:
            return score_of(self.metric, example, made.outputs) - self.alone_score(example)
        except DataError:
            return None


@dataclass(frozen=True)
class InfluenceReport:
    """Influences of a set of drafts; None where one of the two answers failed.

    ``examples`` holds the id of each draft's example, since drafts of one example are not independent; empty when every draft
    is of an example of its own.

    ``print(report)``: ``influence +0.12 [+0.05, +0.19]  helped 31  hurt 9  same 155  failed 5  n 200``
    """

    values: tuple[float | None, ...]
    examples: tuple[str, ...] = ()

    @property
    def scored(self) -> list[float]:
        """The influences that there are."""
        return [value for value in self.values if value is not None]

    @property
    def helped(self) -> int:
        """Drafts that made the answer better."""
        return sum(value > 0 for value in self.scored)

    @property
    def hurt(self) -> int:
        """Drafts that made the answer worse."""
        return sum(value < 0 for value in self.scored)

    @property
    def same(self) -> int:
        """Drafts that changed no score."""
        return sum(value == 0 for value in self.scored)

    @property
    def failed(self) -> int:
        """Drafts without an influence, because a call failed."""
        return len(self.values) - len(self.scored)

    @property
    def mean(self) -> float:
        """Mean influence of the scored drafts, in [-1, 1]; nan when there are none."""
        return sum(self.scored) / len(self.scored) if self.scored else float("nan")

    def interval(self, *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval | None:
        """The bootstrap interval of the mean, drawing examples with all their drafts; None for fewer than two examples."""
        drafts: dict[str, list[float]] = {}
        for place, value in enumerate(self.values):
            if value is not None:
                drafts.setdefault(self.examples[place] if self.examples else str(place), []).append(value)
        return bootstrap_mean_interval(list(drafts.values()), level=level, seed=seed, repeats=resamples)

    def __str__(self) -> str:
        interval = self.interval()
        spread = f" [{interval.low:+.2f}, {interval.high:+.2f}]" if interval else ""
        counts = f"helped {self.helped}  hurt {self.hurt}  same {self.same}  failed {self.failed}  n {len(self.values)}"
        return f"influence {self.mean:+.2f}{spread}  {counts}"
