"""The recipe of ProsocialDialog, on rows that were made up here: in the published schema and in the
reduced one."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import dspy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowest_dspy.errors import DataError, ProgramError
from cowest_dspy.experiment.data import SPLITS, check_apart
from cowest_dspy.program.adapters import LineAdapter
from cowest_dspy.program.examples import examples as as_examples
from cowest_dspy.testing import ScriptedEngine
from cowest_dspy.utils import importing
from cowest_dspy.utils.jsonl import read_jsonl, write_jsonl

RECIPE = Path(__file__).parents[2] / "programs" / "prosocial.py"
ORDINAL = RECIPE.parents[1] / "metrics" / "ordinal.py"


def of(name: str) -> Any:
    return importing.load(f"{RECIPE}:{name}")


LABELS: tuple[str, ...] = of("LABELS")
PLACES = ("garden", "kitchen", "harbour", "library", "station")
DEEDS = ("swept", "forgot", "painted", "left", "shared", "sold", "hid", "mended")


def published(number: int, response_id: int = 0, **more: Any) -> dict[str, Any]:
    """A row in the published schema; two in five are casual and have no rules of thumb."""
    label = LABELS[max(number % 6 - 1, 0)]
    thumb = (
        []
        if label == "casual"
        else [f"It's good to think of others in the {PLACES[number % 5]}", "This needs caution."]
    )
    return {
        "context": (
            f"I {DEEDS[number % 8]} thing{number} with man{number} on day{number} in the "
            f"{PLACES[number % 5]}."
        ),
        "response": "Is that so?",
        "rots": thumb,
        "safety_label": f"__{label.replace(' ', '_')}__",
        "safety_annotations": [label] * 3,
        "safety_annotation_reasons": [
            None,
            f"somebody works in the {PLACES[number % 5]}",
            "casual",
            "a deed",
        ],
        "dialogue_id": number,
        "response_id": response_id,
        "episode_done": response_id == 1,
        **more,
    }


def reduced(number: int) -> dict[str, Any]:
    row = published(number)
    return {
        "id": f"made-{number}",
        "context": row["context"],
        "safety_label": row["safety_label"],
        "orig_split": "test",
        "turn": 0,
    }


@pytest.fixture
def full(tmp_path: Path) -> str:
    """60 dialogues to train on, 12 of dev and of test; each has a second utterance."""
    spans = {"train": range(60), "dev": range(60, 72), "test": range(72, 84)}
    for split, numbers in spans.items():
        turns = [
            published(number, turn, **({"context": f"Reply to {number}"} if turn else {}))
            for number in numbers
            for turn in (0, 1)
        ]
        write_jsonl(tmp_path / "full" / f"{split}.jsonl", turns)
    return str(tmp_path / "full")


@pytest.fixture
def small(tmp_path: Path) -> str:
    """As the full rows, but with few fields, and without a test split."""
    write_jsonl(tmp_path / "small" / "train.jsonl", [reduced(number) for number in range(60)])
    write_jsonl(tmp_path / "small" / "dev.jsonl", [reduced(number) for number in range(60, 84)])
    return str(tmp_path / "small")


@pytest.fixture(params=["full", "small"])
def rows(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue(request.param)


def test_splits_are_disjoint_and_complete_and_as_large_as_said(rows: str) -> None:
    splits = {
        split: as_examples(of("examples")(split, 0, rows), ["context"])
        for split in ("archive", *SPLITS)
    }
    # Without a file of test that of dev is test, and dev is a half of train.
    published = (Path(rows) / "test.jsonl").is_file()
    dev, train, test = (12, 15, 12) if published else (7, 8, 24)
    assert {split: len(made) for split, made in splits.items()} == {
        "archive": 45,
        "train": train,
        "dev": dev,
        "test": test,
    }
    check_apart(splits, ["context"])
    assert all(example.answer in LABELS for made in splits.values() for example in made)
    assert not any("Reply" in example.context for made in splits.values() for example in made), (
        "first utterances only"
    )


def test_the_same_seed_gives_the_same_rows_and_another_one_others(rows: str) -> None:
    examples = of("examples")
    for split in ("archive", *SPLITS):
        first = examples(split, 1, rows)
        of("_splits").cache_clear()
        assert examples(split, 1, rows) == first
    assert examples("archive", 1, rows) != examples("archive", 2, rows)


def test_a_text_in_two_files_stays_in_the_test(full: str) -> None:
    twice = read_jsonl(Path(full, "test.jsonl"))[0]
    for split in ("train", "dev"):
        path = Path(full, f"{split}.jsonl")
        write_jsonl(
            path,
            [
                *read_jsonl(path),
                {**twice, "context": twice["context"].upper() + "  ", "dialogue_id": 999},
            ],
        )
    splits = {split: of("examples")(split, 0, full) for split in ("archive", *SPLITS)}
    assert [
        split
        for split, made in splits.items()
        for row in made
        if row["context"].lower() == twice["context"].lower()
    ] == ["test"]


@pytest.mark.parametrize(
    "change", [{"safety_label": "__fine__"}, {"context": " "}, {"safety_label": None}]
)
def test_a_row_without_context_or_label_is_an_error_that_shows_no_text(
    full: str, change: dict[str, Any]
) -> None:
    write_jsonl(
        Path(full, "dev.jsonl"),
        [published(61), {**published(62, context="A text that is not to be shown"), **change}],
    )
    with pytest.raises(DataError, match=r"dev, row 2: .*safety_label") as caught:
        of("examples")("dev", 0, full)
    assert "not to be shown" not in str(caught.value)


def test_the_hub_is_asked_for_its_own_names_of_splits(
    full: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"train": "train", "validation": "dev", "test": "test"}

    def hub(where: str, split: str) -> list[dict[str, Any]]:
        assert where == "hub:allenai/prosocial-dialog"
        return read_jsonl(Path(full, f"{files[split]}.jsonl"))

    expected = {split: of("examples")(split, 5, full) for split in ("archive", *SPLITS)}
    monkeypatch.setitem(of("examples").__globals__, "read_rows", hub)
    assert {split: of("examples")(split, 5) for split in ("archive", *SPLITS)} == expected
    of("_splits").cache_clear()


def test_an_unknown_split_or_folder_is_an_error(small: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="archive, train, dev, test"):
        of("examples")("validation", 0, small)
    with pytest.raises(DataError, match="nowhere"):
        of("examples")("dev", 0, str(tmp_path / "nowhere"))


def test_notes_are_rules_of_thumb_or_reasons_and_name_no_label(full: str) -> None:
    for row in of("examples")("archive", 0, full):
        place = next(place for place in PLACES if place in row["context"])
        if row["answer"] == "casual":
            assert row["notes"] == f"somebody works in the {place}. a deed."
        else:
            assert row["notes"] == f"It's good to think of others in the {place}."


def completions(made: list[dict[str, Any]]) -> list[str]:
    return [row["completion"][0]["content"] for row in made]


def test_drafts_are_taught_in_each_format(full: str) -> None:
    asked = of("taught")(0, full)
    direct, knowledge, thought = (of("draft_rows")(0, full, draft) for draft in of("DRAFTS"))
    assert completions(direct) == [row["answer"] for row in asked]
    assert completions(knowledge) == [row["notes"] for row in asked]
    assert completions(thought) == [
        f"Reasoning: {row['notes']}\nAnswer: {row['answer']}" for row in asked
    ]
    with pytest.raises(ProgramError, match="essay"):
        of("draft_rows")(0, full, "essay")


def test_without_notes_a_template_says_what_the_level_means_but_not_its_name(small: str) -> None:
    asked, taught = of("taught")(0, small), completions(of("draft_rows")(0, small))
    assert all(
        text in of("BACKGROUNDS")[row["answer"]] for row, text in zip(asked, taught, strict=True)
    )
    assert not any(
        word in text.lower() for text in taught for word in ("casual", "caution", "intervention")
    )
    assert len(set(taught)) > len(LABELS), "one level is said in several ways"


def test_what_rows_do_not_bring_the_strong_model_writes(small: str) -> None:
    strong = ScriptedEngine(
        lambda request: f"{request['messages'][-1]['content'].split()[2]} is what one did."
    )
    told: list[tuple[int, int]] = []
    made = of("rationalised_rows")(
        0, small, strong=strong.lm(), progress=lambda *now: told.append(now)
    )
    asked = of("taught")(0, small)
    assert completions(made) == [f"{row['context'].split()[1]} is what one did." for row in asked]
    assert [row["prompt"] for row in made] == [row["prompt"] for row in of("draft_rows")(0, small)]
    assert told[-1] == (len(asked), len(asked)) == (45, 45)


def test_background_that_names_a_label_is_left_out_but_reasoning_may(small: str) -> None:
    def naming(request: dict[str, Any]) -> str:
        return (
            "One needs caution."
            if "garden" in request["messages"][-1]["content"]
            else "One should be kind."
        )

    known, thought = (
        of("rationalised_rows")(0, small, draft, strong=ScriptedEngine(naming).lm())
        for draft in ("knowledge", "chain_of_thought")
    )
    asked = of("taught")(0, small)
    assert len(thought) == len(asked)
    assert len(known) == sum("garden" not in row["context"] for row in asked) < len(asked)
    assert set(completions(known)) == {"One should be kind."}


def test_where_rows_bring_notes_nothing_is_asked(full: str, small: str) -> None:
    silent = ScriptedEngine({})
    assert of("rationalised_rows")(0, full, strong=silent.lm()) == of("draft_rows")(0, full)
    assert of("rationalised_rows")(0, small, "direct", strong=silent.lm()) == of("draft_rows")(
        0, small, "direct"
    )
    assert silent.asked == []


def test_answers_are_learned_from_the_archive_and_from_train(rows: str) -> None:
    prompts = [row["prompt"][-1]["content"] for row in of("answer_rows")(0, rows)]
    expected = [
        row["context"] for split in ("archive", "train") for row in of("examples")(split, 0, rows)
    ]
    assert sorted(prompts) == sorted(f"Context: {text}" for text in expected)


def test_what_is_too_long_is_not_learned_from_but_still_tested(small: str) -> None:
    for split in ("train", "dev"):
        write_jsonl(
            Path(small, f"{split}.jsonl"),
            [{**reduced(n), "context": f"word{n}{split} " * 81} for n in range(8)],
        )
    assert of("taught")(0, small) == []
    assert len(of("examples")("test", 0, small)) == 8


@given(
    counts=st.lists(st.integers(0, 9), min_size=5, max_size=5),
    count=st.integers(1, 30),
    seed=st.integers(0, 3),
)
def test_law_balanced_rows_are_as_even_as_they_can_be(
    counts: list[int], count: int, seed: int
) -> None:
    rows = [
        {"id": f"{label}-{n}", "answer": label}
        for label, many in zip(LABELS, counts, strict=True)
        for n in range(many)
    ]
    made = of("balanced")(rows, count, seed)
    assert len(made) == min(count, len(rows)) and len({row["id"] for row in made}) == len(made)
    assert made == of("balanced")(rows, count, seed)
    taken = Counter(row["answer"] for row in made)
    most = max(taken.values(), default=0)
    assert all(
        taken[label] >= min(many, most - 1) for label, many in zip(LABELS, counts, strict=True)
    )


@pytest.mark.parametrize(
    ("draft", "said", "shown"),
    [
        ("knowledge", "It's good to help.", "It's good to help."),
        ("direct", "Answer: Needs_Caution.", "needs caution"),
        (
            "chain_of_thought",
            "Reasoning: It may hurt.\nAnswer: casual",
            "Reasoning: It may hurt.\nAnswer: casual",
        ),
    ],
)
def test_the_program_asks_as_the_drafter_was_taught(
    full: str, draft: str, said: str, shown: str
) -> None:
    weak, strong = (
        ScriptedEngine(lambda request: said),
        ScriptedEngine(lambda request: "__needs_caution__"),
    )
    program = of("program")(draft).bind(weak=weak.lm(), strong=strong.lm())
    row = of("taught")(0, full)[0]
    made = program(context=row["context"])
    assert (made.draft, made.answer) == (shown, "needs caution")
    assert weak.asked[0]["messages"] == of("draft_rows")(0, full, draft)[0]["prompt"]


def test_the_weak_model_is_asked_alone_as_it_was_taught(full: str) -> None:
    engine = ScriptedEngine(lambda request: "casual")
    row = of("taught")(0, full, False)[0]
    with dspy.context(lm=engine.lm(), adapter=LineAdapter()):
        assert of("direct")()(context=row["context"]).answer == "casual"
    assert engine.asked[0]["messages"] == of("answer_rows")(0, full)[0]["prompt"]


def test_worked_examples_hold_every_label_in_varied_and_partly_wrong_drafts(full: str) -> None:
    shots = of("SHOTS")
    assert {shot["answer"] for shot in shots} == set(LABELS)
    wrong = [shot["drafted"] for shot in shots if shot["drafted"] != shot["answer"]]
    assert 0 < len(wrong) <= len(shots) / 4
    assert not any(label in shot["known"] for shot in shots for label in LABELS), (
        "knowledge names no label"
    )


@pytest.mark.parametrize("draft", ["direct", "knowledge", "chain_of_thought"])
def test_worked_examples_show_drafts_in_the_format_that_is_drafted(draft: str) -> None:
    program = of("program")(draft)
    said = [demo.background for demo in program.refine.predictors()[0].demos]
    assert all((one in LABELS) == (draft == "direct") for one in said)
    assert all(("Answer: " in one) == (draft == "chain_of_thought") for one in said)


def test_the_labels_are_those_of_the_metrics_in_order() -> None:
    assert importing.load(f"{ORDINAL}:LABELS") == LABELS
    assert set(of("BACKGROUNDS")) == set(LABELS)


def test_no_row_to_learn_from_is_long(rows: str) -> None:
    for draft in of("DRAFTS"):
        for row in of("draft_rows")(0, rows, draft):
            assert len(json.dumps(row).split()) < 130


def test_what_nearly_stands_in_a_held_out_split_is_not_trained_on(full: str) -> None:
    path = Path(full, "train.jsonl")
    near = published(72)["context"].replace(".", " today.")
    write_jsonl(path, [*read_jsonl(path), {**published(500), "context": near, "dialogue_id": 500}])
    for split in ("archive", "train"):
        assert near not in {row["context"] for row in of("examples")(split, 0, full)}


def test_the_drafter_learns_labels_as_often_as_they_come(full: str) -> None:
    asked = of("taught")(0, full)
    assert completions(of("draft_rows")(0, full, "direct")) == [row["answer"] for row in asked]
    even = completions(of("draft_rows")(0, full, "direct", True))
    assert even == [row["answer"] for row in of("taught")(0, full, True)]
