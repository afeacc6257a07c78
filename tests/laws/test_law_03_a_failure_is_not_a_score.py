"""Law 3: a failure is a recorded error, outside scores and pairs, counted in every table, and never
0.0."""

from __future__ import annotations

import inspect
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

from cowest_dspy import Collaboration, CoWest
from cowest_dspy.errors import CollectionError, ConfigError, DataError
from cowest_dspy.influence import Weighted
from cowest_dspy.influence.collection import collect
from cowest_dspy.influence.config import Collect
from cowest_dspy.influence.metric import Influence, attempt_score
from cowest_dspy.influence.report import InfluenceReport
from cowest_dspy.influence.trace import Sampling
from cowest_dspy.optimizers.rounds import Decision, decide, gain
from cowest_dspy.pairs import preference_pairs
from cowest_dspy.store.call_context import listening
from cowest_dspy.testing import ScriptedEngine


@pytest.mark.parametrize(
    "broken", [RateLimitError("slow down"), ServerError("500"), "", "cut off in the middle ..."]
)
def test_law_3_a_failure_is_not_a_score(broken: str | Exception) -> None:
    def weak(request: dict[str, Any]) -> str | Exception:
        return broken if "number 1" in request["messages"][-1]["content"] else "fine"

    traces = collect(
        together(ScriptedEngine(weak), strong_that_reads()),
        questions(3),
        match,
        Sampling(drafts=2),
        max_errors=1.0,
    )
    failed = [trace for trace in traces if trace.example_id == "q1"]
    assert all(
        trace.error and trace.influence is None and trace.refined_score is None for trace in failed
    )
    assert InfluenceReport.from_traces(traces).failed == len(failed) == 2
    assert all(trace.influence is not None for trace in traces if trace.example_id != "q1")
    assert "q1" not in {pair.example_id for pair in preference_pairs(traces)}


@pytest.mark.parametrize("broken", [RateLimitError("slow down"), "", "cut off in the middle ..."])
@pytest.mark.parametrize("step", ["refine", "alone"])
def test_law_3_a_failure_of_the_strong_model_is_not_a_score_either(
    step: str, broken: str | Exception
) -> None:
    def strong(request: dict[str, Any]) -> str | Exception:
        text = request["messages"][-1]["content"]
        fails = "number 1" in text and ("Background" in text) == (step == "refine")
        return broken if fails else "fine"

    program = together(
        ScriptedEngine(lambda request: "a note"), ScriptedEngine(strong, model="scripted/strong")
    )
    traces = collect(program, questions(3), match, Sampling(drafts=2), max_errors=1.0)
    failed = [trace for trace in traces if trace.example_id == "q1"]
    assert len(failed) == 2 and all(trace.error and trace.influence is None for trace in failed)
    assert all(
        (trace.refined_score if step == "refine" else trace.alone_score) is None for trace in failed
    )
    assert InfluenceReport.from_traces(traces).failed == 2
    assert "q1" not in {pair.example_id for pair in preference_pairs(traces)}


@pytest.mark.parametrize(
    "said",
    [
        "Reason: r\nCoherence: 6\nConsistency: 3",
        "Reason: r\nCoherence: good\nConsistency: 3",
        "no idea",
    ],
)
def test_law_3_a_rating_that_cannot_be_read_is_a_failure_and_no_score(said: str) -> None:
    judge, _ = judge_of(said)
    with pytest.raises(AdapterParseError):
        judge(example(), dspy.Prediction(answer="180"))
    found = attempt_score(judge, example(), {"answer": "180"})
    assert found.score is None and (found.error or "").startswith("judge parse: ")


def test_law_3_a_judge_that_is_down_fails_the_drafts_and_makes_no_pair() -> None:
    def down(request: dict[str, Any]) -> str:
        if "Answer: 1" in request["messages"][-1]["content"]:
            return GOOD
        raise dspy.lm15.ServerError("down")  # pyright: ignore[reportAttributeAccessIssue]

    judge, _ = judge_of(down)
    program = together(weak_that_varies(["{n}", "x"]), strong_that_reads())
    traces = collect(program, questions(3), judge, Sampling(drafts=2), max_errors=1.0)
    assert all(
        trace.influence is None and "judge server" in (trace.error or "") for trace in traces
    )
    assert len(preference_pairs(traces)) == 0


def test_law_3_when_one_part_fails_the_whole_fails() -> None:
    judge, _ = judge_of("no idea")
    found = attempt_score(
        Weighted(metric=(match, 1.0), judge=(judge, 1.0)), example(), {"answer": "180"}
    )
    assert found.score is None and found.error
    for parts in ({}, {"metric": (match, 0.0)}, {"metric": (match, math.nan)}):
        with pytest.raises(ConfigError, match="above 0"):
            Weighted(**parts)


def test_law_3_a_judge_that_fails_is_a_failure_in_the_report() -> None:
    judge, _ = judge_of("no idea")
    report = Influence(judge, together(weak_that_varies(["{n}"]), strong_that_reads())).report(
        questions(3)
    )
    assert (report.failed, report.scored) == (3, [])


def test_law_3_failures_are_no_scores_and_more_of_them_are_no_gain() -> None:
    before: dict[str, float | None] = {f"q{i}": 0.0 for i in range(40)}
    after: dict[str, float | None] = {
        name: 1.0 if place > 9 else None for place, name in enumerate(before)
    }
    found = gain(before, after)
    assert (found.n, found.mean, found.failed_after, found.better) == (30, 1.0, 10, 30)
    made = decide(found, rules())
    assert (
        made == Decision(False, made.reason)
        and "fails on 10 of 40 examples, 10 more than before" in made.reason
    )
    assert decide(found, rules(more_failures=0.25)).accepted


def cut_off_at(*numbers: int) -> ScriptedEngine:
    """A weak model that names the number of each question; drafts of these questions do not come to
    an end."""

    def weak(request: dict[str, Any]) -> str:
        number = request["messages"][-1]["content"].split()[-1].rstrip("?")
        return "it goes on and on ..." if int(number) in numbers else number

    return ScriptedEngine(weak, model="scripted/weak")


def test_law_3_a_report_of_influence_names_the_kinds_of_its_failures() -> None:
    """It said "failed 15  n 20", and no cause."""
    report = Influence(match, together(cut_off_at(*range(15)), strong_that_reads())).report(
        questions(20)
    )
    assert report.failures == {"truncated": 15} and report.failed == 15
    counts, advice = str(report).splitlines()
    assert counts.endswith("helped 5  hurt 0  same 0  failed 15 (truncated 15)  n 20")
    assert advice.startswith("truncated: raise max_tokens of the weak model")
    assert "failed: truncated 15" in report._repr_html_()
    traces = collect(
        together(cut_off_at(1), strong_that_reads()),
        questions(2),
        match,
        Sampling(drafts=2),
        max_errors=1.0,
    )
    assert InfluenceReport.from_traces(traces).failures == {
        "truncated": 2
    } and "failed 2 (truncated 2)" in repr(traces)


def test_law_3_a_failure_of_the_strong_model_alone_or_of_a_judge_has_its_kind() -> None:
    def strong(request: dict[str, Any]) -> str | Exception:
        return "yes" if "Background" in request["messages"][-1]["content"] else ServerError("down")

    alone = Influence(match, together(cut_off_at(), ScriptedEngine(strong))).report(questions(2))
    assert alone.failures == {"alone server": 2}
    judge, _ = judge_of("no idea")
    assert Influence(judge, together(cut_off_at(), strong_that_reads())).report(
        questions(2)
    ).failures == {"refine judge parse": 2}


def test_law_3_of_an_answer_that_was_cut_off_the_report_and_a_collection_name_the_strong_model() -> (
    None
):
    """The report said "of the model that was cut off" and not of which; one that nothing can be
    read from for want of the facts is no failure of a format."""
    cut = together(cut_off_at(), ScriptedEngine(lambda _: "so it goes on ..."))
    report = Influence(match, cut).report(questions(3))
    assert report.failures == {"refine truncated": 3}
    assert str(report).endswith("(refine truncated 3): raise max_tokens of the strong model")
    with pytest.raises(CollectionError, match=r"Raise max_tokens of the strong model and run"):
        collect(cut, questions(3), match, Sampling(drafts=2))

    def strong(request: dict[str, Any]) -> str:
        text = request["messages"][-1]["content"]
        return "5" if "Background" in text else "I cannot know this"

    class Counted(dspy.Signature):
        """Answer."""

        question: str = dspy.InputField()
        background: str = dspy.InputField()
        answer: int = dspy.OutputField()

    program = Collaboration(
        draft=dspy.Predict("question -> background"), refine=dspy.Predict(Counted)
    ).bind(weak=cut_off_at().lm(), strong=ScriptedEngine(strong).lm())
    unread = Influence(match, program).report(questions(2))
    assert unread.failures == {"alone parse": 2} and "let the answer be a str" in str(unread)


def test_law_3_dspy_evaluate_is_told_of_a_truncated_draft_and_makes_it_no_influence() -> None:
    """It counted the rows that the report called failed."""
    program = together(cut_off_at(1, 2), strong_that_reads())
    influence = Influence(match, program)
    with pytest.raises(
        DataError, match=r"failed on example q1 \(truncated: max_tokens .*A failure is not a score"
    ):
        influence(questions(2)[1], program(question=questions(2)[1].question))
    found = dspy.Evaluate(
        devset=questions(4), metric=influence, failure_score=math.nan, num_threads=2
    )(program)
    assert [score for *_, score in found.results if not math.isnan(score)] == [1.0, 1.0]
    assert math.isnan(found.score), "no mean is made of what has failures in it"
    with listening() as calls:
        program(question=questions(2)[1].question)
    assert [call.finish_reason for call in calls] == ["length", "length"], (
        "whoever listens outside hears of every call"
    )


def test_law_3_python_and_toml_stop_at_the_same_part_of_failures() -> None:
    toml = Collect.model_fields["max_errors"].default
    defaults = {
        inspect.signature(made).parameters["max_errors"].default for made in (collect, CoWest)
    }
    assert defaults == {toml} == {0.3}
    with pytest.raises(
        CollectionError,
        match=r"10 of 20 drafts failed \(truncated 10\).* Raise max_tokens of the weak model",
    ):
        collect(
            together(cut_off_at(*range(0, 40, 2)), strong_that_reads()),
            questions(40),
            match,
            Sampling(drafts=2),
        )
