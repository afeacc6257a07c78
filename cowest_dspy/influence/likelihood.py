"""GoldLikelihood: how likely the strong model finds the gold answer, with a draft and without:
graded feedback, nothing sampled.

likelihood = GoldLikelihood(together)            # together: a bound Collaboration whose strong
    model is in process
likelihood(example, prediction)                  # Prediction(score=0.31): per token, the gold
    answer after this draft
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import dspy

from cowest_dspy.errors import ConfigError, ProgramError
from cowest_dspy.influence.metric import graded
from cowest_dspy.lms.local.likelihood import Likelihood
from cowest_dspy.program.collaboration import Collaboration, prompt_adapter, signature_of
from cowest_dspy.store.record import unrecorded


@runtime_checkable
class ScoringEngine(Protocol):
    """An engine that says how likely given texts are."""

    def score(
        self, asked: Sequence[tuple[list[dict[str, str]], str]], model: str | None = None
    ) -> list[Likelihood]:
        """For each (chat messages, text) the log-probability of the text and of ending there."""
        ...


class GoldLikelihood:
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

    # As a function has one: what logs a metric, such as MLflow's autolog, calls it by its name.
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

    def __call__(
        self,
        example: dspy.Example,
        prediction: Any,
        trace: Any = None,
        pred_name: Any = None,
        pred_trace: Any = None,
    ) -> Any:
        """A ``dspy.Prediction`` of ``score`` in (0, 1] and ``logprob``, the natural log-probability
        of the whole answer; for an optimiser that looks for demonstrations (``trace`` is given),
        the score alone.

        Raises:
            ConfigError: the example has no gold answer.
            dspy.lm15.ContextLengthError: the prompt does not fit the model.
        """
        if self.gold not in example:
            raise ConfigError(
                f'likelihood needs the gold answer, but an example has no "{self.gold}".'
            )
        found = self._engine.score([self.asked(example, prediction)], model=self._model)[0]
        score = min(1.0, math.exp(found.per_token))
        return graded(
            dspy.Prediction(score=score, feedback="", logprob=found.logprob), trace, pred_name
        )

    def asked(self, example: dspy.Example, prediction: Any) -> tuple[list[dict[str, str]], str]:
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
        messages: Any = adapter.format(signature, list(predictor.demos), inputs)
        return messages, adapter.format_assistant_message_content(
            signature, {self.field: str(example[self.gold])}
        )
