"""The warning that an arm's drafts do not depend on their inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import report_runs
from hypothesis import given
from hypothesis import strategies as st

from cowest_dspy.report import Arm
from cowest_dspy.report.numbers import LEAST, SHARE, describe_alike_drafts


def drafted(*drafts: str | None, title: str = "the arm") -> Arm:
    arm = report_runs.arm("arm", "+" * len(drafts))
    answers = tuple(
        replace(answer, draft=draft) for answer, draft in zip(arm.answers, drafts, strict=True)
    )
    return replace(arm, title=title, answers=answers)


@given(same=st.integers(0, 60), others=st.integers(0, 60), without=st.integers(0, 5))
def test_it_is_said_from_three_in_four_of_twenty_drafts_on(
    same: int, others: int, without: int
) -> None:
    arm = drafted(
        *["One  draft"] * same, *[f"another {i}" for i in range(others)], *[None] * without
    )
    n = same + others
    said = describe_alike_drafts([arm])
    assert bool(said) == (n >= LEAST and max(same, min(others, 1)) >= SHARE * n)
    if said:
        assert f"the arm ({same} of {n})" in said


def test_case_and_spaces_make_no_other_draft_and_the_text_is_not_quoted() -> None:
    said = describe_alike_drafts([drafted(*["Secret  words", "secret words\n"] * 10)])
    assert said and "20 of 20" in said and "ecret" not in said


@pytest.mark.parametrize(
    "arms", [[], [drafted()], [drafted(*[None] * 50)], [drafted(*map(str, range(50)))]]
)
def test_arms_without_drafts_or_with_different_ones_say_nothing(arms: list[Arm]) -> None:
    assert describe_alike_drafts(arms) is None


def test_one_sentence_names_all_such_arms() -> None:
    arms = [
        drafted(*["B"] * 24, title="before"),
        drafted(*map(str, range(24)), title="between"),
        drafted(*["A"] * 30, title="after"),
    ]
    said = describe_alike_drafts(arms) or ""
    assert "before (24 of 24); after (30 of 30)" in said and "between" not in said
