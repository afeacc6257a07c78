"""Arms: the ways to answer the held-out examples that a run compares, and one function that asks
them all alike."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import dspy
from pydantic import ConfigDict

from cowest_dspy.errors import DataError, ReportError
from cowest_dspy.influence.metric import Metric, attempt, score_of
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.store.call_context import keeping
from cowest_dspy.store.pool import OnProgress, map_in_threads
from cowest_dspy.store.store import Store
from cowest_dspy.utils.jsonable import as_text, from_text


@dataclasses.dataclass(frozen=True)
class Answer:
    """One example as one arm answered it. ``score`` is in [0, 1], higher is better; None when
    ``error`` says why.

    ``draft`` is the weak model's text where the arm has one; ``steps`` are other output fields,
    such as the working.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    example_id: str
    inputs: dict[str, Any]
    gold: str
    answer: str | None
    score: float | None
    error: str | None = None
    draft: str | None = None
    steps: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.score is None) == (self.error is None):
            raise ReportError(
                f'Answer "{self.example_id}" has score {self.score!r} and error {self.error!r}: '
                "give either a score in "
                "[0, 1], or score=None with the error that explains it."
            )
        if self.score is not None and not (math.isfinite(self.score) and 0 <= self.score <= 1):
            raise ReportError(
                f'Answer "{self.example_id}" has score {self.score}: a score lies in [0, 1].'
            )


Answering = Callable[[dspy.Example], dspy.Prediction]


def collaboration_arm(program: Collaboration) -> Answering:
    """The weak model drafts, the strong one refines."""
    return lambda example: program(**example.inputs())


def alone_arm(program: Collaboration) -> Answering:
    """The strong model alone, with the instructions, demos and room of refine."""
    return lambda example: program.ask_alone(**example.inputs())


def oracle_arm(program: Collaboration, field: str) -> Answering:
    """The strong model with the gold background that stands in ``field`` of each example: the
    ceiling of any draft."""

    def answer(example: dspy.Example) -> dspy.Prediction:
        if not example.get(field):
            raise DataError(
                f'Example {example.get("id", "?")} has no "{field}", the field of the gold '
                "background."
            )
        return program.ask_refine(str(example[field]), **example.inputs())

    return answer


def module_arm(program: Collaboration, module: dspy.Module) -> Answering:
    """Any module that answers by itself, in the program's prompt format."""
    return lambda example: program.ask_module(module, **example.inputs())


def ask_all(
    answering: Answering,
    examples: Sequence[dspy.Example],
    metric: Metric,
    *,
    store: Store | None = None,
    num_threads: int = 8,
    on_progress: OnProgress | None = None,
) -> tuple[Answer, ...]:
    """Every example answered and scored, in order; what failed has an error and no score."""

    def one(example: dspy.Example) -> Answer:
        return _one(answering, example, metric)

    with keeping(store):
        return tuple(
            map_in_threads(one, examples, num_threads=num_threads, on_progress=on_progress)
        )


def _one(answering: Answering, example: dspy.Example, metric: Metric) -> Answer:
    made = attempt(lambda: answering(example))
    outputs: dict[str, Any] = dict(made.outputs or {})
    draft = outputs.pop("draft", None)
    last = next(reversed(outputs), None)
    return Answer(
        example_id=example.id,
        inputs=dict(example.inputs().items()),
        gold=_gold(example, last),
        answer=as_text(outputs[last]) if last else None,
        score=score_of(metric, example, outputs) if made.outputs is not None else None,
        error=made.error,
        draft=None if draft is None else str(draft),
        steps={name: as_text(value) for name, value in outputs.items() if name != last},
    )


def restore_outputs(answer: Answer, field: str, types: Mapping[str, Any]) -> dict[str, Any] | None:
    """The outputs of a program, by field, from a stored answer: its texts become again what they
    were. ``field`` is the answer's own, ``types`` those of the program's outputs
    (``Collaboration.output_types``). None where there is no answer."""
    if answer.error is not None:
        return None
    texts = {**answer.steps, field: answer.answer}
    return {
        name: None if text is None else from_text(text, types.get(name, str))
        for name, text in texts.items()
    }


def _gold(example: dspy.Example, field: str | None) -> str:
    """The expected answer to show: the label of the answer's name, otherwise the first label there
    is."""
    labels = {key: value for key, value in example.labels().items() if key != "id"}
    return str(labels.get(field or "answer", labels.get("answer", next(iter(labels.values()), ""))))
