"""The task of one model alone: what a collaboration asks its strong model, less the draft, and two
better ways to ask it.

chain_of_thought(program)                       # reasoning before the answer
few_shot(program, examples, k=8, seed=0)        # labelled examples before the question

A baseline is made of a task: a :class:`Collaboration` (its strong model alone, with its
instructions, demos, LM and adapter), any module, or a signature.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, TypeAlias, cast

import dspy

from cowest_dspy.errors import DataError, ProgramError
from cowest_dspy.program.adapters import LineAdapter, label
from cowest_dspy.program.collaboration import Collaboration, prompt_adapter, signature_of, speaking

Task: TypeAlias = "Collaboration | dspy.Module | str | type[dspy.Signature]"
REASONING = "reasoning"


class Baseline(dspy.Module):
    """One way to answer a task with one model, in the prompt format of the program that the task is
    of.

    Args:
        task: a :class:`Collaboration`, of which the strong model alone is taken and never the
            draft; a module; or a signature. The module is copied, with its LMs and demos.

    ``module`` answers the task; ``adapter`` is that of all prompts, by default
    ``dspy.settings.adapter``, otherwise :class:`LineAdapter`.

    Raises:
        ProgramError: the module has no predictor.
    """

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.adapter: dspy.Adapter | None = (
            task.adapter if isinstance(task, Collaboration | Baseline) else None
        )
        self.module: dspy.Module = _module(task)
        if not predictors_of(self.module):
            raise ProgramError(
                f"{type(self).__name__}: a {type(self.module).__name__} asks no model; give a "
                "module with a predictor."
            )

    def forward(self, **inputs: Any) -> dspy.Prediction:
        """The answer to the inputs."""
        with speaking(self.adapter):
            return self.answer(**inputs)

    def answer(self, **inputs: Any) -> dspy.Prediction:
        """The answer, asked for in the prompt format of the caller."""
        return self.module(**inputs)

    def dump_state(self, json_mode: bool = True) -> dict[str, Any]:
        """Prompts and demos without any LM, as of a :class:`Collaboration`."""
        unbound = self.deepcopy()
        for predictor in predictors_of(unbound):
            predictor.lm = None
        return super(Baseline, unbound).dump_state(json_mode=json_mode)

    @property
    def output_names(self) -> tuple[str, ...]:
        """The fields of the answer, without what is said of how it was found."""
        return tuple(signature_of(predictors_of(self.module)[-1]).output_fields)


def chain_of_thought(task: Task) -> Baseline:
    """The task with a reasoning before its first output (Wei et al. 2022), as
    ``dspy.ChainOfThought`` asks for it.

    Its instructions stay, and demos that have a ``reasoning``. One without would be shown with
    DSPy's note that it is "not supplied", and small models write that note instead of reasoning: it
    is left out. Demos with a reasoning also come from ``few_shot(chain_of_thought(task),
    examples)``. A task that has such an output already stays as it is.

    In the format of a :class:`LineAdapter`, which says nothing of lines by itself, one sentence
    about them follows the instructions.
    """
    made = Baseline(task)
    predictor = predictors_of(made.module)[-1]
    signature = signature_of(predictor)
    if REASONING in signature.output_fields:
        return made
    signature = signature.prepend(REASONING, dspy.OutputField(desc="${reasoning}"), str)
    if isinstance(prompt_adapter(made.adapter), LineAdapter):
        lines = ", ".join(f'"{label(name)}: ..."' for name in signature.output_fields)
        signature = signature.with_instructions(
            f"{signature.instructions.strip()}\nThink step by step first. Write lines: {lines}."
        )
    predictor.signature = signature
    predictor.demos = [demo for demo in predictor.demos if dict(demo).get(REASONING)]
    return made


def few_shot(task: Task, examples: Sequence[dspy.Example], k: int = 8, seed: int = 0) -> Baseline:
    """The task with ``k`` labelled examples as demos, drawn by ``seed``; with all of them if there
    are fewer.

    Demos have the fields of a predictor's signature and nothing else of an example; a predictor
    whose outputs no example has keeps its own. Of a :class:`Collaboration` it is the strong model
    alone; a module is copied.

    Raises:
        DataError: some examples, or all of them, have none of the outputs, so that they show
            nothing.
        ProgramError: ``k`` is negative.
    """
    if k < 0:
        raise ProgramError(f"few_shot: k is {k}; it is the number of demos, 0 or more.")
    made = task.deepcopy() if isinstance(task, Baseline) else Baseline(task)
    chosen = random.Random(seed).sample(list(examples), min(k, len(examples)))
    last = predictors_of(made)[-1]
    for predictor in predictors_of(made):
        signature = signature_of(predictor)
        if predictor is last or any(
            name in example for name in signature.output_fields for example in chosen
        ):
            predictor.demos = [demo_of(signature, example) for example in chosen]
    return made


def demo_of(signature: type[dspy.Signature], values: Any) -> dspy.Example:
    """The fields of a signature that ``values`` has, as a demo.

    Raises:
        DataError: it has none of the outputs.
    """
    shown = {name: values[name] for name in signature.fields if name in values}
    if not shown.keys() & signature.output_fields.keys():
        raise DataError(
            f"Example {values.get('id', '?')} has none of the outputs "
            f"{list(signature.output_fields)}: it cannot be a demo."
        )
    return dspy.Example(**shown).with_inputs(
        *(name for name in shown if name in signature.input_fields)
    )


def predictors_of(module: dspy.Module) -> list[dspy.Predict]:
    """Every predictor of a module: those that DSPy names, in its order, then those in parts that
    are closed to optimisers."""
    parts = [*module.predictors(), *(part for _, part in module.named_sub_modules(dspy.Predict))]
    return list({id(part): cast(dspy.Predict, part) for part in parts}.values())


def answer_of(module: dspy.Module, prediction: dspy.Prediction) -> Any:
    """The value of the answer: of the last output of the module's last predictor, or the last that
    the prediction has."""
    values = outputs_of(prediction)
    last = next(reversed(signature_of(predictors_of(module)[-1]).output_fields))
    return values[last] if last in values else next(reversed(values.values()), None)


def outputs_of(prediction: dspy.Prediction) -> dict[str, Any]:
    """A prediction's fields, less the logprobs that an adapter may put beside them."""
    return {name: value for name, value in prediction.items() if name != "logprobs"}


def _module(task: Task) -> dspy.Module:
    if isinstance(task, Collaboration):
        return task.alone.module.deepcopy()
    return task.deepcopy() if isinstance(task, dspy.Module) else dspy.Predict(task)
