"""Law 2: a draft that hurt is never chosen; chosen and rejected differ and come from one example
and one prompt."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from pair_traces import examples, made_trace, many, rules, sides
from scripted import made_trace

from cowest_dspy.pairs import preference_pairs
from cowest_dspy.pairs.texts import word_count

graded = st.one_of(st.none(), st.sampled_from([-1.0, -0.5, 0.0, 0.25, 0.5, 1.0]))


drafts = st.lists(st.tuples(graded, st.sampled_from("abcdef")), min_size=0, max_size=8)


@given(st.lists(drafts, max_size=4), st.sampled_from([0.25, 0.5, 1.0]), st.integers(1, 3))
def test_law_2_chosen_never_hurt_and_pairs_differ(
    examples: list[Any], margin: float, per_example: int
) -> None:
    traces = [
        made_trace(index, influence, text, f"e{number}")
        for number, example in enumerate(examples)
        for index, (influence, text) in enumerate(example)
    ]
    pairs = preference_pairs(traces, margin=margin, per_example=per_example)
    influence = {(trace.example_id, trace.draft_index): trace.influence for trace in traces}
    for pair in pairs:
        assert pair.chosen_influence is not None and pair.rejected_influence is not None
        assert pair.chosen_influence >= 0
        assert pair.chosen_influence - pair.rejected_influence >= margin
        assert pair.chosen != pair.rejected
        assert pair.prompt[0]["content"] == f"prompt of {pair.example_id}"
        assert influence[pair.example_id, pair.chosen_index] == pair.chosen_influence
        assert influence[pair.example_id, pair.rejected_index] == pair.rejected_influence
    rejected = [(pair.example_id, pair.rejected_index) for pair in pairs]
    assert len(rejected) == len(set(rejected))
    assert not set(rejected) & {(pair.example_id, pair.chosen_index) for pair in pairs}
    assert preference_pairs(traces, margin=margin, per_example=per_example) == pairs


@given(examples, rules)
def test_law_2_holds_for_every_strategy(
    drafts: list[list[tuple[float | None, str]]], rules: dict[str, Any]
) -> None:
    traces = many(drafts)
    pairs = preference_pairs(traces, **rules)
    of = {(trace.example_id, trace.draft_index): trace for trace in traces}
    for pair in pairs:
        chosen, rejected = (
            of[pair.example_id, pair.chosen_index],
            of[pair.example_id, pair.rejected_index],
        )
        assert chosen.influence is not None and rejected.influence is not None
        assert (pair.chosen_influence, pair.rejected_influence) == (
            chosen.influence,
            rejected.influence,
        )
        assert chosen.influence >= 0 and chosen.influence - rejected.influence >= rules["margin"]
        assert pair.prompt == chosen.prompt == rejected.prompt
        assert (pair.chosen[0]["content"], pair.rejected[0]["content"]) == (
            chosen.completion,
            rejected.completion,
        )
        assert chosen.completion.lower() != rejected.completion.lower()
        assert rules["leak"] is None or "25 bar" not in chosen.completion
        if rules["length_ratio"]:
            short, long = sorted(map(word_count, (chosen.completion, rejected.completion)))
            assert long <= 2 * short
        if rules["strategy"] == "paper":
            assert chosen.influence > 0 >= rejected.influence
    once = [(pair.example_id, *both) for pair, both in zip(pairs, sides(pairs), strict=True)]
    assert len(set(once)) == len(once)
    assert preference_pairs(iter(traces), **rules) == pairs
