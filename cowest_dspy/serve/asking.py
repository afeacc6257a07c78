"""Answering: one request through the phases of a collaboration, with declared fallbacks where a
model fails.

    draft      the weak model's; where it fails: the strong model alone, or an error
    route      where a router is given, it says after the draft: "weak", "strong" or "collaborate"
    answer     the strong model's; where it fails: an error, or the draft, marked as such

A model that fails again and again is not asked for a while (breaker.py). What a caller has given up
is not asked either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import dspy

from cowest_dspy.errors import CowestError, ProgramError
from cowest_dspy.influence.metric import Attempt, attempt
from cowest_dspy.optimizers.router import ROUTES, Route
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.serve.breaker import Breaker
from cowest_dspy.serve.config import BreakerRules
from cowest_dspy.serve.protocol import Failing
from cowest_dspy.store.rate_limit import Stopping, joining
from cowest_dspy.store.record import Call, listening

Fallback = Literal["strong alone", "draft"]
OF_THE_INPUT = ("parse", "refusal", "truncated", "context")
"""Kinds of failures that another input need not meet: the model works, and a breaker counts them as
answers."""
NOT_ASKED = "not asked"
"""The kind of a failure of a model whose breaker is open."""


class Router(Protocol):
    """Says after the draft who answers."""

    def route(
        self, program: Collaboration, outputs: dspy.Prediction, inputs: dict[str, Any]
    ) -> Route:
        """``outputs`` is what ``program.draft_outputs`` gave; ``inputs`` are the program's. A router
        is one (``Router.load``)."""
        ...


class GivenUp(Exception):
    """Nobody waits for the answer any more; nothing else is asked for it."""


class Unanswered(CowestError):
    """There is no answer: ``role`` is the model that failed, ``kind`` how (timeout, rate limit,
    server, parse ...), ``retry_after`` the seconds until it is tried again, where it is left alone
    for now."""

    def __init__(self, role: Failing, kind: str, retry_after: float | None = None) -> None:
        self.role: Failing = role
        self.kind, self.retry_after = kind, retry_after
        how = (
            "it failed too often and is left alone for a while"
            if kind == NOT_ASKED
            else f"it failed ({kind})"
        )
        super().__init__(f"The {role} model gave no usable answer: {how}.")


@dataclass(frozen=True)
class Fallbacks:
    """What is done where a model fails."""

    on_weak_failure: Literal["strong", "error"] = "strong"
    on_strong_failure: Literal["error", "draft"] = "error"


@dataclass(frozen=True)
class Answer:
    """What a request was answered with.

    ``outputs`` are fields by name; of the fallback "draft" they are those of the draft. ``draft``
    is None where there is none, or none was asked. ``failed`` names each model that failed, with
    the kind. ``calls`` are those of both models, in order.
    """

    outputs: dict[str, Any]
    route: Route
    fallback: Fallback | None = None
    draft: str | None = None
    failed: dict[Failing, str] = field(default_factory=dict)
    weak_calls: tuple[Call, ...] = ()
    strong_calls: tuple[Call, ...] = ()

    @property
    def tokens(self) -> dict[str, int]:
        """weak_in, weak_out, strong_in, strong_out."""
        counted = (("weak", self.weak_calls), ("strong", self.strong_calls))
        return {
            f"{role}_{way}": _sum(calls, way) for role, calls in counted for way in ("in", "out")
        }


def _sum(calls: Iterable[Call], way: str) -> int:
    return sum(call.input_tokens if way == "in" else call.output_tokens for call in calls)


class Answering:
    """A bound program that answers requests from several threads.

    Args:
        program: both models bound. A router needs nothing more; "weak" needs drafts that hold the
            answer's fields.
        router: who answers, asked after each draft; without one always both.
        breaker: the rules of both models' breakers.

    Raises:
        ProgramError: the program is not bound.
    """

    def __init__(
        self,
        program: Collaboration,
        router: Router | None = None,
        *,
        fallbacks: Fallbacks | None = None,
        breaker: BreakerRules | None = None,
    ) -> None:
        _ = program.strong, program.weak.model if program.draft.predictors() else ""
        self.program, self.router, self.fallbacks = program, router, fallbacks or Fallbacks()
        rules = breaker or BreakerRules()  # pyright: ignore[reportCallIssue]
        self.breakers: dict[Failing, Breaker] = {"weak": Breaker(rules), "strong": Breaker(rules)}

    @property
    def models(self) -> dict[Failing, str]:
        """The ids of both models; a draft that asks no model has the name of its module."""
        drafter = self.program.draft
        weak = self.program.weak.model if drafter.predictors() else type(drafter).__name__
        return {"weak": weak, "strong": self.program.strong.model}

    def answer(
        self,
        inputs: dict[str, Any],
        *,
        drafted: Callable[[str], None] | None = None,
        stopping: Stopping | None = None,
    ) -> Answer:
        """The answer to one request.

        Args:
            inputs: the program's, by name.
            drafted: told the draft as soon as it is there, before the strong model is asked.
            stopping: stopped when nobody waits any more: waits for a rate limit end, and no model
                is asked after that.

        Raises:
            Unanswered: a model failed, and the fallback is an error, or failed too.
            GivenUp: it was stopped.
            ProgramError: the router said what cannot be.
        """
        given_up = stopping or Stopping()
        try:
            # DSPy's history would hold every request.
            with joining(given_up), dspy.context(trace=None, disable_history=True):
                return self._answer(inputs, drafted or (lambda _: None), given_up)
        except KeyboardInterrupt:
            if given_up.stopped:
                raise GivenUp from None
            raise

    def _answer(
        self, inputs: dict[str, Any], drafted: Callable[[str], None], stopping: Stopping
    ) -> Answer:
        draft = self._ask("weak", lambda: self.program.draft_outputs(**inputs), stopping)
        if draft.outputs is None:
            kind = _kind(draft)
            if self.fallbacks.on_weak_failure == "error":
                raise self._unanswered("weak", kind)
            return self._strong(
                inputs,
                Answer({}, "strong", "strong alone", None, {"weak": kind}, draft.calls),
                stopping,
            )
        text = draft.outputs["draft"]
        with listening() as further:
            route = self._route(draft.outputs, inputs)
        so_far = Answer(draft.outputs, route, None, text, {}, (*draft.calls, *further))
        if route == "weak":
            return so_far
        drafted(text)
        return self._strong(inputs, so_far, stopping)

    def _route(self, outputs: dict[str, Any], inputs: dict[str, Any]) -> Route:
        route = (
            "collaborate"
            if self.router is None
            else self.router.route(self.program, dspy.Prediction(**outputs), inputs)
        )
        if route not in ROUTES:
            raise ProgramError(
                f'The router said "{route}": it must say one of {", ".join(ROUTES)}.'
            )
        if route == "weak" and not self.program.holds_answer(outputs):
            wanted = ", ".join(self.program.answer_fields)
            raise ProgramError(
                f'The router said "weak", and the draft has no {wanted}: drafts of the format '
                '"direct" have.'
            )
        return route

    def _strong(self, inputs: dict[str, Any], so_far: Answer, stopping: Stopping) -> Answer:
        """The strong model's answer, with the draft where the route wants it."""
        if so_far.route == "collaborate":
            made = self._ask(
                "strong", lambda: self.program.refined(so_far.draft or "", **inputs), stopping
            )
        else:
            made = self._ask("strong", lambda: self.program.ask_alone(**inputs), stopping)
        facts = {"draft": so_far.draft, "weak_calls": so_far.weak_calls, "strong_calls": made.calls}
        if made.outputs is not None:
            return Answer(
                made.outputs, so_far.route, so_far.fallback, failed=so_far.failed, **facts
            )
        kind = _kind(made)
        if self.fallbacks.on_strong_failure == "error" or so_far.draft is None:
            raise self._unanswered("strong", kind)
        return Answer(
            so_far.outputs, so_far.route, "draft", failed={**so_far.failed, "strong": kind}, **facts
        )

    def _ask(
        self, role: Failing, step: Callable[[], dspy.Prediction], stopping: Stopping
    ) -> Attempt:
        """One phase, unless the model's breaker is open; its end is told to the breaker."""
        breaker = self.breakers[role]
        stopping.check()
        if not breaker.enter():
            return Attempt(None, f"{NOT_ASKED}: its breaker is open", ())
        try:
            made = attempt(step)
        except BaseException:
            breaker.released()
            raise
        if made.outputs is None and _kind(made) not in OF_THE_INPUT:
            breaker.failed()
        else:
            breaker.succeeded()
        return made

    def _unanswered(self, role: Failing, kind: str) -> Unanswered:
        return Unanswered(
            role, kind, self.breakers[role].seconds_left() if kind == NOT_ASKED else None
        )


def _kind(made: Attempt) -> str:
    return (made.error or "").partition(":")[0]
