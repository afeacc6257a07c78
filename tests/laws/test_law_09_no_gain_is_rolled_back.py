"""Law 9: a round that does not help on held-out data is rolled back, and the report says so."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as some
from round_parts import (  # noqa: F401 - fixtures
    ALWAYS,
    NEVER,
    VOWELS,
    examples,
    match,
    optimizer,
    rules,
    strong_that_counts,
    student,
    taught,
)

from cowest_dspy import Collaboration, CoWest
from cowest_dspy.optimizers.rounds import decide, gain


def test_law_9_what_does_not_help_on_held_out_examples_is_rolled_back() -> None:
    before = {f"q{i}": float(i % 2) for i in range(40)}
    assert decide(gain(before, dict.fromkeys(before, 1.0)), rules()).accepted
    for after in (before, dict.fromkeys(before, 0.0), {**before, "q0": 1.0}):
        made = decide(gain(before, after), rules())
        assert not made.accepted and "interval" in made.reason
    assert "below 0" in decide(gain(before, dict.fromkeys(before, 0.0)), rules()).reason


@given(
    some.lists(
        some.tuples(
            some.sampled_from([0.0, 0.5, 1.0, None]), some.sampled_from([0.0, 0.5, 1.0, None])
        ),
        max_size=30,
    )
)
def test_law_9_nothing_is_taken_that_is_not_better(
    scores: list[tuple[float | None, float | None]],
) -> None:
    before = {str(place): one for place, (one, _) in enumerate(scores)}
    after = {str(place): other for place, (_, other) in enumerate(scores)}
    found = gain(before, after)
    assert not (decide(found, rules()).accepted and decide(gain(after, before), rules()).accepted)
    if decide(found, rules()).accepted:
        assert (found.mean is not None and found.mean > 0 and found.better > found.worse) or (
            found.mean and found.mean > 0
        )
    assert found.n <= found.examples == len(scores)


def test_law_9_a_round_that_was_rolled_back_leaves_the_model_as_it_was(
    student: Collaboration, optimizer: Callable[..., CoWest]
) -> None:
    same = optimizer(count=3, **NEVER).compile(
        student, trainset=examples("train", 10), valset=examples("dev", 4)
    )
    (one,) = same.rounds
    assert (not one.accepted and "does not lie above 1" in one.reason) or "below 1" in one.reason
    assert same.weak.model == student.weak.model
    patient = optimizer(count=2, patience=2, **NEVER).compile(
        student, trainset=examples("train", 10), valset=examples("dev", 4)
    )
    assert [one.accepted for one in patient.rounds] == [False, False]
    assert patient.rounds[1].start == student.weak.model
