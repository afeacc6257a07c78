"""The report's statistics obey their laws, its words are honest both ways, its JSON gives back what it was given."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_runs import HOSTILE, arm, full_run, run, trace

from cowest_dspy.errors import ReportError
from cowest_dspy.intervals import bootstrap_mean_interval, paired_difference_interval, share_interval
from cowest_dspy.report import (
    Answer,
    Arm,
    Curve,
    CurvePoint,
    InfluenceRow,
    RoundRow,
    RunReport,
    Stage,
    TraceRow,
    arm_table,
    figures,
    influence_by_round,
    influence_counts,
    paired_exact_test,
    verdict,
    wilson_interval,
    write_report,
)
from cowest_dspy.report.numbers import exact_sign_p

BINARY = st.lists(st.tuples(st.sampled_from([0.0, 1.0, None]), st.sampled_from([0.0, 1.0, None])), max_size=60)


# Statistics


def test_the_exact_p_equals_the_binomial_test_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    for fixed in range(0, 26):
        for broken in range(0, 26):
            expected = stats.binomtest(fixed, fixed + broken, 0.5).pvalue if fixed + broken else 1.0
            assert exact_sign_p(fixed, broken) == pytest.approx(expected, rel=1e-9)
    assert exact_sign_p(45, 1) == pytest.approx(stats.binomtest(45, 46, 0.5).pvalue, rel=1e-9)


def test_the_wilson_interval_equals_the_one_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    for successes, n in ((0, 7), (3, 7), (7, 7), (84, 117), (1, 1000)):
        expected = stats.binomtest(successes, n).proportion_ci(0.9, method="wilson")
        found = wilson_interval(successes, n, 0.9)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_the_interval_of_a_paired_difference_agrees_with_the_published_example():
    found = paired_difference_interval(36, 12, 2, 0)  # Newcombe 1998, table II, method 10
    assert (found.low, found.high) == pytest.approx((0.0569, 0.3404), abs=5e-5)


@given(st.integers(0, 3000), st.integers(0, 3000))
@settings(max_examples=60)
def test_the_exact_p_is_symmetric_and_above_zero_and_at_most_one(fixed, broken):
    p = exact_sign_p(fixed, broken)
    assert 0 < p <= 1
    assert p == exact_sign_p(broken, fixed)
    assert p == 1.0 or abs(fixed - broken) > 1


def test_a_share_that_was_never_seen_has_an_interval_with_a_width():
    found = share_interval([[False] * 6] * 8)
    assert found == wilson_interval(0, 8) and found and found.high > 0.3
    assert share_interval([[True, True]] * 8) == wilson_interval(8, 8)
    mixed = [[True, False], [False], [True]]
    assert share_interval(mixed, seed=2) == bootstrap_mean_interval([[float(one) for one in group] for group in mixed], seed=2)
    assert share_interval([[False] * 9]) is None and share_interval([]) is None


@given(st.integers(0, 500), st.integers(0, 500), st.floats(0.5, 0.999))
def test_a_wilson_interval_lies_in_the_unit_range_around_the_share(successes, rest, level):
    n = successes + rest
    found = wilson_interval(successes, n, level)
    assert 0 <= found.low <= found.high <= 1
    assert not n or found.low - 1e-12 <= successes / n <= found.high + 1e-12


@given(BINARY)
def test_turning_a_comparison_round_swaps_fixed_and_broken_and_the_signs(pairs):
    first = {str(index): a for index, (a, _) in enumerate(pairs)}
    second = {str(index): b for index, (_, b) in enumerate(pairs)}
    one, other = paired_exact_test(first, second), paired_exact_test(second, first)
    assert (one.n, one.fixed, one.broken, one.p, one.left_out) == (
        other.n,
        other.broken,
        other.fixed,
        other.p,
        other.left_out,
    )
    assert one.n + one.left_out == len(pairs)
    if one.interval and other.interval and one.difference is not None and other.difference is not None:
        assert one.difference == pytest.approx(-other.difference)
        assert (one.interval.low, one.interval.high) == pytest.approx((-other.interval.high, -other.interval.low))
        assert one.interval.low - 1e-9 <= one.difference <= one.interval.high + 1e-9


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, None]), max_size=40))
@settings(max_examples=25)
def test_an_arm_against_itself_has_p_one_and_no_difference(scores):
    same = {str(index): score for index, score in enumerate(scores)}
    found = paired_exact_test(same, same)
    assert (found.fixed, found.broken, found.p) == (0, 0, 1.0)
    assert found.difference in (0.0, None)


def test_a_failed_answer_is_left_out_of_the_test_and_counted():
    report = run(arm("strong", "+-!--"), arm("both", "++++!"))
    strong, both = arm_table(report)
    assert (strong.asked, strong.answered, strong.failed, strong.correct) == (5, 4, 1, 1)
    assert strong.accuracy == 0.25 and strong.strict_accuracy == 0.2
    assert both.accuracy == 1.0 and both.strict_accuracy == 0.8 and both.test is None
    assert strong.test is not None
    assert (strong.test.n, strong.test.left_out, strong.test.fixed, strong.test.broken) == (3, 2, 0, 2)


def test_an_example_that_only_one_arm_was_asked_is_left_out_and_counted():
    found = paired_exact_test({"a": 1.0, "b": 0.0}, {"b": 1.0, "c": 1.0, "d": None})
    assert (found.n, found.left_out, found.fixed) == (1, 3, 1)


def test_graded_scores_have_a_mean_with_a_bootstrap_interval_and_no_count_of_correct():
    answers = tuple(Answer(str(i), {}, "", "x", i / 10) for i in range(11))
    line = arm_table(run(Arm("both", "Both", answers)))[0]
    assert line.correct is None and line.accuracy == pytest.approx(0.5)
    assert line.interval is not None and line.interval.low < 0.5 < line.interval.high


def test_the_bootstrap_repeats_itself_and_says_nothing_about_a_single_example():
    groups = [[0.0, 1.0], [1.0], [-1.0, 0.0, 0.0]]
    assert bootstrap_mean_interval(groups, seed=3) == bootstrap_mean_interval(groups, seed=3)
    assert bootstrap_mean_interval([[1.0, 1.0, 1.0]]) is None


def test_the_bootstrap_draws_examples_so_that_copies_of_a_draft_do_not_narrow_it():
    once = [[float(i % 2)] for i in range(20)]
    copies = [group * 10 for group in once]
    assert bootstrap_mean_interval(once) == bootstrap_mean_interval(copies)


def test_influence_counts_failures_apart_and_splits_rounds():
    report = full_run()
    counts = influence_counts(report.influence)
    assert (counts.helped, counts.hurt, counts.same, counts.failed, counts.n) == (1, 1, 1, 1, 4)
    assert counts.mean == 0.0
    assert {number: c.n for number, c in influence_by_round(report.influence).items()} == {1: 2, 2: 2}
    assert influence_counts([]).mean is None


def test_rounding_noise_of_graded_scores_is_not_an_influence():
    counts = influence_counts([InfluenceRow("a", 0, 0.1 + 0.2 - 0.3)])
    assert (counts.helped, counts.same) == (0, 1)


# Words


def test_the_verdict_claims_a_gain_only_when_the_test_does():
    gain = verdict(run(arm("strong", "-" * 40), arm("sft", "-" * 40), arm("both", "+" * 30 + "-" * 10)))
    assert gain.good is True
    assert gain.sentences == (
        "The both arm beats the strong model alone by 75.0 points [57.5, 85.8], n 40, p < 0.001; "
        "tuning helped: it fixed 30 and broke 0 of 40 (p < 0.001).",
    )


def test_the_verdict_says_so_when_the_collaboration_loses_or_nothing_can_be_told():
    worse = verdict(run(arm("strong", "+" * 40), arm("sft", "+" * 40), arm("both", "-" * 30 + "+" * 10)))
    assert worse.good is False
    assert "is WORSE than the strong model alone by 75.0 points [57.5, 85.8]" in worse.sentences[0]
    assert "; tuning did HARM: it fixed 0 and broke 30" in worse.sentences[0]
    close = verdict(run(arm("strong", "+-+-"), arm("sft", "+-+-"), arm("both", "+++-")))
    assert close.good is False
    assert "does NOT reliably beat" in close.sentences[0] and "; tuning made NO reliable difference" in close.sentences[0]


def test_the_verdict_is_one_sentence_that_also_says_which_rounds_were_taken():
    arms = arm("strong", "-" * 40), arm("sft", "-" * 40), arm("both", "+" * 30 + "-" * 10), arm("weak", "-" * 40)
    rounds = tuple(RoundRow(number, 9, 0, number == 1, "why") for number in (1, 2, 3))
    found = verdict(run(*arms, rounds=rounds, rivals=("strong", "weak")))
    first, second = found.sentences
    assert "p < 0.001; round 1 was taken, rounds 2 and 3 were rolled back; tuning helped:" in first
    assert second.startswith("The both arm beats the weak model alone by 75.0 points")
    alone = verdict(run(*arms[:1], arms[2], rounds=rounds[:1])).sentences
    assert len(alone) == 1 and alone[0].endswith("p < 0.001; round 1 was taken.")


def test_before_tuning_the_verdict_speaks_of_the_collaboration_that_there_is():
    report = run(arm("strong", "-" * 40), arm("sft", "+" * 30 + "-" * 10), arm("oracle", "+" * 40))
    assert report.judged == "sft"
    assert verdict(report).sentences == ("The sft arm beats the strong model alone by 75.0 points [57.5, 85.8], n 40, p < 0.001.",)
    lines = {line.name: line for line in arm_table(report)}
    assert lines["sft"].is_reference and lines["oracle"].test and lines["oracle"].test.fixed == 10
    assert run(arm("strong", "+-")).judged == "both"


def test_one_lost_claim_spoils_the_verdict():
    found = verdict(run(arm("strong", "-" * 40), arm("sft", "+" * 40), arm("both", "+" * 40)))
    assert "beats" in found.sentences[0] and found.good is False


def test_a_run_without_anything_to_compare_has_no_verdict():
    assert verdict(run()).good is None
    assert "The strong arm" in verdict(run(arm("strong", "+-"))).sentences[0]


# Model


def test_a_report_survives_the_round_trip_through_json_text():
    report = full_run(HOSTILE)
    assert RunReport.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_half_a_surrogate_pair_does_not_stop_a_report(tmp_path):
    assert write_report(full_run("broken \ud800 text"), tmp_path).html.exists()


def test_what_json_cannot_say_is_none_or_text():
    report = run(curves=(Curve("sft", (CurvePoint(1.0, math.nan),)),), config={"path": Path("a/b"), "x": {1.5: object}})
    document = json.dumps(report.to_json(), allow_nan=False)
    assert json.loads(document)["curves"][0]["points"][0]["loss"] is None
    assert json.loads(document)["config"]["path"] == "a/b"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 99}, "schema_version 99"),
        ({"surprise": 1}, "surprise"),
        ({"seed": "many"}, "seed"),
        ({"arms": [{"name": "a", "title": "A", "answers": [{"example_id": "1"}]}]}, r"arms\.0\.answers\.0"),
    ],
)
def test_a_report_of_another_shape_is_refused_with_what_to_type(change, message):
    with pytest.raises(ReportError, match=message) as caught:
        RunReport.from_json({**full_run().to_json(), **change})
    assert "cowest report" in str(caught.value)


@pytest.mark.parametrize(("score", "error"), [(None, None), (0.0, "timeout: 60 s"), (1.5, None), (math.nan, None)])
def test_an_answer_has_a_score_in_the_unit_range_or_an_error_and_never_both(score, error):
    with pytest.raises(ReportError):
        Answer("q", {}, "gold", "text", score, error)


def test_a_draft_has_an_influence_or_an_error():
    with pytest.raises(ReportError):
        InfluenceRow("q", 0, None)


def test_an_arm_answers_an_example_once_and_arms_have_different_names():
    with pytest.raises(ReportError, match='"q0" twice'):
        Arm("a", "A", arm("a", "+").answers * 2)
    with pytest.raises(ReportError, match="different names"):
        run(arm("a", "+"), arm("a", "-"))


def test_a_curve_from_trl_keeps_steps_and_leaves_summaries_out():
    history = [
        {"step": 1, "loss": "0.69", "rewards/margins": 0.0, "rewards/accuracies": 0.5},
        {"step": 2, "loss": math.nan, "rewards/margins": 0.2},
        {"step": 2, "train_runtime": 9.0},
    ]
    points = Curve.from_trl("dpo", history).points
    assert points == (CurvePoint(1.0, 0.69, 0.0, 0.5), CurvePoint(2.0, None, 0.2, None))


def test_a_curve_from_trl_has_its_evaluations_as_points_of_their_own():
    history = [
        {"step": 0, "epoch": 0.0, "eval_loss": 0.7, "eval_kl": 0.0},
        {"step": 1, "loss": 0.6, "kl": -0.1},
        {"step": 1, "epoch": 1.0, "eval_loss": math.nan, "eval_rewards/margins": 0.2},
        {"step": 2, "eval_loss": 0.5, "eval_rewards/margins": 0.2, "eval_rewards/accuracies": 1.0, "eval_kl": 0.3},
    ]
    assert Curve.from_trl("dpo", history).points == (
        CurvePoint(0.0, eval_loss=0.7, eval_kl=0.0),
        CurvePoint(1.0, 0.6, kl=-0.1),
        CurvePoint(2.0, eval_loss=0.5, eval_reward_margin=0.2, eval_reward_accuracy=1.0, eval_kl=0.3),
    )


def test_a_trace_row_takes_the_fields_it_shows_from_anything_that_has_them():
    row = trace(0)
    assert TraceRow.of(SimpleNamespace(**dataclasses.asdict(row), tokens={}, prompt=())) == row


# The examples in the docstrings


@pytest.mark.parametrize(
    "name", ["intervals", "report.differing", "report.figures", "report.masking", "report.model", "report.verdict"]
)
def test_the_examples_in_the_docstrings_are_true(name):
    module = importlib.import_module(f"cowest_dspy.{name}")
    found = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert found.attempted > 0 and found.failed == 0


def test_a_stage_without_calls_leaves_the_price_of_the_others_known() -> None:
    """The page said "unknown" of such stages and the notebook's view their price."""
    priced = Stage("collect", 2.0, calls=3, usd=0.5)
    assert figures(run(stages=(priced, Stage("dpo", 3.0)))).totals.usd == 0.5
    assert figures(run(stages=(priced, Stage("evaluate", 3.0, calls=1)))).totals.usd is None
