"""Evaluators, each a DSPy metric: Judge, a model that scores an answer by a rubric; GoldLikelihood,
how likely the strong model finds the gold answer; Weighted, several as one.

    judge = Judge(dspy.LM("openai/gpt-5-mini"))
    judge(example, prediction)            # Prediction(score=0.75, feedback="...", coherence=0.5)
    judge.compare(example, one, other)    # Prediction(score=1.0, ...): ``one`` is better
    GoldLikelihood(together)(example, prediction)        # Prediction(score=0.31): per token
    Weighted(metric=(accuracy, 0.5), judge=(judge, 0.5))

A judge is shown the task, the gold answer and one answer, and nothing else: it cannot tell an
answer that was refined from a draft from one that was given alone. Its prompt is a DSPy program,
``judge.program``, that can be read, changed and optimised.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import dspy
from dspy.utils.exceptions import AdapterParseError

from cowest_dspy.compat import prompt_messages
from cowest_dspy.errors import ConfigError, ProgramError
from cowest_dspy.influence.metric import Metric, evaluate
from cowest_dspy.lms.local.likelihood import Likelihood
from cowest_dspy.program.adapters import LineAdapter, label, labelled_lines
from cowest_dspy.program.collaboration import (
    Collaboration,
    prompt_adapter,
    prompt_format,
    sanitize_draft,
    signature_of,
)
from cowest_dspy.store.call_context import sampling
from cowest_dspy.store.record import recorded, unrecorded

NOT_SHOWN = ("draft", "logprobs")


class Evaluator(ABC):
    """A DSPy metric that gives a ``dspy.Prediction(score, feedback, ...)``.

    Where an optimiser looks for demonstrations (``trace`` is given), it is the score alone, since a
    ``dspy.Prediction`` is true whatever its score.
    """

    # As a function has one: what logs a metric, such as MLflow's autolog, calls it by its name.
    __name__ = "evaluator"

    def __call__(
        self,
        example: dspy.Example,
        prediction: Any,
        trace: Any = None,
        pred_name: Any = None,
        pred_trace: Any = None,
    ) -> float | dspy.Prediction:
        """The value of :meth:`evaluate` as the caller can use it."""
        found = self.evaluate(example, prediction)
        return found if trace is None or pred_name is not None else float(found.score)

    @abstractmethod
    def evaluate(self, example: dspy.Example, prediction: Any) -> dspy.Prediction:
        """The score in [0, 1] of a prediction, with what is known beside it."""


@dataclass(frozen=True)
class Criterion:
    """One thing that a rubric rates. ``name`` becomes a field of the judge's answer, so that it has
    to be an identifier."""

    name: str
    asks: str
    weight: float = 1.0


@dataclass(frozen=True)
class Rubric:
    """What a judge is told, and what it rates, each on whole numbers from 1 (worst) to ``best``.

    Raises:
        ConfigError: no criterion, two of one name, a name that is no identifier, a weight that is
            not above 0, ``best`` below 2.
    """

    instructions: str
    criteria: tuple[Criterion, ...]
    best: int = 5

    def __post_init__(self) -> None:
        names = [one.name for one in self.criteria]
        if (
            not names
            or len(set(names)) < len(names)
            or not all(name.isidentifier() and name != "reason" for name in names)
        ):
            raise ConfigError(
                "A rubric needs criteria with different names that are identifiers (not "
                f"'reason'), got {names}."
            )
        if self.best < 2 or any(one.weight <= 0 for one in self.criteria):
            raise ConfigError(
                "A rubric rates from 1 to a best of 2 or more, and its criteria have weights "
                "above 0."
            )

    def score(self, ratings: Mapping[str, int]) -> float:
        """The weighted mean of ratings, in [0, 1]: 1 gives 0, ``best`` gives 1."""
        total = sum(one.weight * (ratings[one.name] - 1) / (self.best - 1) for one in self.criteria)
        return total / sum(one.weight for one in self.criteria)

    def text(self) -> str:
        """The rubric as the judge reads it."""
        lines = [
            self.instructions,
            f"Rate each with a whole number from 1 (worst) to {self.best} (best):",
        ]
        return "\n".join([*lines, *(f"- {label(one.name)}: {one.asks}" for one in self.criteria)])


PAPER = Rubric(
    "You grade an answer to a task. The correct answer is given to you; the answer that you grade "
    "may be right or wrong.",
    (
        Criterion(
            "coherence",
            "Do the steps of the answer follow from each other and lead to its conclusion?",
        ),
        Criterion("consistency", "Does the answer agree with the correct answer?"),
    ),
)
"""What CoWest's evaluator looks at: coherence of the reasoning, and consistency with the ground
truth."""

_BETTER = (
    "You compare two answers to a task. The correct answer is given to you. Say which answer is "
    "better by the criteria below; how "
    "long an answer is, and which of them comes first, does not matter."
)


class Judge(Evaluator):
    """A DSPy metric that asks a model. Values are in [0, 1]; what it could not be asked, or did not
    rate, is a failure, never 0.

    Args:
        lm: the judge's LM. Its calls are recorded, and kept by a run's store like any other.
        rubric: what it is told and what it rates.
        gold: the example's field with the correct answer.
        repeats: how often it is asked, each time with another seed; ratings are averaged. Of use
            where its LM samples.
        adapter: of its prompts; by default :class:`LineAdapter`.
    """

    __name__ = "judge"

    def __init__(
        self,
        lm: dspy.LM,
        rubric: Rubric = PAPER,
        *,
        gold: str = "answer",
        repeats: int = 1,
        adapter: dspy.Adapter | None = None,
    ) -> None:
        if repeats < 1:
            raise ConfigError(f"repeats is {repeats}: it must be 1 or more.")
        if repeats > 1 and lm.kwargs.get("temperature") == 0:
            raise ConfigError(
                f"{repeats} repeats were asked for, but the judge {lm.model} does not sample "
                "(temperature 0)."
            )
        self.rubric, self.gold, self.repeats = rubric, gold, repeats
        self.adapter = adapter or LineAdapter()
        plain = isinstance(self.adapter, LineAdapter)
        ratings = {
            one.name: (int, dspy.OutputField(desc=f"1 to {rubric.best}")) for one in rubric.criteria
        }
        self.program = _predictor({"answer": str}, ratings, rubric.text(), plain)
        better = {"better": (str, dspy.OutputField(desc="first, second or same"))}
        self.comparer = _predictor({"first": str, "second": str}, better, _comparing(rubric), plain)
        for predictor in (self.program, self.comparer):
            predictor.lm = recorded(lm)

    def evaluate(self, example: dspy.Example, prediction: Any) -> dspy.Prediction:
        """A ``dspy.Prediction`` of ``score`` in [0, 1], ``feedback`` (the judge's first reason) and
        the mean of each criterion.

        Raises:
            AdapterParseError: a rating is missing or not from 1 to best; and whatever the LM
                raises.
        """
        made = [
            self._rate(number, **self._task(example), answer=_format_answer(prediction))
            for number in range(self.repeats)
        ]
        means = {
            one.name: statistics.fmean(ratings[one.name] for ratings, _ in made)
            for one in self.rubric.criteria
        }
        score = statistics.fmean(self.rubric.score(ratings) for ratings, _ in made)
        spread = {name: (mean - 1) / (self.rubric.best - 1) for name, mean in means.items()}
        return dspy.Prediction(score=score, feedback=made[0][1], **spread)

    def compare(self, example: dspy.Example, one: Any, other: Any) -> dspy.Prediction:
        """Which of two answers is better: ``score`` in [-1, 1], 1 where ``one`` is, 0 where they
        are alike.

        Which of them is shown first is drawn from the example and the answers, and changes with
        every repeat.
        """
        texts = (_format_answer(one), _format_answer(other))
        swap = hashlib.sha256(repr((self._task(example), texts)).encode()).digest()[0] & 1
        scores: list[int] = []
        reasons: list[str] = []
        for number in range(self.repeats):
            swapped = (swap + number) % 2 == 1
            first, second = texts[::-1] if swapped else texts
            reply = self._ask(
                self.comparer, number, **self._task(example), first=first, second=second
            )
            word = str(reply.better).strip().strip(".").lower().removesuffix(" answer")
            if word not in ("first", "second", "same"):
                raise self._unusable(reply, f'better is "{word}", not first, second or same')
            scores.append({"first": 1, "second": -1, "same": 0}[word] * (-1 if swapped else 1))
            reasons.append(str(reply.reason))
        return dspy.Prediction(score=statistics.fmean(scores), feedback=reasons[0])

    def _rate(self, number: int, **inputs: str) -> tuple[dict[str, int], str]:
        reply = self._ask(self.program, number, **inputs)
        ratings = {one.name: int(reply[one.name]) for one in self.rubric.criteria}
        for name, rating in ratings.items():
            if not 1 <= rating <= self.rubric.best:
                raise self._unusable(reply, f"{name} is {rating}, not 1 to {self.rubric.best}")
        return ratings, str(reply.reason)

    def _ask(self, predictor: dspy.Predict, number: int, **inputs: str) -> dspy.Prediction:
        # The first time as if it were the only one, so that asking for more repeats later asks only
        # for the rest.
        with prompt_format(self.adapter):
            if not number:
                return predictor(**inputs)
            with sampling(seed=number):
                return predictor(**inputs)

    def _task(self, example: dspy.Example) -> dict[str, str]:
        if self.gold not in example:
            has = ", ".join(sorted(example.keys()))
            raise ConfigError(
                f'The judge needs the gold answer, but an example has no "{self.gold}": it has '
                f"{has}."
            )
        return {
            "task": labelled_lines(dict(example.inputs().items())),
            "correct_answer": str(example[self.gold]),
        }

    def _unusable(self, reply: dspy.Prediction, why: str) -> AdapterParseError:
        signature = cast(Any, self.program.signature)
        return AdapterParseError(
            "Judge", signature, lm_response=repr(dict(reply.items())), message=why
        )


def _predictor(
    shown: dict[str, type], rated: dict[str, Any], instructions: str, plain: bool
) -> dspy.Predict:
    """A predictor from the task, the gold answer and what is ``shown`` to a reason and what is
    ``rated``."""
    fields: dict[str, Any] = {
        name: (str, dspy.InputField()) for name in ("task", "correct_answer", *shown)
    }
    fields |= {"reason": (str, dspy.OutputField(desc="one sentence")), **rated}
    if plain:
        # LineAdapter's prompt holds no list of outputs.
        wanted = [
            f"{label(name)}: {fields[name][1].json_schema_extra['desc']}"
            for name in ("reason", *rated)
        ]
        instructions = "\n".join(
            [instructions, "Reply with these lines and nothing else:", *wanted]
        )
    # DSPy's metaclass makes a signature of these; its stub does not say so.
    return dspy.Predict(cast(Any, dspy.Signature)(fields, instructions))


def _comparing(rubric: Rubric) -> str:
    return "\n".join([_BETTER, *(f"- {label(one.name)}: {one.asks}" for one in rubric.criteria)])


def _format_answer(prediction: Any) -> str:
    return sanitize_draft(
        labelled_lines(
            {
                name: value
                for name, value in dict(prediction.items()).items()
                if name not in NOT_SHOWN
            }
        )
    )


@runtime_checkable
class ScoringEngine(Protocol):
    """An engine that says how likely given texts are."""

    def score(
        self, asked: Sequence[tuple[list[dict[str, str]], str]], model: str | None = None
    ) -> list[Likelihood]:
        """For each (chat messages, text) the log-probability of the text and of ending there."""
        ...


class GoldLikelihood(Evaluator):
    """A DSPy metric in (0, 1]: the strong model's probability of the gold answer, as the geometric
    mean over its tokens.

    The model is asked for the answer itself, without the reasoning that may come before it in the
    program: refine's instructions, demos and inputs, with the draft where the prediction has one,
    and as alone does without.

    Args:
        program: a bound :class:`Collaboration`, refine being one predictor.
        gold: the example's field with the gold answer.
        field: the output of refine that it stands for; by default the last.

    Raises:
        ProgramError: the program is not bound, refine has several predictors, or no output of that
            name.
        ConfigError: the strong model's backend gives no log-probabilities of given texts
            (in-process models do).
    """

    __name__ = "gold_likelihood"

    def __init__(
        self, program: Collaboration, *, gold: str = "answer", field: str | None = None
    ) -> None:
        strong = unrecorded(program.strong)
        engine = strong.engine
        if not isinstance(engine, ScoringEngine):
            raise ConfigError(
                f"{strong.model} gives no log-probabilities of a given text, which likelihood "
                "needs: use a strong model of "
                'kind "in_process", or a judge.'
            )
        if len(program.refine.predictors()) != 1:
            raise ProgramError(
                "likelihood needs a refine of one predictor, this one has "
                f"{len(program.refine.predictors())}."
            )
        self._engine, self._model, self.program, self.gold = engine, strong.model, program, gold
        self.field = field or program.answer_fields[-1]
        if self.field not in program.answer_fields:
            raise ProgramError(
                f'refine has no output "{self.field}": it has {", ".join(program.answer_fields)}.'
            )

    def evaluate(self, example: dspy.Example, prediction: Any) -> dspy.Prediction:
        """A ``dspy.Prediction`` of ``score`` in (0, 1] and ``logprob``, the natural log-probability
        of the whole answer.

        Raises:
            ConfigError: the example has no gold answer.
            dspy.lm15.ContextLengthError: the prompt does not fit the model.
        """
        if self.gold not in example:
            raise ConfigError(
                f'likelihood needs the gold answer, but an example has no "{self.gold}".'
            )
        found = self._engine.score([self.request(example, prediction)], model=self._model)[0]
        score = min(1.0, math.exp(found.per_token))
        return dspy.Prediction(score=score, feedback="", logprob=found.logprob)

    def request(self, example: dspy.Example, prediction: Any) -> tuple[list[dict[str, str]], str]:
        """The chat messages, and the gold answer as the model would have to write it."""
        draft = dict(prediction.items()).get("draft")
        program, inputs = self.program, dict(example.inputs().items())
        module = program.refine if draft is not None else program.alone.module
        if draft is not None:
            inputs[program.draft_field] = draft
        predictor = module.predictors()[0]
        signature = signature_of(predictor)
        for name in signature.output_fields:
            if name != self.field:
                signature = signature.delete(name)
        adapter = prompt_adapter(program.adapter)
        messages = prompt_messages(adapter, signature, list(predictor.demos), inputs)
        return messages, adapter.format_assistant_message_content(
            signature, {self.field: str(example[self.gold])}
        )


class Weighted(Evaluator):
    """A DSPy metric: the weighted mean of others, each with values in [0, 1].

    ``Weighted(metric=(accuracy, 0.5), judge=(judge, 0.5))(example, prediction)`` is
    ``Prediction(score=0.75, feedback="judge: ...", parts={"metric": 1.0, "judge": 0.5})``. When one
    of them fails, the whole fails: a mean of what is left would be another measure.

    Raises:
        ConfigError: no part, or weights that are not above 0.
    """

    __name__ = "weighted"

    def __init__(self, **parts: tuple[Metric, float]) -> None:
        if not parts or not all(
            math.isfinite(weight) and weight > 0 for _, weight in parts.values()
        ):
            raise ConfigError("Weighted needs at least one evaluator, each with a weight above 0.")
        self.parts: Mapping[str, tuple[Metric, float]] = parts

    def evaluate(self, example: dspy.Example, prediction: Any) -> dspy.Prediction:
        """A ``dspy.Prediction`` of ``score``, the ``feedback`` of the parts that gave one, and the
        score of each as ``parts``, which are asked as in an evaluation."""
        scores: dict[str, float] = {}
        words: list[str] = []
        for name, (metric, _) in self.parts.items():
            scores[name], feedback, _ = evaluate(metric, example, prediction)
            words += [f"{name}: {feedback}"] if feedback else []
        total = sum(weight for _, weight in self.parts.values())
        score = sum(scores[name] * weight for name, (_, weight) in self.parts.items()) / total
        return dspy.Prediction(
            score=min(1.0, max(0.0, score)), feedback="\n".join(words), parts=scores
        )
