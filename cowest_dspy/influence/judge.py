"""Judge: a model that scores an answer by a rubric, as a DSPy metric.

    judge = Judge(dspy.LM("openai/gpt-5-mini"))
    judge(example, prediction)            # Prediction(score=0.75, feedback="...", coherence=0.5,
        consistency=1.0)
    judge.compare(example, one, other)    # Prediction(score=1.0, ...): ``one`` is better

It is shown the task, the gold answer and one answer, and nothing else: it cannot tell an answer
that was refined from a draft from one that was given alone. Its prompt is a DSPy program,
``judge.program``, that can be read, changed and optimised.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import dspy
from dspy.utils.exceptions import AdapterParseError

from cowest_dspy.errors import ConfigError
from cowest_dspy.influence.metric import graded
from cowest_dspy.program.adapters import LineAdapter, label, labelled_lines
from cowest_dspy.program.collaboration import sanitize_draft, speaking
from cowest_dspy.store.record import recorded, sampling

NOT_SHOWN = ("draft", "logprobs")


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


class Judge:
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

    # As a function has one: what logs a metric, such as MLflow's autolog, calls it by its name.
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

    def __call__(
        self,
        example: dspy.Example,
        prediction: Any,
        trace: Any = None,
        pred_name: Any = None,
        pred_trace: Any = None,
    ) -> Any:
        """A ``dspy.Prediction`` of ``score`` in [0, 1], ``feedback`` (the judge's first reason) and
        the mean of each criterion; for an optimiser that looks for demonstrations (``trace`` is
        given), the score alone.

        Raises:
            AdapterParseError: a rating is missing or not from 1 to best; and whatever the LM
                raises.
        """
        made = [
            self._rated(number, **self._task(example), answer=_shown(prediction))
            for number in range(self.repeats)
        ]
        means = {
            one.name: statistics.fmean(ratings[one.name] for ratings, _ in made)
            for one in self.rubric.criteria
        }
        score = statistics.fmean(self.rubric.score(ratings) for ratings, _ in made)
        spread = {name: (mean - 1) / (self.rubric.best - 1) for name, mean in means.items()}
        return graded(dspy.Prediction(score=score, feedback=made[0][1], **spread), trace, pred_name)

    def compare(self, example: dspy.Example, one: Any, other: Any) -> dspy.Prediction:
        """Which of two answers is better: ``score`` in [-1, 1], 1 where ``one`` is, 0 where they
        are alike.

        Which of them is shown first is drawn from the example and the answers, and changes with
        every repeat.
        """
        texts = (_shown(one), _shown(other))
        swap = hashlib.sha256(repr((self._task(example), texts)).encode()).digest()[0] & 1
        scores: list[int] = []
        reasons: list[str] = []
        for number in range(self.repeats):
            swapped = (swap + number) % 2 == 1
            first, second = texts[::-1] if swapped else texts
            said = self._asked(
                self.comparer, number, **self._task(example), first=first, second=second
            )
            word = str(said.better).strip().strip(".").lower().removesuffix(" answer")
            if word not in ("first", "second", "same"):
                raise self._unusable(said, f'better is "{word}", not first, second or same')
            scores.append({"first": 1, "second": -1, "same": 0}[word] * (-1 if swapped else 1))
            reasons.append(str(said.reason))
        return dspy.Prediction(score=statistics.fmean(scores), feedback=reasons[0])

    def _rated(self, number: int, **inputs: str) -> tuple[dict[str, int], str]:
        said = self._asked(self.program, number, **inputs)
        ratings = {one.name: int(said[one.name]) for one in self.rubric.criteria}
        for name, rating in ratings.items():
            if not 1 <= rating <= self.rubric.best:
                raise self._unusable(said, f"{name} is {rating}, not 1 to {self.rubric.best}")
        return ratings, str(said.reason)

    def _asked(self, predictor: dspy.Predict, number: int, **inputs: str) -> dspy.Prediction:
        # The first time as if it were the only one, so that asking for more repeats later asks only
        # for the rest.
        with speaking(self.adapter):
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

    def _unusable(self, said: dspy.Prediction, why: str) -> AdapterParseError:
        signature = cast(Any, self.program.signature)
        return AdapterParseError(
            "Judge", signature, lm_response=repr(dict(said.items())), message=why
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


def _shown(prediction: Any) -> str:
    return sanitize_draft(
        labelled_lines(
            {
                name: value
                for name, value in dict(prediction.items()).items()
                if name not in NOT_SHOWN
            }
        )
    )
