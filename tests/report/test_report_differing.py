"""The word diff of a pair: both texts come back whole, and what is marked is what the other one
lacks."""

from __future__ import annotations

import html
import re

from hypothesis import given
from hypothesis import strategies as st
from report_runs import HOSTILE

from cowest_dspy.report.differing import MOST_WORDS, word_diff

WORDS = st.lists(
    st.sampled_from(["valve", "12", "bar", "<b>", "&", "\n", "  ", "holds", "holds"]), max_size=25
).map(" ".join)


def bare(text: str) -> str:
    return html.unescape(re.sub(r"</?(?:ins|del)>", "", text))


@given(WORDS | st.text(max_size=80), WORDS | st.text(max_size=80))
def test_both_texts_come_back_whole_and_escaped(old: str, new: str) -> None:
    found = word_diff(old, new)
    assert bare(str(found.old)) == old and bare(str(found.new)) == new
    assert "<ins>" not in found.old and "<del>" not in found.new
    assert not re.search(r"<(?!/?(?:ins|del)>)", str(found.old) + str(found.new))


@given(WORDS | st.text(max_size=80))
def test_a_text_beside_itself_has_no_marks(text: str) -> None:
    found = word_diff(text, text)
    assert found.old == found.new and "<" not in str(found.old) and found.kept == 1.0


@given(WORDS, WORDS)
def test_the_words_that_are_not_marked_are_the_same_in_both(old: str, new: str) -> None:
    found = word_diff(old, new)
    if found.kept >= 0.2:
        left, right = (
            re.sub(r"<(ins|del)>.*?</\1>", "", str(side), flags=re.DOTALL).split()
            for side in (found.old, found.new)
        )
        assert left == right


def test_a_script_in_a_draft_stays_text() -> None:
    found = word_diff(f"a b c {HOSTILE}", f"a b d {HOSTILE}")
    assert "<script" not in found.old and "<script" not in found.new and "<del>c</del>" in found.old


def test_texts_that_have_little_in_common_or_are_very_long_have_no_marks() -> None:
    assert (
        "<del>"
        not in word_diff("one two three four five six", "seven eight nine ten eleven six").old
    )
    assert "<del>" not in word_diff("word " * MOST_WORDS, "word " * MOST_WORDS + "more").new
