"""read_rows, and near-duplicates: laws, and that splits lose what nearly stands in a more protected
one."""

from __future__ import annotations

import logging
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowest_dspy.errors import DataError
from cowest_dspy.experiment.data import read_rows
from cowest_dspy.pairs.texts import CANDIDATES, drop_near_duplicates, near_duplicates, similarity
from cowest_dspy.utils.jsonl import write_jsonl

WORDS = st.lists(
    st.sampled_from(["iron", "zinc", "tin", "is", "hot", "The", "the", "of"]), max_size=14
).map(" ".join)
TEXTS = st.one_of(WORDS, st.text(max_size=20))


# Rows as they were published


def test_rows_come_from_the_file_of_their_split(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"n": 1}, {"n": 2}])
    assert read_rows(tmp_path, "train") == read_rows(str(tmp_path), "train") == [{"n": 1}, {"n": 2}]


def test_rows_of_the_hub_are_read_by_its_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_jsonl(tmp_path / "rows" / "train.jsonl", [{"n": 1, "text": "é"}, {"n": 2, "text": None}])
    write_jsonl(tmp_path / "rows" / "test.jsonl", [{"n": 3, "text": "x"}])
    assert read_rows(f"hub:{tmp_path / 'rows'}", "train") == [
        {"n": 1, "text": "é"},
        {"n": 2, "text": None},
    ]
    assert read_rows(f"hub:{tmp_path / 'rows'}", "test") == [{"n": 3, "text": "x"}]
    with pytest.raises(DataError, match=r"\(dev\) cannot be had"):
        read_rows(f"hub:{tmp_path / 'rows'}", "dev")


def test_rows_that_are_missing_are_an_error_that_says_what_is_there(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"n": 1}])
    with pytest.raises(DataError, match=r"no dev\.jsonl in .*, which holds train\.jsonl"):
        read_rows(tmp_path, "dev")
    with pytest.raises(DataError, match=r"no folder .*none.*dev\.jsonl, or from the Hub"):
        read_rows(tmp_path / "none", "dev")
    with pytest.raises(DataError, match="cannot be had"):
        read_rows("hub:nobody/has-this", "train")


# Similarity


@given(TEXTS, TEXTS)
def test_similarity_is_symmetric_between_0_and_1_and_1_with_itself(one: str, other: str) -> None:
    assert similarity(one, other) == similarity(other, one)
    assert 0 <= similarity(one, other) <= 1
    assert similarity(one, one) == 1


@given(WORDS)
def test_case_punctuation_and_spacing_do_not_count(text: str) -> None:
    assert similarity(text, " " + text.upper().replace(" ", ",  ")) == 1


def test_similarity_by_hand() -> None:
    assert similarity("iron is hot", "zinc is hot") == pytest.approx(2 / 4), "short texts: words"
    long = "one two three four five six seven eight nine ten"
    assert similarity(long, long.replace("ten", "last")) == pytest.approx(7 / 9), (
        "long ones: 7 of 8 + 8 - 7 triples"
    )
    assert similarity(long, " ".join(reversed(long.split()))) == 0, "long ones: their order counts"
    assert similarity("?", "!") == similarity("", "iron") == 0


# Finding


@given(st.lists(TEXTS, min_size=1, max_size=30), st.randoms())
def test_a_text_is_always_found_as_its_own_duplicate(texts: list[str], draw: random.Random) -> None:
    others = draw.sample(texts, len(texts))
    found = near_duplicates(texts, others)
    assert [near.other for near in found] == list(range(len(others)))
    assert all(
        near.similarity == similarity(texts[near.held_out], others[near.other]) == 1
        for near in found
    )


@given(st.lists(TEXTS, max_size=CANDIDATES), st.lists(TEXTS, max_size=8), st.floats(0.05, 1))
def test_with_few_texts_it_is_as_if_all_were_compared_with_all(
    held_out: list[str], others: list[str], threshold: float
) -> None:
    best = [max((similarity(text, other) for text in held_out), default=0.0) for other in others]
    found = {
        near.other: near.similarity
        for near in near_duplicates(held_out, others, threshold=threshold)
    }
    assert found == {place: score for place, score in enumerate(best) if score >= threshold}


@given(st.lists(WORDS, max_size=CANDIDATES), st.lists(WORDS, max_size=8), st.randoms())
def test_the_order_of_the_texts_does_not_matter(
    held_out: list[str], others: list[str], draw: random.Random
) -> None:
    first = {others[near.other]: near.similarity for near in near_duplicates(held_out, others)}
    turned = draw.sample(others, len(others))
    again = near_duplicates(draw.sample(held_out, len(held_out)), turned)
    assert {turned[near.other]: near.similarity for near in again} == first


def test_among_thousands_a_rephrased_text_is_found_and_a_stranger_is_not() -> None:
    draw = random.Random(0)
    vocabulary = ["".join(draw.choice("abdeiklmnorstu") for _ in range(6)) for _ in range(800)]
    held_out = [" ".join(draw.choices(vocabulary, k=16)) for _ in range(2000)]
    rephrased = [" ".join(["well", *text.split()[:-1], "then"]) for text in held_out[::100]]
    strangers = [" ".join(draw.choices(vocabulary, k=16)) for _ in range(50)]
    found = near_duplicates(held_out, [*rephrased, *strangers])
    assert [(near.other, near.held_out) for near in found] == [
        (place, 100 * place) for place in range(20)
    ]
    assert {near.similarity for near in found} == {13 / 16}, "13 triples in common, of 14 and 15"


@pytest.mark.parametrize("threshold", [0, -1, 1.5])
def test_a_threshold_that_cannot_be_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="similarity in"):
        near_duplicates(["a"], ["a"], threshold=threshold)


# Splits


def test_later_splits_lose_what_nearly_stands_in_earlier_ones_and_it_is_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    splits = {
        "test": [{"id": 1, "q": "How hot is iron?"}, {"id": 2, "q": "How hot is iron?"}],
        "dev": [{"id": 3, "q": "how hot is IRON"}, {"id": 4, "q": "Where is tin found?"}],
        "train": [{"id": 5, "q": "Where, is tin found"}, {"id": 6, "q": "What is lead good for?"}],
    }
    before = {name: list(rows) for name, rows in splits.items()}
    with caplog.at_level(logging.INFO, logger="cowest_dspy.pairs.texts"):
        made = drop_near_duplicates(splits, lambda row: row["q"])
    assert {name: [row["id"] for row in rows] for name, rows in made.splits.items()} == {
        "test": [1, 2],
        "dev": [4],
        "train": [6],
    }
    assert made.dropped == {"test": 0, "dev": 1, "train": 1}
    assert "'dev': 1" in caplog.text and splits == before


def test_any_of_several_texts_makes_a_duplicate() -> None:
    splits = {
        "test": [{"a": "iron", "b": "tin"}],
        "train": [{"a": "iron", "b": "x"}, {"a": "y", "b": "tin"}, {"a": "z", "b": "u"}],
    }
    assert drop_near_duplicates(splits, lambda row: row["a"]).dropped["train"] == 1
    assert (
        drop_near_duplicates(splits, lambda row: row["a"], lambda row: row["b"]).dropped["train"]
        == 2
    )


@given(st.lists(st.lists(WORDS, max_size=6), min_size=1, max_size=4))
def test_what_is_left_is_apart_and_the_first_split_is_whole(texts: list[list[str]]) -> None:
    made = drop_near_duplicates(
        {str(place): [{"q": text} for text in part] for place, part in enumerate(texts)},
        lambda row: row["q"],
    )
    parts = [[row["q"] for row in rows] for rows in made.splits.values()]
    assert parts[0] == texts[0]
    for place, part in enumerate(parts):
        assert not near_duplicates([text for earlier in parts[:place] for text in earlier], part)
        assert len(part) + made.dropped[str(place)] == len(texts[place])
