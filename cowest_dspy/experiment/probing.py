"""One question, as a run would ask it: the prompt that a model would get, and what its answer
takes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal

import dspy
from dspy.lm15 import InvalidRequestError, Request, Response

from cowest_dspy.errors import masked
from cowest_dspy.experiment.forecast import Probe
from cowest_dspy.influence.metric import Attempt, attempt
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.store import serialize

Level = Literal["ok", "warning", "error"]
LONGEST_LINE = 80


@dataclass(frozen=True)
class Task:
    """What models would be asked: the program, one example, and the size of each split."""

    program: Collaboration
    example: dspy.Example
    sizes: dict[str, int]


@dataclass(frozen=True)
class Answered:
    """What came of a question: how it is, in words, and the measured call when there was one."""

    level: Level
    text: str
    probe: Probe | None


class _Listener:
    """An engine that keeps requests and refuses them: what would be asked, without a model."""

    supports_function_calling = False
    supports_reasoning = False
    supports_response_schema = False
    supported_params = frozenset({"max_tokens", "temperature", "top_p", "stop", "seed"})

    def __init__(self) -> None:
        self.heard: list[list[dict[str, str]]] = []

    def complete(self, request: Request) -> Response:
        """Never answers."""
        self.heard.append(serialize.request_messages(request))
        raise InvalidRequestError("This engine only listens.")

    def stream(self, request: Request) -> Any:
        """Never answers."""
        return self.complete(request)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Listener:
        return self


def prompt_for(task: Task, role: str) -> list[dict[str, str]]:
    """The messages of the first call that the model in this role would get; for a strong one with
    an empty draft.

    An empty list when the program asks no model in this role.
    """
    listener = _Listener()
    lm = dspy.LM(
        "listening/only", engine=listener, cache=False, num_retries=0, temperature=0.0, max_tokens=1
    )
    bound = task.program.bind(weak=lm, strong=lm)
    inputs = dict(task.example.inputs().items())
    attempt(
        lambda: (
            dspy.Prediction(draft=bound.ask_draft(**inputs).draft)
            if role == "weak"
            else bound.ask_refine("-", **inputs)
        )
    )
    return listener.heard[0] if listener.heard else []


def ask_one(task: Task, role: str, lm: dspy.LM) -> Answered:
    """The example's answer by ``lm``: a draft by the weak one, an answer without a draft by any
    other; timed."""
    bound = task.program.bind(weak=lm, strong=lm)
    inputs = dict(task.example.inputs().items())
    started = time.monotonic()
    made = attempt(
        lambda: (
            dspy.Prediction(draft=bound.ask_draft(**inputs).draft)
            if role == "weak"
            else bound.ask_alone(**inputs)
        )
    )
    probe = _probe(role, lm.model, time.monotonic() - started, made) if made.calls else None
    level, text = _judged(made)
    return Answered(level, text, probe)


def _probe(role: str, model: str, seconds: float, made: Attempt) -> Probe:
    lines = made.calls[-1].text.strip().splitlines() or ["(nothing)"]
    input_tokens = sum(call.input_tokens for call in made.calls)
    output_tokens = sum(call.output_tokens for call in made.calls)
    return Probe(role, model, masked(lines[0])[:LONGEST_LINE], seconds, input_tokens, output_tokens)


def _judged(made: Attempt) -> tuple[Level, str]:
    if made.error is None:
        return "ok", "it answered a train question in the program's form"
    if not made.calls:
        return "error", f"it did not answer. {made.error}"
    if made.error.startswith("truncated"):
        return (
            "warning",
            (
                "it was cut off at max_tokens, which a run counts as failed: tune it first, or "
                "raise "
                "max_tokens"
            ),
        )
    return (
        "warning",
        f"it answered, but not in the program's form, which a run counts as failed. {made.error}",
    )
