"""Scripted models that tests of baselines share."""

from __future__ import annotations

from typing import Any

import dspy

from cowest_dspy import (
    Collaboration,
)
from cowest_dspy.testing import ScriptedEngine


def refiner(fields: str = "question, background -> answer") -> dspy.Predict:
    return dspy.Predict(dspy.Signature(fields, "Answer."))  # pyright: ignore


def users(engine: ScriptedEngine) -> list[str]:
    """What the engine's requests said last."""
    return [request["messages"][-1]["content"] for request in engine.asked]


def prompts(engine: ScriptedEngine) -> str:
    return str([request["messages"] for request in engine.asked])


TASK = "Answer the question."


def collaboration(
    strong: ScriptedEngine, weak: ScriptedEngine | None = None, **settings: Any
) -> Collaboration:
    signature: Any = dspy.Signature("question -> answer", TASK)  # pyright: ignore
    weak = weak or ScriptedEngine({}, model="scripted/weak")
    return Collaboration(signature, **settings).bind(weak=weak.lm(), strong=strong.lm())
