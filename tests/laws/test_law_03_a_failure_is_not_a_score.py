"""Law 3: a failure is a recorded error, outside scores and pairs, counted in every table, and never 0.0."""

from __future__ import annotations

import math
from typing import Any

import dspy
import pytest
from dspy.lm15 import RateLimitError, ServerError
from dspy.utils.exceptions import AdapterParseError
from round_parts import VOWELS, examples, match, rules, strong_that_counts, student, taught  # noqa: F401 - fixtures
from scripted import (
    GOOD,
    example,
    judge_of,
    match,
    questions,
    strong_that_reads,
    together,
    weak_that_varies,
)

from cowest_dspy import (
    Influence,
    Weighted,
)
from cowest_dspy.errors import ConfigError
from cowest_dspy.influence import Influence, scored
from cowest_dspy.pairs import preference_pairs
from cowest_dspy.rounds import Decision, decide, gain
from cowest_dspy.testing import ScriptedEngine
from cowest_dspy.traces import Sampling, collect, influence_report


@pytest.mark.parametrize("broken", [RateLimitError("slow down"), ServerError("500"), "", "cut off in the middle ..."])
def test_law_3_a_failure_is_not_a_score(broken: str | Exception) -> None:
    def weak(request: dict[str, Any]) -> str | Exception:
        return broken if "number 1" in request["messages"][-1]["content"] else "fine"

    traces = collect(together(ScriptedEngine(weak), strong_that_reads()), questions(3), match, Sampling(drafts=2))
    failed = [trace for trace in traces if trace.example_id == "q1"]
    assert all(trace.error and trace.influence is None and trace.refined_score is None for trace in failed)
    assert influence_report(traces).failed == len(failed) == 2
    assert all(trace.influence is not None for trace in traces if trace.example_id != "q1")
    assert "q1" not in {pair.example_id for pair in preference_pairs(traces)}


@pytest.mark.parametrize(
    "said", ["Reason: r\nCoherence: 6\nConsistency: 3", "Reason: r\nCoherence: good\nConsistency: 3", "no idea"]
)
def test_law_3_a_rating_that_cannot_be_read_is_a_failure_and_no_score(said: str) -> None:
    judge, _ = judge_of(said)
    with pytest.raises(AdapterParseError):
        judge(example(), dspy.Prediction(answer="180"))
    found = scored(judge, example(), {"answer": "180"})
    assert found.score is None and (found.error or "").startswith("judge parse: ")


def test_law_3_a_judge_that_is_down_fails_the_drafts_and_makes_no_pair() -> None:
    def down(request: dict[str, Any]) -> str:
        if "Answer: 1" in request["messages"][-1]["content"]:
            return GOOD
        raise dspy.lm15.ServerError("down")  # pyright: ignore[reportAttributeAccessIssue]

    judge, _ = judge_of(down)
    traces = collect(together(weak_that_varies(["{n}", "x"]), strong_that_reads()), questions(3), judge, Sampling(drafts=2))
    assert all(trace.influence is None and "judge server" in (trace.error or "") for trace in traces)
    assert len(preference_pairs(traces)) == 0


def test_law_3_when_one_part_fails_the_whole_fails() -> None:
    judge, _ = judge_of("no idea")
    found = scored(Weighted(metric=(match, 1.0), judge=(judge, 1.0)), example(), {"answer": "180"})
    assert found.score is None and found.error
    for parts in ({}, {"metric": (match, 0.0)}, {"metric": (match, math.nan)}):
        with pytest.raises(ConfigError, match="above 0"):
            Weighted(**parts)


def test_law_3_a_judge_that_fails_is_a_failure_in_the_report() -> None:
    judge, _ = judge_of("no idea")
    report = Influence(judge, together(weak_that_varies(["{n}"]), strong_that_reads())).report(questions(3))
    assert (report.failed, report.scored) == (3, [])


def test_law_3_failures_are_no_scores_and_more_of_them_are_no_gain() -> None:
    before: dict[str, float | None] = {f"q{i}": 0.0 for i in range(40)}
    after: dict[str, float | None] = {name: 1.0 if place > 9 else None for place, name in enumerate(before)}
    found = gain(before, after)
    assert (found.n, found.mean, found.failed_after, found.better) == (30, 1.0, 10, 30)
    made = decide(found, rules())
    assert made == Decision(False, made.reason) and "fails on 10 of 40 examples, 10 more than before" in made.reason
    assert decide(found, rules(more_failures=0.25)).accepted
