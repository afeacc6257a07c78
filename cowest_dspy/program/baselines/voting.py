"""Several samples of one model and a vote: self-consistency, and a prediction with its
confidence."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import dspy

from cowest_dspy.errors import ProgramError
from cowest_dspy.program.baselines.tasks import Baseline, Task, answer_of, outputs_of, predictors_of
from cowest_dspy.store.record import EXPECTED_FAILURES, Call, listening, note, recorded

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
        vote = voted(self.module, inputs, self.samples, self.temperature, self.key)
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


def voted(
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
        counted = key(one.prediction) if key else normalised(answer_of(module, one.prediction))
        groups.setdefault(counted, []).append(one)
    largest = max(groups.values(), key=len)  # of equal ones the first: a dictionary keeps its order
    winner = largest[0]
    assert winner.prediction is not None
    if dspy.settings.trace is not None:
        dspy.settings.trace.extend(winner.steps)
    failed = sum(one.failed for one in made)
    return Vote(winner.prediction, len(largest) / samples, failed)


def normalised(value: Any) -> str:
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
