"""A weak model's answer and its confidence in the strong model's context (SuperICL; Xu et al. 2023,
"Small Models are Valuable Plug-ins for Large Language Models").

program = super_icl(collaboration, train[:8])       # a Collaboration: the demos too have the weak
    model's answers
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import dspy

from cowest_dspy.errors import ProgramError
from cowest_dspy.program.baselines.tasks import answer_of, demo_of, outputs_of, predictors_of
from cowest_dspy.program.baselines.voting import Key, check_sampling, voted
from cowest_dspy.program.collaboration import Collaboration, signature_of
from cowest_dspy.store.pool import all_in_order
from cowest_dspy.store.record import EXPECTED_FAILURES

STATED = "stated_answer"


class Confident(dspy.Module):
    """A drafter that answers and says how sure it is: ``"Paris (confidence 0.80)"``.

    The confidence is the part of the model's own samples that agree with the answer, in [0, 1]; a
    failed one agrees with none. The paper takes a classifier's probability. Probabilities of tokens
    come from some engines only, and those of an answer are spread over its wordings; agreement can
    be had from every model and counts wordings together.

    Args:
        predict: a module, or a signature. It is copied.
        samples: as for :class:`SelfConsistency`; a question costs so many calls.
        temperature: as for :class:`SelfConsistency`.
        key: as for :class:`SelfConsistency`.

    The prediction has the fields of the answer, ``confidence``, and as the draft ``stated_answer``:
    the last field of the answer with its confidence. It is made for answering, not for tuning: a
    trace keeps one of the samples, not the text with the number.

    Raises:
        ProgramError: a number out of range, or a module that asks no model.
    """

    output_names = (STATED,)

    def __init__(
        self,
        predict: dspy.Module | str | type[dspy.Signature],
        samples: int = 5,
        temperature: float = 0.7,
        key: Key | None = None,
    ) -> None:
        super().__init__()
        check_sampling(type(self).__name__, samples, temperature)
        self.predict: dspy.Module = (
            predict.deepcopy() if isinstance(predict, dspy.Module) else dspy.Predict(predict)
        )
        if not predictors_of(self.predict):
            raise ProgramError(
                f"Confident: a {type(self.predict).__name__} asks no model; give a module with a "
                "predictor."
            )
        self.samples, self.temperature, self.key = samples, temperature, key

    def forward(self, **inputs: Any) -> dspy.Prediction:
        """The answer, its confidence, and both as text."""
        vote = voted(self.predict, inputs, self.samples, self.temperature, self.key)
        said = f"{answer_of(self.predict, vote.prediction)} (confidence {vote.agreement:.2f})"
        return dspy.Prediction(
            **{**outputs_of(vote.prediction), "confidence": vote.agreement, STATED: said}
        )


def super_icl(
    program: Collaboration,
    examples: Sequence[dspy.Example],
    weak: dspy.Module | None = None,
    *,
    samples: int = 5,
    temperature: float = 0.7,
    key: Key | None = None,
    num_threads: int = 8,
) -> Collaboration:
    """The program with the weak model's answer and confidence as its draft, and labelled examples
    with such drafts as demos.

    Args:
        program: bound (:meth:`Collaboration.bind`); the weak model is asked about each example, so
            many times as there are samples.
        examples: with inputs and gold outputs, from the training split. One that the weak model
            fails on is left out.
        weak: answers like the task, on the weak model; by default the strong model's task, without
            demos, on the program's weak LM.
        num_threads: examples under way at once.

    The strong model keeps its instructions, LM and adapter; ``alone`` has the same demos without
    drafts. To keep the answers of the weak model in a run, call it inside ``keeping(store)``.

    Raises:
        ProgramError: the program is not bound, or nothing in it takes a draft.
        DataError: no example has the outputs of a demo.
        Exception: that of the first example, if the weak model failed on all of them.
    """
    drafter = Confident(weak or _answering(program), samples, temperature, key)
    made = Collaboration(
        draft=drafter,
        refine=program.refine.deepcopy(),
        draft_field=program.draft_field,
        adapter=program.adapter,
    )
    drafts = _drafts(made, examples, num_threads)
    rows = [
        {**example.toDict(), made.draft_field: draft}
        for example, draft in zip(examples, drafts, strict=True)
        if draft
    ]
    for predictor in predictors_of(made.refine):
        signature = signature_of(predictor)
        if made.draft_field in signature.input_fields:
            predictor.demos = [demo_of(signature, row) for row in rows]
    return made.with_fresh_baseline()


def _answering(program: Collaboration) -> dspy.Module:
    """The strong model's task on the weak LM."""
    task = program.alone.module.deepcopy()
    for predictor in predictors_of(task):
        predictor.lm, predictor.demos = program.weak, []
    return task


def _drafts(
    program: Collaboration, examples: Sequence[dspy.Example], threads: int
) -> list[str | None]:
    """The draft of each example; None where the weak model failed, and its error if it failed on
    all."""
    errors: list[Exception] = []

    def one(example: dspy.Example) -> str | None:
        try:
            return program.drafted(**example.inputs())
        except EXPECTED_FAILURES as error:
            errors.append(error)
            return None

    drafts = all_in_order(one, examples, threads=threads)
    if errors and not any(drafts):
        raise errors[0]
    return drafts
