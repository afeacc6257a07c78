"""Gated: a collaboration behind a gate, as a DSPy module: the draft first, then what it is
worth."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import dspy

from cowest_dspy.influence.metric import attempt
from cowest_dspy.optimizers.router.model import Gate, Route
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.store.record import note


class Gated(dspy.Module):
    """Drafts, asks the gate, and answers with the draft, with the strong model alone, or with the
    refined draft.

    The prediction has the answer's fields, ``draft``, and ``route`` ("weak", "strong" or
    "collaborate"). Where no draft can be had (a failure, or one that was cut off), the strong model
    answers alone.

    Args:
        program: a bound collaboration.
        gate: fitted for it (:func:`~cowest_dspy.optimizers.router.fit_gate`), or loaded
            (:meth:`Gate.load`).
    """

    def __init__(self, program: Collaboration, gate: Gate) -> None:
        super().__init__()
        self.program, self.gate = program, gate

    def forward(self, **inputs: Any) -> dspy.Prediction:
        """The answer by the route that the gate takes."""
        drafted = attempt(lambda: self.program.draft_outputs(**inputs))
        # A draft that failed is no failure of the answer that comes without it.
        note(replace(call, left_out=drafted.outputs is None) for call in drafted.calls)
        if drafted.outputs is None:
            return _told("strong", self.program.ask_alone(**inputs), None)
        outputs = dspy.Prediction(**drafted.outputs)
        route = self.gate.route(self.program, outputs, inputs)
        if route == "weak":
            fields = {name: outputs[name] for name in self.program.answer_fields}
            return _told(route, dspy.Prediction(**fields), str(outputs["draft"]))
        answer = (
            self.program.ask_alone(**inputs)
            if route == "strong"
            else self.program.refined(str(outputs["draft"]), **inputs)
        )
        return _told(route, answer, str(outputs["draft"]))


def _told(route: Route, answer: dspy.Prediction, draft: str | None) -> dspy.Prediction:
    """The answer's fields last, as whoever reads an answer expects them."""
    fields = {name: value for name, value in answer.items() if name not in ("draft", "logprobs")}
    return dspy.Prediction(
        **{"route": route, **fields, **({"draft": draft} if draft is not None else {})}
    )
