"""Self-refinement: one model answers, says what is wrong with its answer, and answers again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import dspy

from cowest_dspy.errors import ProgramError
from cowest_dspy.program.adapters import labelled_lines
from cowest_dspy.program.baselines.tasks import Baseline, Task, outputs_of, predictors_of
from cowest_dspy.program.collaboration import signature_of

ATTEMPT, ATTEMPTS, FEEDBACK = "attempt", "attempts", "feedback"

NOTHING = "Nothing is wrong with it."
_CRITICISE = (
    "An attempt at this task is given. Say what is wrong with it and how to mend it, or "
    "that nothing is. Do not answer anew."
)
_AGAIN = (
    "Attempts at this task and feedback on them are given. Answer once more, better; keep "
    "what is right."
)


class SelfRefine(Baseline):
    """An answer, feedback on it, and a refined answer, all by the same LM (Madaan et al. 2023,
    "Self-Refine: Iterative Refinement with Self-Feedback").

    Args:
        task: as for :class:`Baseline`. It makes the first answer; the refined one has the outputs
            of its last predictor.
        rounds: how often feedback is given and the answer refined, 1 or more. A question costs the
            calls of the task and two more a round; it never stops early. As in the paper, a
            refinement sees all earlier attempts and their feedback.

    ``criticise`` and ``again`` are ordinary predictors with the instructions of the task and a
    sentence of their own; where the task is one predictor, ``again`` has its demos, each with its
    own answer as the attempt. The prediction has, before the fields of the answer, ``attempts``:
    the earlier attempts and the feedback on them, as text.

    Raises:
        ProgramError: ``rounds`` is below 1, or the task has a field called attempt, attempts or
            feedback.
    """

    def __init__(self, task: Task, rounds: int = 1) -> None:
        super().__init__(task)
        if rounds < 1:
            raise ProgramError(f"SelfRefine: rounds is {rounds} and must be 1 or more.")
        self.rounds = rounds
        predictors = predictors_of(self.module)
        first, last = predictors[0], predictors[-1]
        inputs, outputs = _asked_of(predictors), _fields(signature_of(last).output_fields)
        taken = {ATTEMPT, ATTEMPTS, FEEDBACK} & (inputs.keys() | outputs.keys())
        if taken:
            raise ProgramError(
                f"SelfRefine: the task has fields {sorted(taken)}, which it needs for itself; "
                "call them otherwise."
            )
        task_says = signature_of(last if len(predictors) == 1 else first).instructions.strip()
        criticising = {
            **inputs,
            ATTEMPT: (str, dspy.InputField()),
            FEEDBACK: (str, dspy.OutputField()),
        }
        answering = {**inputs, ATTEMPTS: (str, dspy.InputField()), **outputs}
        self.criticise = dspy.Predict(
            dspy.make_signature(criticising, f"{task_says}\n{_CRITICISE}")
        )
        self.again = dspy.Predict(dspy.make_signature(answering, f"{task_says}\n{_AGAIN}"))
        for predictor in (self.criticise, self.again):
            predictor.lm, predictor.config = last.lm, dict(last.config)
        if len(predictors) == 1:
            self.again.demos = [_refined(demo, outputs) for demo in last.demos]

    def answer(self, **inputs: Any) -> dspy.Prediction:
        """The refined answer."""
        known = {
            name: inputs[name]
            for name in signature_of(self.criticise).input_fields
            if name in inputs
        }
        said, names = outputs_of(self.module(**inputs)), self.output_names
        told: list[str] = []
        for number in range(1, self.rounds + 1):
            attempt = labelled_lines({name: said[name] for name in names if name in said} or said)
            feedback = self.criticise(**known, **{ATTEMPT: attempt})[FEEDBACK]
            told.append(f"{number}. {attempt}\nFeedback: {feedback}")
            said = outputs_of(self.again(**known, **{ATTEMPTS: "\n".join(told)}))
        return dspy.Prediction(**{ATTEMPTS: "\n".join(told), **said})


def _refined(demo: Any, outputs: Iterable[str]) -> dspy.Example:
    """A worked example of the task as one of refining: its own answer as the attempt, with which
    nothing is wrong. Without an attempt in it, it would show a small model another form than the
    one that it is asked in."""
    attempt = labelled_lines({name: demo[name] for name in outputs if name in demo})
    return dspy.Example(**{**dict(demo), ATTEMPTS: f"1. {attempt}\nFeedback: {NOTHING}"})


def _asked_of(predictors: list[dspy.Predict]) -> dict[str, tuple[Any, Any]]:
    """The inputs that no earlier predictor makes: those of the whole task."""
    asked: dict[str, tuple[Any, Any]] = {}
    made: set[str] = set()
    for predictor in predictors:
        signature = signature_of(predictor)
        asked |= {
            name: one
            for name, one in _fields(signature.input_fields).items()
            if name not in made and name not in asked
        }
        made |= signature.output_fields.keys()
    return asked


def _fields(fields: Any) -> dict[str, tuple[Any, Any]]:
    return {name: (field.annotation, field) for name, field in fields.items()}
