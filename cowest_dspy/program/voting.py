"""Several samples of one model and a vote: self-consistency, and an answer with its confidence as a
draft (SuperICL).

    SelfConsistency(program, samples=5)
    super_icl(program, train[:8])     # a Collaboration: demos too have the weak model's answers
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import dspy

from cowest_dspy.errors import ProgramError
from cowest_dspy.program.baselines import (
    Baseline,
    Task,
    answer_of,
    demo_of,
    predictors_of,
)
from cowest_dspy.program.collaboration import Collaboration, outputs_of, signature_of
from cowest_dspy.store.call_context import Call, listening, note
from cowest_dspy.store.pool import map_in_threads
from cowest_dspy.store.record import EXPECTED_FAILURES, recorded

STATED = "stated_answer"
Key = Callable[[dspy.Prediction], Hashable]
FAILED_ENDS = ("length", "content_filter")
_FIXED = ("temperature", "rollout_id", "seed", "n")


class SelfConsistency(Baseline):
    """The answer that most of several samples of one model give (Wang et al. 2023,
    "Self-Consistency Improves Chain of Thought Reasoning in Language Models").

    Args:
        task: as for :class:`Baseline`; ``SelfConsistency(chain_of_thought(program))`` is the method
            of the paper.
        samples: how often the model is asked, 1 or more; one call after another.
        temperature: of all samples, above 0. Each has a ``rollout_id`` of its own, so that no cache
            and no store gives one answer for all; engines that take a seed get another for each.
        key: what is counted, from a prediction; by default the answer's text in lower case, without
            white space and punctuation around it.

    The prediction is the first sample of the largest group, of equal groups the one that came up
    first; before its fields it has ``agreement``, the size of its group as a part of all samples in
    [0, 1], and ``failed_samples``: those that could not be answered or parsed, were refused or cut
    off. They are left out.

    Raises:
        ProgramError: a number out of range. When called: the error of the first sample, if all of
            them failed.
    """

    def __init__(
        self, task: Task, samples: int = 5, temperature: float = 0.7, key: Key | None = None
    ) -> None:
        super().__init__(task)
        check_sampling(type(self).__name__, samples, temperature)
        self.samples, self.temperature, self.key = samples, temperature, key

    def answer(self, **inputs: Any) -> dspy.Prediction:
        """The prediction of the vote."""
        vote = take_vote(self.module, inputs, self.samples, self.temperature, self.key)
        return dspy.Prediction(
            agreement=vote.agreement, failed_samples=vote.failed, **outputs_of(vote.prediction)
        )


@dataclass(frozen=True)
class Vote:
    """What several samples agreed on: the prediction, the part of all samples that agree with it,
    how many failed."""

    prediction: dspy.Prediction
    agreement: float
    failed: int


@dataclass
class _Sample:
    prediction: dspy.Prediction | None = None
    error: Exception | None = None
    calls: list[Call] = field(default_factory=list)
    steps: list[Any] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return self.prediction is None or any(
            call.finish_reason in FAILED_ENDS and not call.left_out for call in self.calls
        )


def check_sampling(whose: str, samples: int, temperature: float) -> None:
    """Raises ProgramError for a number of samples, or a temperature, with which there is nothing to
    vote on."""
    if samples < 1 or not 0 < temperature <= 2:
        raise ProgramError(
            f"{whose}: samples is {samples} and must be 1 or more; temperature is {temperature} "
            "and must be above 0, up to 2."
        )


def take_vote(
    module: dspy.Module,
    inputs: dict[str, Any],
    samples: int,
    temperature: float,
    key: Key | None = None,
) -> Vote:
    """Asks a module several times and counts. Only the sample that won is in DSPy's trace, as a
    step of ``module`` itself.

    Raises:
        Exception: that of the first sample, if all failed; if none raised, the first is given,
            though it was cut off or refused.
    """
    made = [_sample(module, inputs, number, samples, temperature) for number in range(samples)]
    good = [one for one in made if not one.failed]
    for one in made:
        note(replace(call, left_out=True) if good and one.failed else call for call in one.calls)
    if not good:
        broken = next((one.error for one in made if one.error is not None), None)
        if broken is not None:
            raise broken
        good = made[:1]
    groups: dict[Hashable, list[_Sample]] = {}
    for one in good:
        assert one.prediction is not None
        counted = key(one.prediction) if key else normalise(answer_of(module, one.prediction))
        groups.setdefault(counted, []).append(one)
    largest = max(groups.values(), key=len)  # of equal ones the first: a dictionary keeps its order
    winner = largest[0]
    assert winner.prediction is not None
    if dspy.settings.trace is not None:
        dspy.settings.trace.extend(winner.steps)
    failed = sum(one.failed for one in made)
    return Vote(winner.prediction, len(largest) / samples, failed)


def normalise(value: Any) -> str:
    """An answer's text as votes count it: lower case, single spaces, no punctuation around it. ``"
    (B)."`` and ``"b"`` are one."""
    text = " ".join(str(value).casefold().split())
    return text.strip(" .,;:!?\"'`*()[]{}") or text


def _sample(
    module: dspy.Module, inputs: dict[str, Any], number: int, samples: int, temperature: float
) -> _Sample:
    copied, made = module.deepcopy(), _Sample()
    whose = {
        id(copy): of for copy, of in zip(predictors_of(copied), predictors_of(module), strict=True)
    }
    varied: dict[int, Any] = {}
    for predictor in predictors_of(copied):
        lm: Any = predictor.lm or dspy.settings.lm
        if lm is not None:
            varied.setdefault(id(lm), _varied(lm, number, samples, temperature))
            predictor.lm = varied[id(lm)]
        predictor.config = {
            name: value for name, value in predictor.config.items() if name not in _FIXED
        }
    with listening() as made.calls, dspy.context(trace=None if dspy.settings.trace is None else []):
        try:
            made.prediction = copied(**inputs)
        except EXPECTED_FAILURES as error:
            made.error = error
        made.steps = [
            (whose.get(id(step[0]), step[0]), *step[1:]) for step in dspy.settings.trace or []
        ]
    return made


def _varied(lm: Any, number: int, samples: int, temperature: float) -> Any:
    """The LM for one sample. A rollout that it has already, of a sampler around this one, makes
    other samples."""
    rollout = int(lm.kwargs.get("rollout_id") or 0) * samples + number
    return (recorded(lm) if isinstance(lm, dspy.LM) else lm).copy(
        rollout_id=rollout, temperature=temperature
    )


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
        vote = take_vote(self.predict, inputs, self.samples, self.temperature, self.key)
        stated = f"{answer_of(self.predict, vote.prediction)} (confidence {vote.agreement:.2f})"
        return dspy.Prediction(
            **{**outputs_of(vote.prediction), "confidence": vote.agreement, STATED: stated}
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
    made = program.deepcopy()
    made.draft = Confident(weak or _answering(program), samples, temperature, key)
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
            return program.ask_draft(**example.inputs()).draft
        except EXPECTED_FAILURES as error:
            errors.append(error)
            return None

    drafts = map_in_threads(one, examples, num_threads=threads)
    if errors and not any(drafts):
        raise errors[0]
    return drafts
