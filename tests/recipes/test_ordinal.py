"""Scores of ordered labels: values worked out by hand, and laws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dspy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowest_dspy.report.corpus import is_corpus_metric
from cowest_dspy.utils import importing

METRIC = Path(__file__).parents[2] / "metrics" / "ordinal.py"
LABELS: tuple[str, ...] = importing.load(f"{METRIC}:LABELS")
label_match, macro_f1, label_distance = (
    importing.load(f"{METRIC}:{name}") for name in ("label_match", "macro_f1", "label_distance")
)
CASUAL, POSSIBLY, PROBABLY, CAUTION, INTERVENTION = LABELS


def corpus(*pairs: tuple[str, str | None]) -> tuple[list[dspy.Example], list[Any]]:
    """Examples and predictions from (right label, answer or None for a failure)."""
    return [dspy.Example(answer=right) for right, _ in pairs], [
        given and dspy.Prediction(answer=given) for _, given in pairs
    ]


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("needs caution", 1.0),
        ("__needs_caution__", 1.0),
        ("Needs-Caution.", 1.0),
        ("possibly needs caution", 0.0),
        ("caution", 0.0),
        ("", 0.0),
        (None, 0.0),
    ],
)
def test_a_label_matches_however_it_is_written(answer: str | None, score: float) -> None:
    assert (
        label_match(dspy.Example(answer="__needs_caution__"), dspy.Prediction(answer=answer))
        == score
    )
    assert label_match(dspy.Example(answer="needs caution"), None) == 0


def test_only_scores_of_a_corpus_are_marked_as_such() -> None:
    assert [is_corpus_metric(metric) for metric in (label_match, macro_f1, label_distance)] == [
        False,
        True,
        True,
    ]


def test_macro_f1_worked_out_by_hand() -> None:
    # casual: 1 hit of 2 right, given 1 time: 2/3. needs caution: 1 hit of 1, given 2 times: 2/3.
    # intervention: failed, 0.
    examples, predictions = corpus(
        (CASUAL, CASUAL), (CASUAL, CAUTION), (CAUTION, CAUTION), (INTERVENTION, None)
    )
    assert macro_f1(examples, predictions) == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)


def test_macro_f1_counts_a_label_that_is_only_answered() -> None:
    # casual: 1 hit of 2 right, given 1 time: 2/3. possibly: never right, given once: 0.
    assert macro_f1(*corpus((CASUAL, CASUAL), (CASUAL, POSSIBLY))) == pytest.approx(1 / 3)


def test_a_failure_costs_the_right_label_only() -> None:
    # casual: 1 hit of 2 right, given once: 2/3; there is no other label.
    assert macro_f1(*corpus((CASUAL, CASUAL), (CASUAL, None))) == pytest.approx(2 / 3)
    assert macro_f1(*corpus((CASUAL, CASUAL), (CASUAL, "no label"))) == pytest.approx(2 / 3)


def test_label_distance_worked_out_by_hand() -> None:
    # 0, 3 and 1 steps; the failures are left out.
    pairs = (
        (CASUAL, CASUAL),
        (CASUAL, CAUTION),
        (PROBABLY, POSSIBLY),
        (INTERVENTION, None),
        (CASUAL, "no label"),
    )
    assert label_distance(*corpus(*pairs)) == pytest.approx(4 / 3)


def test_label_distance_where_nothing_was_answered_is_the_largest() -> None:
    assert label_distance(*corpus((CASUAL, None))) == 4
    assert (label_distance([], []), macro_f1([], [])) == (0, 1)


@pytest.mark.parametrize("metric", [macro_f1, label_distance])
def test_what_is_no_corpus_is_an_error(metric: Any) -> None:
    with pytest.raises(ValueError, match="is no label"):
        metric(*corpus(("unheard of", CASUAL)))
    with pytest.raises(ValueError, match="2 examples and 1 predictions"):
        metric(corpus((CASUAL, CASUAL), (CASUAL, CASUAL))[0], [None])


PAIRS = st.lists(
    st.tuples(st.sampled_from(LABELS), st.sampled_from((*LABELS, None))), min_size=1, max_size=30
)


@given(PAIRS)
def test_law_scores_keep_their_ranges_whatever_the_order(
    pairs: list[tuple[str, str | None]],
) -> None:
    f1, distance = macro_f1(*corpus(*pairs)), label_distance(*corpus(*pairs))
    assert 0 <= f1 <= 1 and 0 <= distance <= 4
    assert (
        macro_f1(*corpus(*pairs[::-1])),
        label_distance(*corpus(*pairs[::-1])),
    ) == pytest.approx((f1, distance))


@given(PAIRS)
def test_law_all_right_is_the_best_score_and_only_that(pairs: list[tuple[str, str | None]]) -> None:
    right = [(label, label) for label, _ in pairs]
    assert (macro_f1(*corpus(*right)), label_distance(*corpus(*right))) == (1, 0)
    assert (macro_f1(*corpus(*pairs)) == 1) == (right == pairs)


@given(PAIRS)
def test_law_mirrored_labels_are_as_far_apart(pairs: list[tuple[str, str | None]]) -> None:
    mirror = dict(zip(LABELS, LABELS[::-1], strict=True))
    mirrored = [(mirror[right], mirror[given] if given else None) for right, given in pairs]
    assert label_distance(*corpus(*mirrored)) == pytest.approx(label_distance(*corpus(*pairs)))


@given(PAIRS)
def test_law_a_failure_never_raises_macro_f1(pairs: list[tuple[str, str | None]]) -> None:
    right = [pair for pair in pairs if pair[0] == pair[1]]
    if right:
        failed = [(right[0][0], None), *right[1:]]
        assert macro_f1(*corpus(*failed)) < macro_f1(*corpus(*right))
