"""The report's statistics obey their laws, its words are honest both ways, its JSON gives back what
it was given."""

from __future__ import annotations

import dataclasses
import doctest
import html
import importlib
import io
import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_runs import HOSTILE, arm, draft, full_run, gain, made_round, run
from rich.console import Console

from cowest_dspy.errors import ReportError
from cowest_dspy.influence.arms import Answer
from cowest_dspy.influence.statistics import (
    bootstrap_mean_interval,
    paired_difference_interval,
    share_interval,
    wilson_interval,
)
from cowest_dspy.influence.trace import Trace
from cowest_dspy.report import (
    Arm,
    PairsSummary,
    RunReport,
    Stage,
    arm_table,
    compare_scores,
    figures,
    influence_by_round,
    influence_counts,
    print_report,
    training_curve,
    verdict,
    write_report,
)
from cowest_dspy.report.significance import exact_sign_p
from cowest_dspy.report.verdict import explain_doubt

BINARY = st.lists(
    st.tuples(st.sampled_from([0.0, 1.0, None]), st.sampled_from([0.0, 1.0, None])), max_size=60
)


# Statistics


@pytest.mark.parametrize(
    ("fixed", "broken", "p"),
    [
        (0, 0, 1),
        (1, 0, 1),
        (4, 0, 2 / 2**4),
        (6, 0, 2 / 2**6),
        (7, 1, 18 / 2**8),
        (0, 45, 2 / 2**45),
    ],
)
def test_the_exact_p_counts_the_splits_that_are_as_uneven(fixed, broken, p):
    assert exact_sign_p(fixed, broken) == pytest.approx(p, rel=1e-9)


def test_the_wilson_interval_equals_the_one_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    for successes, n in ((0, 7), (3, 7), (7, 7), (84, 117), (1, 1000)):
        expected = stats.binomtest(successes, n).proportion_ci(0.9, method="wilson")
        found = wilson_interval(successes, n, 0.9)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_the_exact_p_equals_the_one_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    for higher, lower in ((2, 0), (9, 4), (30, 61), (700, 800), (0, 900)):
        expected = stats.binomtest(higher, higher + lower).pvalue
        assert exact_sign_p(higher, lower) == pytest.approx(expected, rel=1e-10)
    assert exact_sign_p(0, 2000) > 0


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
    assert share_interval(mixed, seed=2) == bootstrap_mean_interval(
        [[float(one) for one in group] for group in mixed], seed=2
    )
    assert share_interval([[False] * 9]) is None and share_interval([]) is None


@given(st.integers(0, 500), st.integers(0, 500), st.floats(0.5, 0.999))
def test_a_wilson_interval_lies_in_the_unit_range_around_the_share(successes, rest, level):
    n = successes + rest
    found = wilson_interval(successes, n, level)
    assert 0 <= found.low <= found.high <= 1
    assert not n or found.low - 1e-12 <= successes / n <= found.high + 1e-12


@given(BINARY)
def test_turning_a_comparison_round_swaps_higher_and_lower_and_the_signs(pairs):
    first = {str(index): a for index, (a, _) in enumerate(pairs)}
    second = {str(index): b for index, (_, b) in enumerate(pairs)}
    one, other = compare_scores(first, second), compare_scores(second, first)
    assert (one.n, one.higher, one.lower, one.p, one.left_out) == (
        other.n,
        other.lower,
        other.higher,
        other.p,
        other.left_out,
    )
    assert one.n + one.left_out == len(pairs)
    if (
        one.interval
        and other.interval
        and one.difference is not None
        and other.difference is not None
    ):
        assert one.difference == pytest.approx(-other.difference)
        assert (one.interval.low, one.interval.high) == pytest.approx(
            (-other.interval.high, -other.interval.low)
        )
        assert one.interval.low - 1e-9 <= one.difference <= one.interval.high + 1e-9


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, None]), max_size=40))
@settings(max_examples=25)
def test_an_arm_against_itself_has_p_one_and_no_difference(scores):
    same = {str(index): score for index, score in enumerate(scores)}
    found = compare_scores(same, same)
    assert (found.higher, found.lower, found.p) == (0, 0, 1.0)
    assert found.difference in (0.0, None)


def test_a_failed_answer_is_left_out_of_the_test_and_counted():
    report = run(arm("strong", "+-!--"), arm("both", "++++!"))
    strong, both = arm_table(report)
    assert (strong.asked, strong.answered, strong.failed, strong.correct) == (5, 4, 1, 1)
    assert strong.score == 0.25 and strong.strict_score == 0.2
    assert both.score == 1.0 and both.strict_score == 0.8 and both.test is None
    assert strong.test is not None
    assert (strong.test.n, strong.test.left_out, strong.test.higher, strong.test.lower) == (
        3,
        2,
        0,
        2,
    )


def test_an_example_that_only_one_arm_was_asked_is_left_out_and_counted():
    found = compare_scores({"b": 1.0, "c": 1.0, "d": None}, {"a": 1.0, "b": 0.0})
    assert (found.n, found.left_out, found.higher) == (1, 3, 1)


def test_graded_scores_have_a_mean_with_a_bootstrap_interval_and_no_count_of_correct():
    answers = tuple(Answer(str(i), {}, "", "x", i / 10) for i in range(11))
    line = arm_table(run(Arm("both", "Both", answers)))[0]
    assert line.correct is None and line.score == pytest.approx(0.5)
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
    counts = influence_counts(report.traces)
    assert (counts.helped, counts.hurt, counts.same, counts.failed, counts.n) == (1, 1, 1, 1, 4)
    assert counts.mean == 0.0
    assert {number: c.n for number, c in influence_by_round(report.traces).items()} == {
        1: 2,
        2: 2,
    }
    assert influence_counts([]).mean is None


def test_rounding_noise_of_graded_scores_is_not_an_influence():
    counts = influence_counts([draft("a", 0, 0.1 + 0.2 - 0.3)])
    assert (counts.helped, counts.same) == (0, 1)


# Words


def test_the_verdict_claims_a_gain_only_when_the_test_does():
    gain = verdict(
        run(arm("strong", "-" * 40), arm("sft", "-" * 40), arm("both", "+" * 30 + "-" * 10))
    )
    assert gain.good is True
    assert gain.sentences == (
        "The both arm beats the strong model alone by 75.0 points [57.5, 85.8], n 40, p < 0.001; "
        "tuning helped: it fixed 30 and broke 0 of 40 (p < 0.001).",
    )


def test_the_verdict_says_so_when_the_collaboration_loses_or_nothing_can_be_told():
    worse = verdict(
        run(arm("strong", "+" * 40), arm("sft", "+" * 40), arm("both", "-" * 30 + "+" * 10))
    )
    assert worse.good is False
    assert "is WORSE than the strong model alone by 75.0 points [57.5, 85.8]" in worse.sentences[0]
    assert "; tuning did HARM: it fixed 0 and broke 30" in worse.sentences[0]
    close = verdict(run(arm("strong", "+-+-"), arm("sft", "+-+-"), arm("both", "+++-")))
    assert close.good is False
    assert (
        "does NOT reliably beat" in close.sentences[0]
        and "; tuning made NO reliable difference" in close.sentences[0]
    )


def test_the_verdict_is_one_sentence_that_also_says_which_rounds_were_accepted():
    arms = (
        arm("strong", "-" * 40),
        arm("sft", "-" * 40),
        arm("both", "+" * 30 + "-" * 10),
        arm("weak", "-" * 40),
    )
    rounds = tuple(
        made_round(number, 9, "accepted" if number == 1 else "rolled back", "why")
        for number in (1, 2, 3)
    )
    found = verdict(run(*arms, rounds=rounds, rivals=("strong", "weak")))
    first, second = found.sentences
    assert (
        "p < 0.001; round 1 was accepted, rounds 2 and 3 were rolled back; tuning helped:" in first
    )
    assert second.startswith("The both arm beats the weak model alone by 75.0 points")
    alone = verdict(run(*arms[:1], arms[2], rounds=rounds[:1])).sentences
    assert len(alone) == 1 and alone[0].endswith("p < 0.001; round 1 was accepted.")


def test_before_tuning_the_verdict_speaks_of_the_collaboration_that_there_is():
    report = run(arm("strong", "-" * 40), arm("sft", "+" * 30 + "-" * 10), arm("oracle", "+" * 40))
    assert report.main_arm == "sft"
    assert verdict(report).sentences == (
        "The sft arm beats the strong model alone by 75.0 points [57.5, 85.8], n 40, p < 0.001.",
    )
    lines = {line.name: line for line in arm_table(report)}
    assert lines["sft"].is_against and lines["oracle"].test and lines["oracle"].test.higher == 10
    assert run(arm("strong", "+-")).main_arm == "both"


def test_one_lost_claim_spoils_the_verdict():
    found = verdict(run(arm("strong", "-" * 40), arm("sft", "+" * 40), arm("both", "+" * 40)))
    assert "beats" in found.sentences[0] and found.good is False


def test_a_run_without_anything_to_compare_has_no_verdict():
    assert verdict(run()).good is None
    assert "The strong arm" in verdict(run(arm("strong", "+-"))).sentences[0]


def hurting(*influences: float, round: int = 1) -> tuple[Trace, ...]:
    """One draft of each of so many examples."""
    return tuple(
        draft(f"t{place}", 0, value, round=round) for place, value in enumerate(influences)
    )


MOSTLY_BAD = (-1.0, 0.0, -1.0, 0.0, -1.0, 0.0, 0.0, -1.0, 0.0, 0.0)


def test_where_drafts_hurt_that_is_said_first():
    """A run of which the drafts had a mean influence of -0.37 [-0.63, -0.15] said nothing of it."""
    alike = run(arm("strong", "+-+-"), arm("both", "+-+-"), traces=hurting(*MOSTLY_BAD))
    found = verdict(alike)
    assert found.good is False
    first, second = found.sentences
    assert first.startswith(
        "The drafts HURT the strong model: mean influence -0.40 [-0.70, -0.10], harm rate 40 % of "
        "10 drafts"
    )
    assert second.startswith("The both arm does NOT reliably beat")
    nothing_else = verdict(run(traces=hurting(*MOSTLY_BAD)))
    assert nothing_else.good is False and nothing_else.sentences[1].startswith("No verdict yet")
    for harmless in ((0.0,) * 10, (1.0,) * 10, (-1.0, 1.0) * 5, (-1.0,)):
        assert verdict(run(traces=hurting(*harmless))).good is None


def test_a_second_rival_is_judged_where_the_first_has_not_been_evaluated():
    (said,) = verdict(
        run(arm("weak", "-" * 40), arm("both", "+" * 40), rivals=("strong", "weak"))
    ).sentences
    assert said.startswith("The both arm beats the weak model alone")


def test_a_win_on_held_out_examples_leads_and_the_harm_of_earlier_drafts_follows():
    arms = arm("strong", "-" * 40), arm("both", "+" * 30 + "-" * 10)
    found = verdict(run(*arms, traces=hurting(*MOSTLY_BAD)))
    assert (
        found.good is True
        and "beats the strong model alone" in found.sentences[0]
        and "HURT" in found.sentences[1]
    )
    better = (*hurting(*MOSTLY_BAD), *hurting(*[1.0] * 10, round=2))
    assert not any(
        "HURT" in sentence for sentence in verdict(run(*arms, traces=better)).sentences
    ), "newer drafts help"
    worse = (*hurting(*[1.0] * 10), *hurting(*MOSTLY_BAD, round=2))
    assert (
        "The drafts of round 2 HURT the strong model"
        in verdict(run(*arms, traces=worse)).sentences[1]
    )


def test_an_interval_without_0_beside_a_test_that_sees_nothing_says_that_there_are_too_few():
    """ "+100.0 points [+30.7, +100.0], does NOT reliably beat, p = 0.125" contradicted itself for a
    reader."""
    (first,) = verdict(run(arm("strong", "----"), arm("both", "++++"))).sentences
    assert first == (
        "The both arm does NOT reliably beat the strong model alone: 4 examples are too few: the "
        "exact test needs at least 6 that "
        "change, and the interval is only approximate there; +100.0 points [+30.7, +100.0], n 4, "
        "p = 0.125."
    )
    (few,) = verdict(run(arm("strong", "-" * 5 + "+" * 35), arm("both", "+" * 40))).sentences
    assert "5 changed answers of 40 are too few" in few
    (many,) = verdict(
        run(arm("strong", "-" * 9 + "+" * 2 + "-" * 19), arm("both", "+" * 9 + "-" * 21))
    ).sentences
    assert "NOT reliably" in many and "the test, which decides, does not reach 5 %" in many


@given(st.lists(st.tuples(st.sampled_from("+-"), st.sampled_from("+-")), min_size=1, max_size=30))
@settings(max_examples=50, deadline=None)
def test_a_claim_is_made_only_where_interval_and_test_agree(pairs):
    report = run(
        arm("strong", "".join(one for one, _ in pairs)),
        arm("both", "".join(other for _, other in pairs)),
    )
    strong, both = (arm.scores() for arm in report.arms)
    test = compare_scores(both, strong)
    (said,) = verdict(report).sentences
    assert test.interval is not None
    outside = not test.interval.low <= 0 <= test.interval.high
    assert ("NOT reliably" in said) == (not outside or test.p >= 0.05)
    assert (explain_doubt(test) is None) == (outside == (test.p < 0.05))


def test_more_wins_whose_mean_may_be_0_are_no_claim_either():
    scores = [(0.5, 0.51)] * 12 + [(1.0, 0.0)]
    answers = [
        tuple(Answer(str(place), {}, "", "x", pair[side]) for place, pair in enumerate(scores))
        for side in (0, 1)
    ]
    (said,) = verdict(
        run(Arm("strong", "Strong", answers[0]), Arm("both", "Both", answers[1]))
    ).sentences
    assert "NOT reliably beat the strong model alone: not enough questions" in said
    assert "; -6.8 points [" in said


SKIPPED = (
    made_round(
        1,
        62,
        "rolled back",
        "gain +0.000 [-0.100, +0.100] on 30 examples",
        gain(0.0, -0.1, 0.1),
    ),
    made_round(2, 7, "skipped", "7 pairs, 8 needed"),
)


def test_a_skipped_round_has_one_name_and_one_number_of_pairs_everywhere(tmp_path):
    untuned = dataclasses.replace(
        arm("both", "+-+-"), title="collaboration (untuned: round 1 was rolled back)"
    )
    report = run(
        arm("strong", "+-+-"),
        arm("sft", "+-+-"),
        untuned,
        rounds=SKIPPED,
        pairs=PairsSummary(69, 60),
    )
    (first,) = verdict(report).sentences
    assert (
        "round 1 was rolled back, round 2 was skipped (7 pairs, 8 needed); no tuned model was taken"
        in first
    )
    written = write_report(report, tmp_path)
    shown = io.StringIO()
    print_report(report, Console(file=shown, width=160))
    page = html.unescape(written.html.read_text())
    for text in (shown.getvalue(), page, report._repr_html_()):
        assert "7 pairs, 8 needed" in text and "skipped" in text and "69" in text
    for text in (shown.getvalue(), written.html.read_text()):
        assert "Of these, 7 pairs of round 2, which was skipped: not trained on." in text
    assert json.loads(written.json.read_text())["rounds"][1]["outcome"] == "skipped"
    assert sum(row.pairs - row.replayed for row in report.rounds) == 69


def test_failures_have_their_kinds_in_every_view_of_a_report(tmp_path):
    report = full_run()
    assert report.traces[-1].error == "truncated: 64 tokens"
    written, console = write_report(report, tmp_path), Console(file=io.StringIO(), width=160)
    print_report(report, console)
    for text in (console.file.getvalue(), written.html.read_text()):  # pyright: ignore
        assert "Failed drafts: truncated 1. Of truncated: raise max_tokens" in text
        assert "Failed answers of The strong arm: timeout 1." in text
    numbers = json.loads(written.json.read_text())["numbers"]
    assert numbers["influence"]["2"]["failures"] == {"truncated": 1}
    assert {line["name"]: line["failures"] for line in numbers["arms"]} == {
        "strong": {"timeout": 1}, "sft": {}, "both": {"timeout": 1},
    }  # fmt: skip


# Model


def test_a_report_survives_the_round_trip_through_json_text():
    report = full_run(HOSTILE)
    assert RunReport.from_json(json.loads(json.dumps(report.to_json()))) == report


@pytest.mark.parametrize("version", [1, 2])
def test_a_report_of_an_earlier_version_is_refused_with_what_to_type(version):
    """Its rounds and pairs lack what is known of them now; a run's store has all of it."""
    with pytest.raises(ReportError, match=f'{version}, .* reads 3. .*"cowest report RUN"'):
        RunReport.from_json({**full_run().to_json(), "schema_version": version})


def test_half_a_surrogate_pair_does_not_stop_a_report(tmp_path):
    assert write_report(full_run("broken \ud800 text"), tmp_path).html.exists()


def test_what_json_cannot_say_is_none_or_text():
    report = run(
        config={"path": Path("a/b"), "x": {1.5: object}, "y": math.nan},
    )
    document = json.dumps(report.to_json(), allow_nan=False)
    assert json.loads(document)["config"]["y"] is None
    assert json.loads(document)["config"]["path"] == "a/b"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 99}, "schema_version 99"),
        ({"surprise": 1}, "surprise"),
        ({"seed": "many"}, "seed"),
        (
            {"arms": [{"name": "a", "title": "A", "answers": [{"example_id": "1"}]}]},
            r"arms\.0\.answers\.0",
        ),
    ],
)
def test_a_report_of_another_shape_is_refused_with_what_to_type(change, message):
    with pytest.raises(ReportError, match=message) as caught:
        RunReport.from_json({**full_run().to_json(), **change})
    assert "cowest report" in str(caught.value)


@pytest.mark.parametrize(
    ("score", "error"), [(None, None), (0.0, "timeout: 60 s"), (1.5, None), (math.nan, None)]
)
def test_an_answer_has_a_score_in_the_unit_range_or_an_error_and_never_both(score, error):
    with pytest.raises(ReportError):
        Answer("q", {}, "gold", "text", score, error)


def test_a_draft_has_an_influence_or_an_error():
    with pytest.raises(ReportError):
        draft("q", 0, None)


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
    assert training_curve(history) == (
        {"step": 1.0, "loss": 0.69, "rewards/margins": 0.0, "rewards/accuracies": 0.5},
        {"step": 2.0, "rewards/margins": 0.2},
    )


def test_a_curve_from_trl_has_its_evaluations_as_points_of_their_own():
    history = [
        {"step": 0, "epoch": 0.0, "eval_loss": 0.7, "eval_kl": 0.0},
        {"step": 1, "loss": 0.6, "kl": -0.1},
        {"step": 1, "epoch": 1.0, "eval_loss": math.nan, "eval_rewards/margins": 0.2},
        {
            "step": 2,
            "eval_loss": 0.5,
            "eval_rewards/margins": 0.2,
            "eval_rewards/accuracies": 1.0,
            "eval_kl": 0.3,
        },
    ]
    assert training_curve(history) == (
        {"step": 0.0, "eval_loss": 0.7, "eval_kl": 0.0},
        {"step": 1.0, "loss": 0.6, "kl": -0.1},
        {
            "step": 2.0,
            "eval_loss": 0.5,
            "eval_rewards/margins": 0.2,
            "eval_rewards/accuracies": 1.0,
            "eval_kl": 0.3,
        },
    )


# The examples in the docstrings


@pytest.mark.parametrize(
    "name",
    [
        "influence.statistics",
        "report.facts",
        "report.figures",
        "report.verdict",
        "utils.masking",
        "utils.notebook",
    ],
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
