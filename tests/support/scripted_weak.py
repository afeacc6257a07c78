"""A scripted weak model whose drafts depend on their seed, for tests of collection."""

from __future__ import annotations

from typing import Any

from cowest_dspy.testing import ScriptedEngine


def by_seed(request: dict[str, Any]) -> str:
    """A weak model: the question's number, something else, or nothing that can be told apart, as
    the seed wants it."""
    number = request["messages"][-1]["content"].split()[-1].rstrip("?")
    seed = request["config"]["seed"]
    return (
        {0: number, 1: f"not {number}", 2: "same"}[seed % 3] if int(number) % 4 else "always this"
    )


def weak_by_seed() -> ScriptedEngine:
    return ScriptedEngine(by_seed, model="scripted/weak")
