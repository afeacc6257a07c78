"""Answer one request with a collaboration, with declared fallbacks where a model fails.

    draft      the weak model's; where it fails: the strong model alone, or an error
    route      where a router is given, it decides after the draft: weak, strong or collaborate
    answer     the strong model's; where it fails: an error, or the draft, marked as such

For a request that was given up no further model is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import dspy

from cowest_dspy.errors import CowestError
from cowest_dspy.influence.metric import Attempt, attempt
from cowest_dspy.optimizers.router import Route, check_route
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.store.call_context import Call, Stopping, joining, listening

Role = Literal["weak", "strong"]
"""One of both models."""
Fallback = Literal["strong alone", "draft"]


class Chooser(Protocol):
    """Chooses a route after the draft, as a fitted ``Router`` does."""

    def route(
        self, program: Collaboration, outputs: dspy.Prediction, inputs: Mapping[str, Any]
    ) -> Route:
        """Choose from ``program.ask_draft`` and the program's inputs."""
        ...


class GivenUp(Exception):
    """The request was given up; no further model is asked for it."""


class Unanswered(CowestError):
    """A model gave no usable answer, and there is no fallback. ``role``: which model; ``kind``: how
    it failed ("timeout", "parse", ...)."""

    def __init__(self, role: Role, kind: str) -> None:
        self.role, self.kind = role, kind
        super().__init__(f"The {role} model gave no usable answer: it failed ({kind}).")


@dataclass(frozen=True)
class ServedAnswer:
    """The answer to a request, and how it came about.

    ``outputs`` are fields by name; of the fallback "draft" they are those of the draft. ``draft``
    is None where there is none. ``failed`` maps each model that failed to the kind of failure.
    """

    outputs: dict[str, Any]
    route: Route
    fallback: Fallback | None = None
    draft: str | None = None
    failed: Mapping[Role, str] = field(default_factory=dict)
    weak_calls: tuple[Call, ...] = ()
    strong_calls: tuple[Call, ...] = ()

    @property
    def tokens(self) -> dict[str, int]:
        """weak_in, weak_out, strong_in, strong_out."""
        found: dict[str, int] = {}
        for role, calls in (("weak", self.weak_calls), ("strong", self.strong_calls)):
            found[f"{role}_in"] = sum(call.input_tokens for call in calls)
            found[f"{role}_out"] = sum(call.output_tokens for call in calls)
        return found


class Answering:
    """A bound program that answers requests from several threads.

    Args:
        program: both models bound. The route "weak" needs drafts that hold the answer's fields.
        router: chooses a route after each draft; without one every draft is refined.
        on_weak_failure: the strong model answers alone, or an error.
        on_strong_failure: an error, or the draft.

    Raises:
        ProgramError: the program is not bound.
    """

    def __init__(
        self,
        program: Collaboration,
        router: Chooser | None = None,
        *,
        on_weak_failure: Literal["strong", "error"] = "strong",
        on_strong_failure: Literal["error", "draft"] = "error",
    ) -> None:
        drafter = program.draft
        weak = program.weak.model if drafter.predictors() else type(drafter).__name__
        self.models: dict[Role, str] = {"weak": weak, "strong": program.strong.model}
        """The ids of both models; a draft that asks no model has the name of its module."""
        self.program, self.router = program, router
        self.on_weak_failure, self.on_strong_failure = on_weak_failure, on_strong_failure

    def answer(
        self,
        inputs: dict[str, Any],
        *,
        on_draft: Callable[[str], None] | None = None,
        stopping: Stopping | None = None,
    ) -> ServedAnswer:
        """Answer one request.

        Args:
            inputs: the program's, by name.
            on_draft: called with the draft before the strong model is asked.
            stopping: stopped when the request is given up: waits for a rate limit end, and no
                further model is asked.

        Raises:
            Unanswered: a model failed, and the fallback is an error, or failed too.
            GivenUp: it was stopped.
            ProgramError: the router chose what cannot be.
        """
        stopping = stopping or Stopping()
        try:
            # DSPy's history would hold every request.
            with joining(stopping), dspy.context(trace=None, disable_history=True):
                return self._answer(inputs, on_draft or (lambda _: None), stopping)
        except KeyboardInterrupt:
            if stopping.stopped:
                raise GivenUp from None
            raise

    def _answer(
        self, inputs: dict[str, Any], on_draft: Callable[[str], None], stopping: Stopping
    ) -> ServedAnswer:
        stopping.check()
        drafted = attempt(lambda: self.program.ask_draft(**inputs))
        if drafted.outputs is None:
            kind = _failure_kind(drafted)
            if self.on_weak_failure == "error":
                raise Unanswered("weak", kind)
            so_far = ServedAnswer({}, "strong", "strong alone", None, {"weak": kind}, drafted.calls)
            return self._ask_strong(inputs, so_far, stopping)
        draft = drafted.outputs["draft"]
        with listening() as further:
            route = self._route(drafted.outputs, inputs)
        so_far = ServedAnswer(drafted.outputs, route, None, draft, {}, (*drafted.calls, *further))
        if route == "weak":
            return so_far
        on_draft(draft)
        return self._ask_strong(inputs, so_far, stopping)

    def _route(self, outputs: dict[str, Any], inputs: dict[str, Any]) -> Route:
        if self.router is None:
            return "collaborate"
        route = self.router.route(self.program, dspy.Prediction(**outputs), inputs)
        return check_route(route, self.program, outputs)

    def _ask_strong(
        self, inputs: dict[str, Any], so_far: ServedAnswer, stopping: Stopping
    ) -> ServedAnswer:
        """Ask the strong model, with the draft where the route wants it."""
        stopping.check()
        if so_far.route == "collaborate":
            made = attempt(lambda: self.program.ask_refine(so_far.draft or "", **inputs))
        else:
            made = attempt(lambda: self.program.ask_alone(**inputs))
        outputs, fallback, failed = made.outputs, so_far.fallback, dict(so_far.failed)
        if outputs is None:
            failed["strong"] = _failure_kind(made)
            if self.on_strong_failure == "error" or so_far.draft is None:
                raise Unanswered("strong", failed["strong"])
            outputs, fallback = so_far.outputs, "draft"
        return ServedAnswer(
            outputs, so_far.route, fallback, so_far.draft, failed, so_far.weak_calls, made.calls
        )


def _failure_kind(made: Attempt) -> str:
    return (made.error or "").partition(":")[0]
