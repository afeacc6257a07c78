"""Traces that the tests of pairs share: each an influence and a text, without any model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cowest_dspy.traces import Trace


def made_trace(index: int, influence: float | None, text: str, example: str = "e", **changes: Any) -> Trace:
    """Draft ``index`` of an example. One without an influence is one that failed."""
    values: dict[str, Any] = {
        "example_id": example,
        "draft_index": index,
        "round": 1,
        "inputs": {"question": f"What of {example}?"},
        "gold": {"answer": "25 bar"},
        "prompt": ({"role": "user", "content": f"prompt of {example}"},),
        "completion": text,
        "draft": text,
        "refined": {"answer": "x"},
        "alone": {"answer": "y"},
        "refined_score": None if influence is None else max(influence, 0.0),
        "alone_score": None if influence is None else max(-influence, 0.0),
        "influence": influence,
        "draft_score": None,
        "weak_model": "local/weak@aa",
        "strong_model": "openai/strong",
        "error": "timeout: too slow" if influence is None else None,
    }
    return Trace(**(values | changes))


def drafts_of(*drafts: tuple[float | None, str], example: str = "e", **changes: Any) -> list[Trace]:
    """The traces of one example from its drafts' influences and texts."""
    return [made_trace(index, influence, text, example, **changes) for index, (influence, text) in enumerate(drafts)]


def many(examples: Sequence[Sequence[tuple[float | None, str]]]) -> list[Trace]:
    """The traces of several examples, e0, e1, ..."""
    return [trace for number, drafts in enumerate(examples) for trace in drafts_of(*drafts, example=f"e{number}")]
