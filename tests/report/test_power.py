"""What difference so many questions can show: known values, simulation, and the words and tables
that say it."""

from __future__ import annotations

import csv
import io
import json
import math
import random

import numpy as np
import pytest
from compared import compared, comparison
from hypothesis import given
from hypothesis import strategies as st
from report_runs import arm, run

from cowest_dspy.influence.statistics import (
    detectable_difference,
    detectable_mean,
    questions_needed,
)
from cowest_dspy.report import verdict
from cowest_dspy.report.compare import compute_numbers
from cowest_dspy.report.compare_view import render_comparison, to_csv, to_markdown
from cowest_dspy.report.compared import Comparison, paired_test
from cowest_dspy.report.figures import figures
from cowest_dspy.report.run_view import run_view
from cowest_dspy.report.runs_view import side_by_side
from cowest_dspy.report.significance import compare_scores, exact_sign_p
from cowest_dspy.report.verdict import comparison_verdict, explain_chance, smallest_difference


def power(n: int, difference: float, discordance: float, repeats: int = 3000) -> float:
    """The share of simulated comparisons in which McNemar's exact test finds a difference."""
    better, worse = (discordance + difference) / 2, (discordance - difference) / 2
    drawn = np.random.default_rng(0).multinomial(n, [better, worse, 1 - discordance], size=repeats)
    return float(np.mean([exact_sign_p(int(b), int(c)) < 0.05 for b, c, _ in drawn]))


@pytest.mark.parametrize(("points", "about"), [(6.1, 310), (4.0, 730), (2.0, 2900)])
def test_the_numbers_needed_are_those_of_the_literature(points: float, about: int) -> None:
    """Connor's formula by hand: ((1.96 sqrt(q) + 0.8416 sqrt(q - d d)) / d) ** 2 with q = 0.15."""
    assert questions_needed(points / 100, 0.15) == pytest.approx(about, rel=0.02)
    assert 100 * (detectable_difference(about, 0.15) or 0) == pytest.approx(points, rel=0.01)


@pytest.mark.parametrize(
    ("difference", "discordance"), [(0.1, 0.1), (0.1, 0.2), (0.05, 0.15), (0.061, 0.3)]
)
def test_so_many_questions_find_the_difference_four_times_in_five(
    difference: float, discordance: float
) -> None:
    n = questions_needed(difference, discordance)
    assert 0.73 < power(n, difference, discordance) < 0.83
    assert power(n // 2, difference, discordance) < 0.6
    assert power(n, 0.0, discordance) < 0.05


@given(st.integers(6, 100_000), st.floats(0, 1))
def test_the_smallest_difference_is_the_one_that_needs_so_many(n: int, discordance: float) -> None:
    found = detectable_difference(n, discordance)
    assert found is not None and 0 < found < 1
    assert questions_needed(found, discordance) in (n, n + 1)  # a float's last digit
    more = detectable_difference(2 * n, discordance)
    assert more is not None and more < found


def test_answers_that_never_differ_do_not_show_everything() -> None:
    """Without one answer that differs the estimate of discordance would be 0, and with it the
    smallest difference; a difference needs so many that differ in its direction."""
    found = detectable_difference(150, 0.0)
    assert found is not None and 150 * found == pytest.approx(7.8, abs=0.2)
    assert detectable_difference(5, 1.0) is None


def test_graded_scores_have_a_z_test_s_power() -> None:
    chance = np.random.default_rng(3)
    values = chance.normal(0.0, 0.3, size=400)
    found = detectable_mean([[value] for value in values])
    assert found == pytest.approx(2.8016 * float(np.std(values, ddof=1)) / 20, rel=1e-3)
    assert found is not None
    means = chance.normal(found, 0.3, size=(2000, 400)).mean(axis=1)
    assert np.mean(np.abs(means) > 1.96 * 0.3 / 20) == pytest.approx(0.8, abs=0.05)
    assert detectable_mean([[0.5]] * 5 + [[0.0]] * 50) is None
    twice = detectable_mean([[value, value] for value in values])
    assert twice == pytest.approx(found), "copies make nothing surer"


# Words


def mixed(n: int, fixed: int, broken: int) -> tuple[str, str]:
    """Two arms: the second is right where the first is not on ``fixed``, and wrong on ``broken``."""
    same = (n - fixed - broken) // 2
    rest = n - fixed - broken - same
    head = "-" * fixed + "+" * broken, "+" * fixed + "-" * broken
    return tuple(one + "+" * same + "-" * rest for one in head)  # pyright: ignore[reportReturnType]


def said(n: int, fixed: int, broken: int, smallest: float = 5.0) -> str | None:
    one, other = (
        compared(name, marks) for name, marks in zip("ab", mixed(n, fixed, broken), strict=True)
    )
    return explain_chance(paired_test([other], [one]), smallest)


def test_a_verdict_tells_no_difference_from_not_enough_questions() -> None:
    few = said(120, 13, 11)
    assert few == "not enough questions for 5 points, which need about 630"
    near = "no difference larger than 9.7 points at 95 %"
    assert said(120, 13, 11, smallest=10) == near, "its interval ends there"
    shown = "no difference larger than 15.2 points at 95 %"
    assert said(120, 16, 7, smallest=12) == shown, "120 could show 11.1 points"
    assert said(2000, 51, 49) == "no difference larger than 1.1 points at 95 %"
    assert said(120, 40, 10) is None, "a difference was found"
    assert "4 examples are too few: the exact test needs" in (said(4, 4, 0) or "")


@given(st.integers(6, 400), st.integers(0, 200), st.integers(0, 200), st.floats(0.5, 50))
def test_what_is_said_of_chance_never_contradicts_itself(
    n: int, fixed: int, broken: int, smallest: float
) -> None:
    fixed = min(fixed, n)
    broken = min(broken, n - fixed)
    one, other = (
        compared(name, marks) for name, marks in zip("ab", mixed(n, fixed, broken), strict=True)
    )
    test = paired_test([other], [one])
    words, needed = explain_chance(test, smallest), test.needed(smallest / 100)
    assert test.interval is not None and needed is not None
    if words and words.startswith("no difference"):
        assert test.interval.low <= 0 <= test.interval.high and test.p >= 0.05
    elif words and words.startswith("not enough"):
        assert needed > n and max(-test.interval.low, test.interval.high) > smallest / 100
    else:
        assert test.p < 0.05 or not test.interval.low <= 0 <= test.interval.high


def test_a_comparison_says_it_in_every_form() -> None:
    alone, close = mixed(120, 13, 11)
    seeds = [
        compared("graded", [0.1 * (i % 7) + 0.01 * seed for i in range(120)], seed)
        for seed in (0, 1)
    ]
    made = comparison(compared("strong", alone), compared("close", close), *seeds)
    numbers = compute_numbers(made, repeats=200)
    line, graded = numbers.arm("close"), numbers.arm("graded")
    assert line and line.test and line.test.detectable and graded and graded.test
    shown = f"{100 * line.test.detectable:.1f}"
    assert shown == "11.3" and graded.test.method == "bootstrap" and graded.test.detectable
    assert graded.test.needed(graded.test.detectable) in (120, 121)
    text, page = to_markdown(made, numbers), render_comparison(made, numbers)
    sentence = "not enough questions for 5 points, which need about 630"
    assert all("could show" in one and shown in one and sentence in one for one in (text, page))
    assert "the smallest true difference" in text
    rows = {row["name"]: row for row in csv.DictReader(io.StringIO(to_csv(made, numbers)))}
    assert float(rows["close"]["test.detectable"]) == line.test.detectable
    assert not rows["strong"]["test.detectable"]


def test_the_difference_worth_finding_is_that_of_the_configuration() -> None:
    alone, close = mixed(120, 13, 11)
    config = {"compare": {"smallest": 20}}
    made = comparison(compared("strong", alone), compared("close", close), config=config)
    told = " ".join(comparison_verdict(made, compute_numbers(made)).sentences)
    assert "no difference larger than" in told and "not enough" not in told
    assert smallest_difference({}) == smallest_difference({"compare": None}) == 5
    for odd in ([], "x", {"smallest": "x"}, {"smallest": 0}, {"smallest": math.nan}):
        assert smallest_difference({"compare": odd}) == 5, "a report of other hands"


def test_the_corrected_test_keeps_its_own_explanation() -> None:
    arms = [compared(f"arm{place}", "+" * 8 + "-" * 22) for place in range(9)]
    made = comparison(compared("strong", "-" * 30), *arms)
    told = " ".join(comparison_verdict(made, compute_numbers(made)).sentences)
    assert "before the correction" in told and "not enough" not in told


def test_a_report_and_runs_side_by_side_say_the_same() -> None:
    alone, close = mixed(120, 13, 11)
    report = run(arm("strong", alone), arm("sft", alone), arm("both", close))
    (words,) = verdict(report).sentences
    sentence = "not enough questions for 5 points, which need about 630"
    assert f"does NOT reliably beat the strong model alone: {sentence}; +1.7 points" in words
    assert (
        f"tuning made NO reliable difference: it fixed 13 and broke 11 of 120 (p = 0.839), {sentence}"
        in words
    )
    numbers = figures(report)
    table = run_view(report, numbers).tables[0]
    assert table.heads[-1] == "could show" and [row[-1] for row in table.rows] == [
        "11.3",
        "11.3",
        "",
    ]
    assert json.loads(json.dumps(numbers.to_json()))["tuning"]["detectable"] == pytest.approx(
        0.1133, abs=1e-4
    )
    both = side_by_side({"one": run(arm("both", alone)), "two": run(arm("both", close))})
    assert both.sentences[0].endswith(f"; {sentence}.")


def test_a_comparison_of_before_is_read_and_an_arm_without_questions_says_nothing() -> None:
    made = comparison(compared("strong", "+-"), compared("a", "!!"), config={"compare": {}})
    again = Comparison.from_json(made.to_json())
    found = compute_numbers(again).arm("a")
    assert found and found.test and found.test.detectable is found.test.needed(0.05) is None
    scores = {str(i): float(random.Random(i).random() < 0.5) for i in range(5)}
    assert compare_scores(scores, scores).detectable is None
