"""The word diff of a pair: both texts come back whole, and what is marked is what the other one
lacks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cowest_dspy.utils.notebook import MOST_WORDS, Parts, diff_words

WORDS = st.lists(
    st.sampled_from(["valve", "12", "bar", "<b>", "&", "\n", "  ", "holds", "holds"]), max_size=25
).map(" ".join)


def plain(parts: Parts) -> str:
    return "".join(text for text, _ in parts)


def left(parts: Parts) -> str:
    return " ".join(text for text, changed in parts if not changed)


@given(WORDS | st.text(max_size=80), WORDS | st.text(max_size=80))
def test_both_texts_come_back_whole(old: str, new: str) -> None:
    one, other = diff_words(old, new)
    assert plain(one) == old and plain(other) == new


@given(WORDS | st.text(max_size=80))
def test_a_text_beside_itself_has_no_marks(text: str) -> None:
    one, other = diff_words(text, text)
    assert one == other and not any(changed for _, changed in one)


@given(WORDS, WORDS)
def test_the_words_that_are_not_marked_are_the_same_in_both(old: str, new: str) -> None:
    one, other = diff_words(old, new)
    if any(changed for _, changed in (*one, *other)):
        assert left(one).split() == left(other).split()


def test_marks_have_no_space_at_their_ends() -> None:
    one, other = diff_words("a b  c d e f", "a b  x y d e f")
    assert [text for text, changed in one if changed] == ["c"]
    assert [text for text, changed in other if changed] == ["x y"]


def test_texts_that_have_little_in_common_or_are_very_long_have_no_marks() -> None:
    few = diff_words("one two three four five six", "seven eight nine ten eleven six")
    long = diff_words("word " * MOST_WORDS, "word " * MOST_WORDS + "more")
    assert not any(changed for parts in (*few, *long) for _, changed in parts)
