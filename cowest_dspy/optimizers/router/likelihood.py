"""DraftLikelihood: how likely the weak model finds a draft after the program's own prompt: how sure
it is of what it says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cowest_dspy.errors import ConfigError, ProgramError
from cowest_dspy.influence.likelihood import ScoringEngine
from cowest_dspy.program.collaboration import Collaboration, prompt_adapter, signature_of
from cowest_dspy.store.record import unrecorded


class DraftLikelihood:
    """The mean natural log-probability of a draft's tokens (and of ending there), at most 0, under
    the program's weak model.

    Args:
        program: bound; its drafter is one predictor, its weak model in process
            (:class:`~cowest_dspy.TransformersEngine`).

    Raises:
        ProgramError: the drafter has several predictors or none.
        ConfigError: the weak model's backend gives no log-probabilities of given texts.
    """

    def __init__(self, program: Collaboration) -> None:
        if len(program.draft.predictors()) != 1:
            raise ProgramError(
                "The likelihood of a draft needs a drafter of one predictor, this has "
                f"{len(program.draft.predictors())}."
            )
        weak = unrecorded(program.weak)
        engine = weak.engine
        if not isinstance(engine, ScoringEngine):
            raise ConfigError(
                f"{weak.model} gives no log-probabilities of a given text, which this gate needs: "
                "use a weak model of kind "
                '"in_process", or fit a gate without them.'
            )
        self._engine, self._model, self._program = engine, weak.model, program

    def __call__(self, inputs: Mapping[str, Any], draft: str) -> float:
        """Of one draft."""
        return self.of_all([(inputs, draft)])[0]

    def of_all(self, asked: Sequence[tuple[Mapping[str, Any], str]]) -> list[float]:
        """Of several drafts, computed together, in their order; an empty draft counts as one that
        is sure to end there (0)."""
        rows = [(self._prompt(inputs), draft) for inputs, draft in asked if draft]
        found = iter(self._engine.score(rows, model=self._model) if rows else ())
        return [next(found).per_token if draft else 0.0 for _, draft in asked]

    def _prompt(self, inputs: Mapping[str, Any]) -> list[dict[str, str]]:
        (predictor,) = self._program.draft.predictors()
        adapter = prompt_adapter(self._program.adapter)
        return adapter.format(signature_of(predictor), list(predictor.demos), dict(inputs))


def scores_drafts(program: Collaboration) -> bool:
    """Whether the likelihood of this program's drafts can be had."""
    try:
        DraftLikelihood(program)
    except (ConfigError, ProgramError):
        return False
    return True
