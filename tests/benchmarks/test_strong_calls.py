"""benchmarks/strong_calls.py: which drafts its policies keep, what these cost, and its table; the
runs themselves take minutes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report_runs import trace

from cowest_dspy.influence.trace import Sampling, Trace
from cowest_dspy.utils.importing import load

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return lambda name: load(f"{FOLDER}/strong_calls.py:{name}")


def drafts(texts: str, influences: list[float], alone: float = 0.0) -> list[Trace]:
    return [
        replace(
            trace(index, influence, text),
            completion=text,
            alone_score=alone,
            refined_score=alone + influence,
        )
        for index, (text, influence) in enumerate(zip(texts, influences, strict=True))
    ]


def test_a_policy_keeps_the_first_drafts_and_a_text_costs_one_answer(calls: Any) -> None:
    whole = calls("Part")(
        [
            drafts("abca", [0, 1, 0, 0]),  # decided by the second
            drafts("aaaa", [0, 0, 0, 0]),  # all the same
            drafts("abcd", [0, 0, 0, 0], alone=1.0),  # right alone
        ]
    )
    kept = {name: policy(whole, Sampling(drafts=4)) for name, policy in calls("POLICIES").items()}
    assert {name: [len(one) for one in part.questions] for name, part in kept.items()} == {
        "four drafts": [4, 4, 4],
        "two drafts": [2, 2, 2],
        "four drafts, half of the questions": [4, 4],
        "adaptive": [2, 3, 3],
        "adaptive, where the strong model alone is wrong": [2, 3, 0],
    }
    assert [part.answers for part in kept.values()] == [11, 9, 6, 8, 9]


def test_the_table_counts_all_seeds_together_and_compares_with_all_drafts(calls: Any) -> None:
    outcome, policies = calls("Outcome"), calls("POLICIES")
    right = {str(n): 1.0 for n in range(8)}
    wrong = dict.fromkeys(right, 0.0)
    made = {"none": outcome(0, 0, wrong)} | {
        name: outcome(10 if name == "four drafts" else 5, 3, right) for name in policies
    }
    lines = calls("table")({0: made, 1: made}).splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [one[0] for one in cells] == ["none: before tuning", *policies]
    assert cells[1][1:5] == ["20", "100 %", "6", "16 of 16"] and cells[1][6] == "-"
    assert cells[2][1:3] == ["10", "50 %"] and cells[2][5].startswith("+100.0 ")
    assert cells[2][6].startswith("+0.0 ")
