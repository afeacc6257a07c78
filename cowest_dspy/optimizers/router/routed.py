"""Routed: a collaboration behind a router, as a DSPy module: the draft first, then what it is
worth."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import dspy

from cowest_dspy.influence.metric import attempt
from cowest_dspy.optimizers.router.model import Route, Router
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.store.record import note


class Routed(dspy.Module):
    """Drafts, asks the router, and answers with the draft, with the strong model alone, or with the
    refined draft.

    The prediction has the answer's fields, ``draft``, and ``route`` ("weak", "strong" or
    "collaborate"). Where no draft can be had (a failure, or one that was cut off), the strong model
    answers alone.

    Args:
        program: a bound collaboration.
        router: fitted for it (:func:`~cowest_dspy.optimizers.router.fit_router`), or loaded
            (:meth:`Router.load`).
    """

    def __init__(self, program: Collaboration, router: Router) -> None:
        super().__init__()
        self.program, self.router = program, router

    def forward(self, **inputs: Any) -> dspy.Prediction:
        """The answer by the route that the router takes."""
        drafted = attempt(lambda: self.program.draft_outputs(**inputs))
        # A draft that failed is no failure of the answer that comes without it.
        note(replace(call, left_out=drafted.outputs is None) for call in drafted.calls)
        if drafted.outputs is None:
            return _told("strong", self.program.ask_alone(**inputs), None)
        outputs = dspy.Prediction(**drafted.outputs)
        route = self.router.route(self.program, outputs, inputs)
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
