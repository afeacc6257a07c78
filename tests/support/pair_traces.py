"""Traces that the tests of pairs share: each an influence and a text, without any model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from cowest_dspy.influence.trace import Trace
from cowest_dspy.pairs import PreferencePairs


def made_trace(
    index: int, influence: float | None, text: str, example: str = "e", **changes: Any
) -> Trace:
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
    return [
        made_trace(index, influence, text, example, **changes)
        for index, (influence, text) in enumerate(drafts)
    ]


def many(examples: Sequence[Sequence[tuple[float | None, str]]]) -> list[Trace]:
    """The traces of several examples, e0, e1, ..."""
    return [
        trace
        for number, drafts in enumerate(examples)
        for trace in drafts_of(*drafts, example=f"e{number}")
    ]


STRATEGIES = ("ranked", "paper", "all")


TEXTS = (
    "alpha",
    "beta",
    "it says 25 bar",
    "a much longer text, with many words in it",
    "A much longer text, with many words in it",
)


influences = st.one_of(st.none(), st.sampled_from([-1.0, -0.5, -0.1, 0.0, 0.25, 0.5, 1.0]))


examples = st.lists(
    st.lists(st.tuples(influences, st.sampled_from(TEXTS)), min_size=1, max_size=8), max_size=4
)


rules = st.fixed_dictionaries(
    {
        "strategy": st.sampled_from(STRATEGIES),
        "margin": st.sampled_from([0.1, 0.5, 1.0]),
        "per_example": st.sampled_from([None, 1, 2, 5]),
        "leak": st.sampled_from([None, "answer"]),
        "length_ratio": st.sampled_from([None, 2.0]),
    }
)


def sides(pairs: PreferencePairs) -> list[tuple[int, int]]:
    return [(pair.chosen_index, pair.rejected_index) for pair in pairs]


long = (
    "The press of the works was built in the same year as the mill, and its service is due in "
    "spring, as always"
)
