"""option_match, macro_f1, exact_match and token_f1: values worked out by hand, and laws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dspy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowest_dspy.errors import DataError
from cowest_dspy.report.corpus import is_corpus_metric
from cowest_dspy.utils import importing

METRICS = Path(__file__).parents[2] / "metrics"
OPTIONS, SHORT = (
    importing.load(f"{METRICS / name}:__dict__") for name in ("options.py", "short_answers.py")
)
option_match, macro_f1, label = OPTIONS["option_match"], OPTIONS["macro_f1"], OPTIONS["label"]
exact_match, token_f1, normalised, overlap_f1 = (
    SHORT[name] for name in ("exact_match", "token_f1", "normalised", "overlap_f1")
)


def gold(answer: str) -> dspy.Example:
    return dspy.Example(answer=answer)


def said(answer: Any) -> dspy.Prediction:
    return dspy.Prediction(answer=answer)


# Options


@pytest.mark.parametrize(
    "answer",
    [
        "B",
        "b",
        " B ",
        "B.",
        "b)",
        "(B)",
        "(b) Iron",
        "B. Iron",
        "B: Iron",
        "B - Iron",
        "**B**",
        "'B'",
    ],
)
def test_a_letter_counts_however_it_is_written(answer: str) -> None:
    assert option_match(gold("B"), said(answer)) == 1.0
    assert option_match(gold("C"), said(answer)) == 0.0


@pytest.mark.parametrize(
    "answer",
    [
        "A or B",
        "B or A",
        "a blood test",
        "Iron",
        "",
        "  ",
        None,
        "Both B and C",
        "Barium",
        "B12 is it",
    ],
)
def test_what_names_no_option_is_wrong(answer: str | None) -> None:
    assert option_match(gold("B"), said(answer)) == option_match(gold("A"), said(answer)) == 0.0


def test_a_prediction_that_is_missing_or_has_no_answer_is_wrong() -> None:
    assert (
        option_match(gold("B"), None)
        == option_match(gold("B"), dspy.Prediction(reasoning="B"))
        == 0.0
    )


def test_labels_that_are_words_match_whatever_their_case_and_spacing() -> None:
    assert option_match(gold("Needs care"), said("needs  CARE ")) == 1.0
    assert option_match(gold("Needs care"), said("care")) == 0.0


def test_macro_f1_is_that_worked_out_by_hand() -> None:
    """A: 2 of 3 found, 1 false: 2*2/(3+3) = 2/3. B: 1 of 2 found, 1 false: 2*1/(2+2) = 1/2. C:
    never found: 0."""
    right = [gold(letter) for letter in "AAABBC"]
    given = [said(letter) for letter in ("A", "A", "B", "B", "A", "D")]
    assert macro_f1(right, given) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)


def test_a_failed_answer_is_wrong_and_no_label_of_its_own() -> None:
    """A: 1 of 2 found: 2*1/(2+1) = 2/3. B: 1 of 1: 1."""
    right = [gold(letter) for letter in "AAB"]
    for failure in (None, said(None), said("I do not know"), said("")):
        assert macro_f1(right, [said("A"), failure, said("B")]) == pytest.approx((2 / 3 + 1) / 2)


def test_macro_f1_is_of_a_whole_corpus_and_needs_one() -> None:
    assert is_corpus_metric(macro_f1) and not is_corpus_metric(option_match)
    with pytest.raises(DataError, match="0 and 0"):
        macro_f1([], [])
    with pytest.raises(DataError, match="1 and 2"):
        macro_f1([gold("A"), gold("B")], [said("A")])


LETTERS = st.sampled_from("ABCD")


@given(st.lists(st.tuples(LETTERS, st.one_of(st.none(), LETTERS)), min_size=1))
def test_macro_f1_is_1_only_if_every_answer_is_right_and_does_not_ask_for_the_order(
    pairs: list[tuple[str, str | None]],
) -> None:
    right = [gold(letter) for letter, _ in pairs]
    given = [None if letter is None else said(letter) for _, letter in pairs]
    score = macro_f1(right, given)
    assert 0 <= score <= 1
    assert (score == 1) == all(
        option_match(one, other) for one, other in zip(right, given, strict=True)
    )
    assert score == pytest.approx(macro_f1(right[::-1], given[::-1]))


@given(st.text(max_size=30))
def test_a_label_stays_what_it_is(text: str) -> None:
    assert label(label(text)) == label(text)


# Short answers


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The Eiffel Tower!", "eiffel tower"),
        ("  a   Big\tdog. ", "big dog"),
        ("1,000", "1000"),
        ("$5", "5"),
        ("Zürich\u2014Süd", "zürichsüd"),
        ("\uff12\uff10\uff12\uff11", "2021"),
        ("STRASSE", "strasse"),
        ("straße", "strasse"),
        ("theatre and Anna", "theatre and anna"),
        ("The", "the"),
        ("A", "a"),
        ("?", "?"),
        ("", ""),
        (None, ""),
    ],
)
def test_normalised_by_hand(answer: str | None, normal: str) -> None:
    assert normalised(answer) == normal


def test_any_accepted_answer_will_do_and_the_best_one_counts() -> None:
    example = dspy.Example(answer="two", answers=["two", "the 2 sons"])
    assert exact_match(example, said("Two.")) == exact_match(example, said("2 sons")) == 1.0
    assert exact_match(example, said("2")) == 0.0
    assert token_f1(example, said("2")) == pytest.approx(2 * 1 / (1 + 2))
    assert token_f1(example, said("the two sons")) == pytest.approx(2 / 3), (
        "one word of two with either answer"
    )
    assert token_f1(example, said("three")) == 0.0


def test_a_numeral_is_not_the_word_for_it() -> None:
    assert exact_match(gold("2"), said("two")) == token_f1(gold("2"), said("two")) == 0.0


def test_words_count_as_often_as_they_stand_in_both() -> None:
    assert token_f1(gold("New York New York"), said("York York York")) == pytest.approx(
        2 * 2 / (4 + 3)
    )


@pytest.mark.parametrize(
    "prediction", [None, said(None), said(""), said("  "), dspy.Prediction(reasoning="Paris")]
)
def test_no_answer_scores_0(prediction: dspy.Prediction | None) -> None:
    for example in (gold("Paris"), gold(""), gold("The"), dspy.Example(question="?")):
        assert exact_match(example, prediction) == token_f1(example, prediction) == 0.0


TEXTS = st.one_of(
    st.text(max_size=30),
    st.lists(st.sampled_from(["the", "a", "Two", "two", "2", "sons", "!"]), max_size=6).map(
        " ".join
    ),
)


@given(TEXTS, TEXTS)
def test_f1_is_symmetric_between_0_and_1_and_1_where_the_match_is_exact(
    one: str, other: str
) -> None:
    score = token_f1(gold(one), said(other))
    assert 0 <= score <= 1
    assert (
        score == token_f1(gold(other), said(one)) == overlap_f1(normalised(one), normalised(other))
    )
    if exact_match(gold(one), said(other)):
        assert score == 1


@given(TEXTS.filter(str.strip), st.lists(TEXTS, max_size=3))
def test_an_answer_matches_itself_and_more_accepted_answers_never_hurt(
    one: str, others: list[str]
) -> None:
    assert exact_match(gold(one), said(one)) == 1.0
    assert exact_match(dspy.Example(answers=[*others, one]), said(one)) == 1.0
    for other in others:
        assert token_f1(dspy.Example(answers=others), said(one)) >= token_f1(gold(other), said(one))


@given(TEXTS)
def test_what_is_normalised_stays_so(text: str) -> None:
    assert normalised(normalised(text)) == normalised(text)
