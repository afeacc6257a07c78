"""A comparison's statistics obey their laws and agree with values worked out by hand; its words are
honest both ways."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import itertools
import json
import math
import random
import statistics

import pytest
from compared import compared, comparison, full
from hypothesis import given, settings
from hypothesis import strategies as st

from cowest_dspy.errors import ReportError
from cowest_dspy.influence.statistics import wilson_interval
from cowest_dspy.report import Stage
from cowest_dspy.report.compare import compute_numbers
from cowest_dspy.report.compare_view import comparison_view
from cowest_dspy.report.compared import Comparison, SweepPoint, paired_test
from cowest_dspy.report.significance import bootstrap_test, holm
from cowest_dspy.report.verdict import comparison_verdict as verdict

PS = st.lists(st.floats(0.0, 1.0, exclude_min=True), max_size=12)
SCORES = st.lists(st.sampled_from([0.0, 0.5, 1.0, None]), min_size=1, max_size=12)


def worked(*arms, **changes):
    return compute_numbers(comparison(*arms, **changes), repeats=500)


def line(numbers, name):
    found = numbers.arm(name)
    assert found is not None
    return found


# Holm


def test_holm_equals_values_worked_out_by_hand():
    # Sorted 0.005 0.01 0.03 0.04 times 4 3 2 1 is 0.02 0.03 0.06 0.04; the last may not fall below
    # 0.06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.02, 0.02]) == [0.04, 0.04]
    assert holm([0.03]) == [0.03] and holm([]) == []


@given(PS)
def test_holm_never_lowers_a_p_keeps_their_order_and_ends_at_one(ps):
    corrected = holm(ps)
    for p, adjusted in zip(ps, corrected, strict=True):
        assert p <= adjusted <= min(1.0, len(ps) * p) + 1e-12
    for (p, one), (q, other) in itertools.combinations(zip(ps, corrected, strict=True), 2):
        assert (p <= q or one >= other) and (p >= q or one <= other) and (p != q or one == other)


@given(PS, st.randoms(use_true_random=False))
def test_holm_of_another_order_is_the_same_in_that_order(ps, chance: random.Random):
    order = list(range(len(ps)))
    chance.shuffle(order)
    assert holm([ps[i] for i in order]) == [holm(ps)[i] for i in order]


@given(PS)
def test_holm_rejects_what_its_definition_rejects(ps):
    """Holm 1979: go up the sorted p while p(i) <= alpha / (m - i + 1), reject those, stop at the
    first that is larger."""
    alpha, rejected = 0.05, set()
    for rank, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        if ps[index] * (len(ps) - rank) > alpha:
            break
        rejected.add(index)
    assert {i for i, p in enumerate(holm(ps)) if p <= alpha} == rejected


# Tests of one arm against another


def test_right_and_wrong_of_one_seed_are_tested_exactly():
    # 7 against 1 of the examples that differ: 2 * (1 + 8) / 2**8.
    found = paired_test([compared("a", "+++++++-++!")], [compared("b", "-------++++")])
    assert found.method == "mcnemar" and found.p == pytest.approx(18 / 256)
    assert (found.n, found.answers, found.higher, found.lower, found.left_out) == (10, 10, 7, 1, 1)
    assert (
        found.difference == pytest.approx(0.6)
        and found.interval is not None
        and found.interval.low > 0
    )


def test_a_strict_test_calls_a_failure_wrong():
    lax, strict = (
        paired_test([compared("a", "+++!!")], [compared("b", "--+++")], strict=s)
        for s in (False, True)
    )
    assert (lax.n, lax.higher, lax.lower, lax.left_out, lax.difference) == (
        3,
        2,
        0,
        2,
        pytest.approx(2 / 3),
    )
    assert (strict.n, strict.higher, strict.lower, strict.left_out, strict.difference) == (
        5,
        2,
        2,
        0,
        0.0,
    )


def test_graded_scores_are_tested_by_their_size_and_not_by_their_sign():
    # Nine examples a little lower, one far higher: the sign test would call it worse.
    found = paired_test([compared("a", [0.49] * 9 + [1.0])], [compared("b", [0.5] * 9 + [0.0])])
    assert (
        found.method == "bootstrap"
        and found.difference == pytest.approx((1.0 - 0.09) / 10)
        and found.p > 0.3
    )


def test_the_bootstrap_p_has_a_floor_where_so_few_examples_can_show_nothing():
    assert bootstrap_test([[1.0], [1.0]], repeats=400) == 0.5
    assert bootstrap_test([[1.0]] * 6, repeats=400) == 2**-5
    assert bootstrap_test([[1.0], *[[0.0]] * 50], repeats=400) == 1.0
    assert bootstrap_test([[1.0]] * 30, repeats=400) == 1 / 401
    assert bootstrap_test([], repeats=400) == bootstrap_test([[0.5, -0.5]], repeats=400) == 1.0


def test_the_bootstrap_p_is_the_share_of_all_samples_that_are_as_far_from_zero():
    """All 6 ** 6 samples, each studentised: (mean - 0) / sqrt(mean square around it)."""
    values = [0.9, -0.4, 0.1, -0.2, 0.6, 0.4]
    shifted = [value - statistics.fmean(values) for value in values]

    def distance(mean, around):
        spread = math.sqrt(statistics.fmean(value * value for value in around))
        return abs(mean) / spread if spread > 1e-9 else math.inf

    observed = distance(statistics.fmean(values), shifted)
    as_far = 0
    for sample in itertools.product(shifted, repeat=6):
        mean = sum(sample) / 6
        as_far += distance(mean, [value - mean for value in sample]) >= observed - 1e-9
    exact = as_far / 6**6
    assert exact > 2**-5 and bootstrap_test(
        [[value] for value in values], repeats=20_000
    ) == pytest.approx(exact, abs=0.012)


def test_the_bootstrap_p_of_many_values_is_near_that_of_a_t_test():
    stats = pytest.importorskip("scipy.stats")
    chance = random.Random(2)
    for mean in (0.0, 0.05, 0.1):
        values = [chance.gauss(mean, 0.5) for _ in range(150)]
        expected = stats.ttest_1samp(values, 0).pvalue
        assert bootstrap_test([[value] for value in values]) == pytest.approx(expected, abs=0.02)


def test_the_bootstrap_rejects_a_true_null_about_as_often_as_it_says():
    chance, rejected = random.Random(1), 0
    for _ in range(300):
        groups = [
            [chance.choice((-1.0, -0.5, 0.0, 0.5, 1.0)) for _ in range(chance.choice((1, 2, 3)))]
            for _ in range(15)
        ]
        rejected += bootstrap_test(groups, repeats=300) < 0.05
    assert 5 <= rejected <= 25  # 15 expected; the plain bootstrap of so few examples gives 30


@given(SCORES, SCORES)
@settings(max_examples=40)
def test_turning_a_test_round_turns_its_signs_and_keeps_p(first, second):
    one, other = [compared("a", first)], [compared("b", second)]
    there, back = paired_test(one, other, repeats=200), paired_test(other, one, repeats=200)
    assert (there.n, there.higher, there.lower, there.left_out) == (
        back.n,
        back.lower,
        back.higher,
        back.left_out,
    )
    assert there.p == pytest.approx(back.p) and 0 < there.p <= 1
    if there.difference is not None and back.difference is not None:
        assert there.difference == pytest.approx(-back.difference)


def test_copies_under_other_seeds_do_not_make_a_gain_surer():
    scores, others = [0.2, 0.9, 0.5, 0.7, 0.1] * 4, [0.1, 0.7, 0.6, 0.3, 0.1] * 4
    once = paired_test([compared("a", scores)], [compared("b", others)])
    many = paired_test(
        [compared("a", scores, s) for s in range(5)], [compared("b", others, s) for s in range(5)]
    )
    assert (many.p, many.n, many.answers) == (pytest.approx(once.p), once.n, 5 * once.answers)
    assert (
        many.interval is not None
        and once.interval is not None
        and many.interval.low == pytest.approx(once.interval.low)
    )


def test_seeds_are_paired_with_the_same_and_a_single_one_with_each():
    three = [compared("a", marks, seed) for seed, marks in enumerate(("++-", "+--", "---"))]
    single = [compared("b", "-+-")]
    found = paired_test(three, single)
    assert (found.method, found.n, found.answers, found.higher, found.lower) == (
        "bootstrap",
        3,
        9,
        2,
        2,
    )
    turned = paired_test(single, three)
    assert (turned.answers, turned.higher, turned.lower) == (9, 2, 2)
    same = paired_test(
        three, [compared("b", marks, seed) for seed, marks in ((2, "---"), (0, "++-"), (7, "+++"))]
    )
    assert (same.answers, same.higher, same.lower, same.p) == (6, 0, 0, 1.0)
    apart = paired_test(three[:2], [compared("b", "---", 8), compared("b", "+++", 9)])
    assert apart.answers == 12 and (apart.higher, apart.lower) == (3, 3)


def test_arms_without_a_common_example_have_no_test_and_take_no_part_in_the_correction():
    numbers = worked(compared("strong", "+" * 9), compared("a", "-" * 9), compared("b", "!" * 9))
    a, b = line(numbers, "a"), line(numbers, "b")
    assert b.test is not None and b.test.n == 0 and b.holm is None
    assert (
        a.test is not None and numbers.tests == 1 and a.holm == a.test.p == pytest.approx(2 / 2**9)
    )


# One arm


def test_one_seed_of_right_and_wrong_has_wilson_intervals_both_ways():
    found = line(worked(compared("strong", "+++-!")), "strong")
    assert (found.n, found.asked, found.answered, found.failed) == (5, 5, 4, 1)
    assert (found.score, found.strict_score) == (0.75, 0.6)
    assert found.interval == wilson_interval(3, 4) and found.strict_interval == wilson_interval(
        3, 5
    )
    assert found.spread is None and found.is_against and found.test is None


def test_seeds_have_a_mean_a_range_and_a_deviation():
    marks = ("++++", "++--", "+++-")
    found = line(
        worked(*(compared("strong", one, seed) for seed, one in enumerate(marks))), "strong"
    )
    assert (
        found.seed_scores == (1.0, 0.5, 0.75)
        and found.seeds == (0, 1, 2)
        and (found.n, found.asked) == (4, 12)
    )
    assert found.spread is not None and (
        found.spread.mean,
        found.spread.low,
        found.spread.high,
    ) == (0.75, 0.5, 1.0)
    assert found.spread.sd == pytest.approx(0.25)  # deviations 0.25, -0.25, 0 over 3 - 1
    assert found.interval is not None and found.interval.low <= 0.75 <= found.interval.high


def test_costs_are_summed_over_seeds_and_what_is_not_known_stays_so():
    one, two = Stage("x", 2.0, 10, 100, 50, 5, usd=0.5), Stage("x", 3.0, 20, 200, 70, 0, usd=None)
    cost = line(worked(compared("a", "+", 0, cost=one), compared("a", "+", 1, cost=two)), "a").cost
    assert dataclasses.astuple(cost) == (30, 35, 300, 120, None, 5.0)
    assert dataclasses.astuple(line(worked(compared("a", "+")), "a").cost) == (None,) * 6


def test_further_scores_are_averaged_over_the_seeds_that_have_them():
    arms = [
        compared("a", "+", seed, extra={"f1": value}) for seed, value in enumerate((0.5, None, 0.7))
    ]
    assert line(worked(*arms), "a").extra["f1"].mean == pytest.approx(0.6)
    alone = compared("a", "+", extra={"f1": 0.5}, extra_intervals={"f1": (0.4, 0.7)})
    found = line(worked(alone), "a").extra["f1"]
    assert found.interval is not None and (found.interval.low, found.interval.high) == (0.4, 0.7)


@given(st.randoms(use_true_random=False))
@settings(max_examples=6)
def test_the_order_of_arms_seeds_and_answers_changes_no_number(chance: random.Random):
    whole = dataclasses.replace(full(), sweep=full().sweep[:4])
    arms = [dataclasses.replace(one, arm=_shuffled(one.arm, chance)) for one in whole.arms]
    sweep = list(whole.sweep)
    chance.shuffle(arms)
    chance.shuffle(sweep)
    other_order = dataclasses.replace(whole, arms=tuple(arms), sweep=tuple(sweep))
    one, other = (compute_numbers(c, repeats=100) for c in (whole, other_order))
    assert {a.name: a for a in one.arms} == {a.name: a for a in other.arms}
    assert one.controls == other.controls and one.tests == other.tests == 2
    assert {str(p.settings): p for p in one.sweep} == {str(p.settings): p for p in other.sweep}


def _shuffled(arm, chance):
    answers = list(arm.answers)
    chance.shuffle(answers)
    return dataclasses.replace(arm, answers=tuple(answers))


def test_points_of_a_sweep_are_grouped_by_setting_and_corrected_apart_from_the_arms():
    numbers = compute_numbers(full(), repeats=200)
    assert len(numbers.sweep) == 6 and all(
        point.arm.seeds == (0, 1) and point.pairs == (100, 101) for point in numbers.sweep
    )
    tests = [point.arm.test for point in numbers.sweep]
    assert [point.arm.holm for point in numbers.sweep] == holm([test.p for test in tests if test])


def test_arms_of_the_same_title_are_told_apart_by_their_names():
    numbers = worked(
        *(compared(name, "+", title="collaboration, tuned") for name in ("a", "b")),
        compared("c", "+", title="c"),
    )
    assert [arm.title for arm in numbers.arms] == [
        "collaboration, tuned (a)",
        "collaboration, tuned (b)",
        "c",
    ]


# Words


def words(*arms, **changes):
    whole = comparison(*arms, **changes)
    return verdict(whole, compute_numbers(whole, repeats=500))


def test_the_verdict_sorts_arms_into_better_not_distinguishable_and_worse():
    half = "+-" * 20
    found = words(
        compared("strong", half),
        compared("collaboration", "+" * 40),
        compared("a", half),
        compared("b", "-" * 40),
    )
    better, same, worse = found.sentences
    assert better.startswith(
        "Better than The strong arm (Holm over 3 tests, two-sided 0.05): The collaboration arm "
        "(+50.0 ["
    )
    assert (
        same.startswith("Not distinguishable from The strong arm: The a arm (+0.0 [")
        and "p = 1" in same
    )
    assert worse.startswith("WORSE than The strong arm: The b arm (-50.0 [") and found.good is True


def test_a_gain_that_one_test_would_call_sure_may_not_survive_many():
    # 6 against 0: p = 2/64 = 0.031 alone, 0.094 among three.
    alone = words(compared("strong", "-" * 6), compared("a", "+" * 6))
    assert alone.sentences[0].startswith("Better than")
    many = words(compared("strong", "-" * 6), *(compared(name, "+" * 6) for name in "abc"))
    assert (
        many.sentences[0].startswith("No arm is reliably better")
        and "p = 0.094" in many.sentences[1]
    )


def test_a_method_that_cannot_beat_its_controls_is_reported_as_such():
    strong, target = compared("strong", "-" * 40), compared("collaboration", "+" * 40)
    weak, even = (
        compared("control_shuffled", "-" * 40),
        compared("plain", "+" * 40, note="A control: drafts of another example."),
    )
    lost = words(strong, target, weak, even)
    assert (
        "does NOT reliably beat its controls (Holm over 2 tests): The plain arm (+0.0"
        in lost.sentences[-1]
        and lost.good is False
    )
    assert "cannot beat its controls" in lost.sentences[-1] and "shuffled" not in lost.sentences[-1]
    won = words(strong, target, weak)
    assert (
        "The collaboration arm beats its controls (Holm over 1 test): The control_shuffled arm "
        "(+100.0"
    ) in won.sentences[-1] and won.good is True
    named = words(strong, compared("ours", "+" * 40), weak, target="ours")
    assert "The ours arm beats its controls" in named.sentences[-1]


def test_each_tuned_arm_is_judged_by_its_own_controls():
    """Before, the first tuned arm was tested against the controls of every format of drafts."""
    arms = [
        compared(name, marks * 40)
        for name, marks in (("a", "+"), ("b", "-"), ("control_a", "-"), ("control_b", "+"))
    ]
    made = comparison(
        *arms, target="a", controls={"b": ("control_b",), "a": ("control_a",), "c": ()}
    )
    numbers = compute_numbers(made)
    assert [(test.target, test.name) for test in numbers.controls] == [
        ("a", "control_a"),
        ("b", "control_b"),
    ]
    said = verdict(made, numbers)
    assert (
        said.sentences[-2].startswith("The a arm beats its controls")
        and "control_b" not in said.sentences[-2]
    )
    assert said.sentences[-1].startswith("The b arm does NOT reliably beat its controls")
    assert said.good is True, "what the target beats is its own"


def test_a_control_that_could_not_be_compared_is_no_victory():
    found = words(
        compared("collaboration", "+" * 40),
        compared("control_a", "-" * 40),
        compared("control_b", "!" * 40),
    )
    assert "1 more could not be compared" in found.sentences[-1] and found.good is False


def test_a_sentence_begins_with_a_capital_whatever_the_title():
    found = words(
        compared("collaboration", "+" * 40, title="collaboration, tuned"),
        compared("control", "-" * 40),
    )
    assert found.sentences[-1].startswith("Collaboration, tuned beats its controls")


def test_uncontrolled_is_not_a_control():
    found = words(
        compared("strong", "-"),
        compared("a", "+", note="uncontrolled"),
        compared("collaboration", "+"),
    )
    assert not any("its controls" in sentence for sentence in found.sentences)


def test_the_verdict_says_when_failures_called_wrong_would_change_it():
    found = words(compared("strong", "-" * 20 + "+" * 20), compared("a", "+" * 20 + "!" * 20))
    assert found.sentences[0].startswith("Better than") and found.sentences[1].endswith(
        "is another one for: The a arm."
    )


def test_what_is_not_there_yet_is_said():
    assert words().sentences == ("No verdict yet: there is nothing to compare.",)
    assert '"strong"' in words(compared("a", "+")).sentences[0]
    assert (
        'the arm "collaboration"'
        in words(compared("strong", "+"), compared("control", "+")).sentences[-1]
    )
    assert words(compared("strong", "+"), compared("control", "+")).good is None


# Model


def test_a_comparison_survives_the_round_trip_through_json_text():
    whole = full("</script> \u2028 & é")
    assert Comparison.from_json(json.loads(json.dumps(whole.to_json(), allow_nan=False))) == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 9}, "schema_version 9"),
        ({"surprise": 1}, "surprise"),
        ({"arms": [{"seed": 0}]}, r"arms\.0\.arm"),
        ({"sweep": [{"settings": {}, "arm": {}, "x": 1}]}, r"sweep\.0"),
        ({"metric": 3}, "metric"),
    ],
)
def test_a_comparison_of_another_shape_is_refused_with_what_to_type(change, message):
    with pytest.raises(ReportError, match=message) as caught:
        Comparison.from_json({**full().to_json(), **change})
    assert "cowest compare" in str(caught.value)


def test_a_seed_twice_and_a_score_that_is_no_number_are_refused():
    with pytest.raises(ReportError, match=r'"a" is there twice under seed 1'):
        comparison(compared("a", "+", 1), compared("a", "-", 1))
    point = SweepPoint({"x": 1, "y": 2}, compared("a", "+"))
    with pytest.raises(ReportError, match="twice under seed 0"):
        comparison(sweep=(point, SweepPoint({"y": 2, "x": 1}, compared("b", "+"))))
    with pytest.raises(ReportError, match="finite"):
        compared("a", "+", extra={"f1": math.nan})
    with pytest.raises(ReportError, match="none of its scores"):
        compared("a", "+", extra_intervals={"f1": None})
    with pytest.raises(ReportError, match="low, high"):
        compared("a", "+", extra={"f1": 0.5}, extra_intervals={"f1": (0.9, 0.1)})


# The examples in the docstrings


@pytest.mark.parametrize("name", ["significance", "verdict", "compare", "compare_view", "view"])
def test_the_examples_in_the_docstrings_are_true(name):
    module = importlib.import_module(f"cowest_dspy.report.{name}")
    found = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert found.attempted > 0 and found.failed == 0


def test_seeds_of_which_one_is_untuned_are_named_in_the_title() -> None:
    arms = [
        compared("collaboration", "++++----", seed, title=f"collaboration{state}", note=state)
        for seed, state in ((0, ", tuned"), (1, " (untuned)"), (2, ", tuned"))
    ]
    line = compute_numbers(comparison(compared("strong", "-" * 8), *arms), repeats=99).arm(
        "collaboration"
    )
    assert (
        line is not None
        and line.title == "seeds 0, 2: collaboration, tuned; seed 1: collaboration (untuned)"
    )
    assert line.note == "seeds 0, 2: , tuned; seed 1:  (untuned)"


def test_failures_have_their_kinds_in_a_comparison() -> None:
    made = comparison(compared("strong", "+-!-"), compared("other", "++!!"))
    numbers = compute_numbers(made)
    assert [line.failures for line in numbers.arms] == [{"timeout": 1}, {"timeout": 2}]
    assert (
        "Failed: The strong arm: timeout 1; The other arm: timeout 2."
        in comparison_view(made, numbers).tables[0].caption
    )


def test_an_interval_without_0_beside_a_p_that_is_not_small_is_explained() -> None:
    few = comparison(compared("strong", "----"), compared("other", "++++"))
    sentence = verdict(few, compute_numbers(few)).sentences[1]
    assert (
        "p = 0.125; 4 examples are too few: the exact test needs at least 6 that change" in sentence
    )
    arms = [compared(f"arm{place}", "+" * 8 + "-" * 22) for place in range(9)]
    corrected = comparison(compared("strong", "-" * 30), *arms)
    assert "before the correction" in " ".join(
        verdict(corrected, compute_numbers(corrected)).sentences
    )
