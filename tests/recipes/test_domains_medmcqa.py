"""The MedMCQA recipe on invented rows: its splits, what the drafter is taught, and that no
explanation gets into a prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from domain_rows import SECRET, medical, write_rows
from hypothesis import given
from hypothesis import strategies as st

from cowest_dspy.errors import DataError, ProgramError
from cowest_dspy.experiment.data import check_apart
from cowest_dspy.program.examples import examples as as_examples
from cowest_dspy.testing import ScriptedEngine
from cowest_dspy.tuning.data import sft_rows
from cowest_dspy.utils import importing

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "programs/medmcqa.py"
DRAFTS = ("direct", "knowledge", "chain_of_thought")
INPUTS = ["question", "options"]


def named(name: str) -> Any:
    return importing.load(f"{RECIPE}:{name}")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("medmcqa")
    return str(
        write_rows(folder, train=medical(40, "train", explained=0.5), dev=medical(20, "dev"))
    )


def splits(rows: str, seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    return {
        split: named("examples")(split, seed=seed, rows=rows)
        for split in ("archive", "train", "dev", "test")
    }


def ids(made: list[dict[str, Any]]) -> list[str]:
    return [row["id"] for row in made]


# Splits


def test_every_row_is_in_one_split_and_held_out_ones_stay_held_out(rows: str) -> None:
    made = splits(rows)
    assert {name: len(part) for name, part in made.items()} == {
        "archive": 30,
        "train": 10,
        "dev": 10,
        "test": 10,
    }
    assert len({one for part in made.values() for one in ids(part)}) == 60
    assert all(one.startswith("train-") for one in ids(made["archive"] + made["train"]))
    assert all(one.startswith("dev-") for one in ids(made["dev"] + made["test"]))
    check_apart({name: as_examples(part, INPUTS) for name, part in made.items()}, INPUTS)


def test_a_seed_always_makes_the_same_splits_and_another_one_others(
    rows: str, tmp_path: Path
) -> None:
    copy = str(
        write_rows(tmp_path, train=medical(40, "train", explained=0.5), dev=medical(20, "dev"))
    )
    assert splits(rows) == splits(copy), "the same rows from another folder, read anew"
    assert ids(splits(rows)["test"]) != ids(splits(rows, seed=1)["test"])
    assert set(ids(splits(rows, 1)["test"] + splits(rows, 1)["dev"])) == set(
        ids(splits(rows)["test"] + splits(rows)["dev"])
    )


def test_a_test_file_with_answers_is_the_test_split_and_one_without_is_none(tmp_path: Path) -> None:
    given = {"train": medical(20, "train"), "dev": medical(8, "dev")}
    with_answers = str(write_rows(tmp_path / "a", **given, test=medical(5, "test")))
    assert ids(splits(with_answers)["test"]) == [f"test-{number}" for number in range(5)]
    assert len(splits(with_answers)["dev"]) == 8
    secret = [{**row, "cop": -1, "exp": None} for row in medical(5, "test")]
    without = str(write_rows(tmp_path / "b", **given, test=secret))
    assert {one.split("-")[0] for one in ids(splits(without)["test"])} == {"dev"}


def test_on_the_hub_the_validation_split_is_test_and_dev_is_cut_off_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub's client reads a folder like a dataset of the Hub."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    secret = [{**row, "cop": -1} for row in medical(5, "test")]
    folder = write_rows(
        tmp_path / "hub", train=medical(60, "train"), validation=medical(12, "valid"), test=secret
    )
    made = splits(f"hub:{folder}")
    assert sorted(ids(made["test"])) == sorted(f"valid-{number}" for number in range(12))
    assert len(made["dev"]) == 6 and {one.split("-")[0] for one in ids(made["dev"])} == {"train"}
    assert len(made["archive"] + made["train"]) == 54


def test_what_nearly_stands_in_a_more_protected_split_is_dropped_and_counted(
    tmp_path: Path,
) -> None:
    train, dev, test = medical(20, "train"), medical(6, "dev"), medical(6, "test")
    again = {**test[0], "id": "again", "question": test[0]["question"].upper()}
    turned = {**dev[1], "id": "turned", "opa": dev[1]["opb"], "opb": dev[1]["opa"], "cop": 3}
    rows = str(
        write_rows(
            tmp_path,
            train=[*train, again, turned],
            dev=[*dev, {**test[2], "id": "in-dev"}],
            test=test,
        )
    )
    made = splits(rows)
    assert not {"again", "turned", "in-dev"} & {one for part in made.values() for one in ids(part)}
    dropped = named("dropped")(rows=rows)
    assert (
        dropped["test"] == 0 and dropped["dev"] == 1 and dropped["train"] + dropped["archive"] == 2
    )
    assert sum(len(part) for part in made.values()) == 32


ASKED = {
    "question": "Best test?",
    "opa": "serum of the left tarn",
    "opb": "salts in morning mist",
    "opc": "heat under both soles",
    "cop": 0,
}


@pytest.mark.parametrize(
    "changes",
    [
        {"cop": 1},
        {"opa": "salts in morning mist", "opb": "serum of the left tarn"},
        {"opb": "hair under a lens", "opc": "a walk up two hills", "opd": "a night without sleep"},
    ],
    ids=["another answer is said to be right", "in another order", "the same answer among others"],
)
def test_a_question_that_was_changed_a_little_is_still_the_same(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    asked = {**ASKED, "opd": "the pulse of twins", "id": "asked", "exp": None}
    stranger = {**asked, "id": "stranger", "opa": "hair under a lens", "opb": "a walk up two hills"}
    train = [*medical(8, "train"), {**asked, **changes, "id": "changed"}, stranger]
    rows = str(write_rows(tmp_path, train=train, dev=medical(4, "dev"), test=[asked]))
    left = ids(splits(rows)["archive"] + splits(rows)["train"])
    assert "changed" not in left and "stranger" in left and len(left) == 9


def test_rows_that_do_not_fit_are_errors_that_say_so(tmp_path: Path, rows: str) -> None:
    with pytest.raises(DataError, match="There is no folder"):
        named("examples")("dev", rows=str(tmp_path / "none"))
    lacking = [
        {name: value for name, value in row.items() if name != "opc"} for row in medical(3, "train")
    ]
    broken = str(write_rows(tmp_path / "broken", train=lacking, dev=medical(3, "dev")))
    with pytest.raises(DataError, match="row 1: opc is missing"):
        named("examples")("dev", rows=broken)
    with pytest.raises(DataError, match='no split "validation": use archive, train, dev, test'):
        named("examples")("validation", rows=rows)
    with pytest.raises(DataError, match="openlifescienceai/medmcqa"):
        named("examples")("dev")  # the default: the Hub, which tests do not have


# What is taught


def test_an_example_names_the_right_letter_and_shows_every_option(rows: str) -> None:
    published = {row["id"]: row for row in medical(20, "dev")}
    for example in splits(rows)["test"]:
        row = published[example["id"]]
        lines = example["options"].splitlines()
        assert [line[:3] for line in lines] == ["A. ", "B. ", "C. ", "D. "]
        assert (
            lines["ABCD".index(example["answer"])][3:]
            == row[("opa", "opb", "opc", "opd")[row["cop"]]]
        )


@pytest.mark.parametrize("draft", DRAFTS)
def test_the_drafter_is_taught_in_the_prompt_that_it_is_asked_in(rows: str, draft: str) -> None:
    taught = named("draft_rows")(rows=rows, draft=draft)
    assert sft_rows(taught) == taught
    engine = ScriptedEngine(lambda request: "Reasoning: It is so.\nAnswer: A. It")
    bound = named("program")(draft).bind(weak=engine.lm())
    for example in splits(rows)["archive"]:
        bound.ask_draft(question=example["question"], options=example["options"])
    asked = [
        [(message["role"], message["content"]) for message in request["messages"]]
        for request in engine.asked
    ]
    assert all(
        [(message["role"], message["content"]) for message in row["prompt"]] in asked
        for row in taught
    )


@pytest.mark.parametrize("draft", DRAFTS)
def test_what_the_drafter_is_taught_to_write_is_read_as_what_was_meant(
    rows: str, draft: str
) -> None:
    choices = {
        example["question"]: example["options"].splitlines()["ABCD".index(example["answer"])]
        for example in splits(rows)["archive"]
    }
    for row in named("draft_rows")(rows=rows, draft=draft):
        written = row["completion"][0]["content"]
        question = row["prompt"][-1]["content"].splitlines()[0].removeprefix("Question: ")
        bound = named("program")(draft).bind(
            weak=ScriptedEngine(lambda request, written=written: written).lm()
        )
        outputs = bound.ask_draft(question=question, options="A. one")
        assert outputs.draft == written
        if draft != "knowledge":
            assert outputs.answer == choices[question]


def test_only_direct_drafts_are_taught_where_nothing_was_explained(rows: str) -> None:
    explained = {row["id"] for row in medical(40, "train", explained=0.5) if row["exp"]}
    with_knowledge = [one for one in ids(splits(rows)["archive"]) if one in explained]
    counts = {draft: len(named("draft_rows")(rows=rows, draft=draft)) for draft in DRAFTS}
    assert counts == {
        "direct": 30,
        "knowledge": len(with_knowledge),
        "chain_of_thought": len(with_knowledge),
    }
    assert 0 < len(with_knowledge) < 30
    assert len(named("draft_rows")(rows=rows, draft="direct", most=4)) == 4


def test_the_weak_model_is_taught_bare_letters_of_archive_and_train(rows: str) -> None:
    taught = named("answer_rows")(rows=rows)
    assert len(taught) == 40 and {row["completion"][0]["content"] for row in taught} <= set("ABCD")
    adapter = importing.load("cowest_dspy.program.adapters:LineAdapter")()
    signature = named("direct")().signature
    assert all(
        adapter.parse(signature, row["completion"][0]["content"])["answer"] in "ABCD"
        for row in taught
    )


def test_a_row_that_is_too_long_is_not_taught(tmp_path: Path) -> None:
    train = [
        {**row, "question": row["question"] + " " + "why " * 300} for row in medical(8, "train")
    ]
    rows = str(write_rows(tmp_path, train=train, dev=medical(4, "dev")))
    assert named("draft_rows")(rows=rows, draft="direct") == named("answer_rows")(rows=rows) == []


# Explanations


def explained(text: str) -> dict[str, Any]:
    return {"exp": text, "opa": "Iron", "opb": "Zinc salts", "opc": "Tin", "opd": "Lead", "cop": 1}


@pytest.mark.parametrize(
    ("published", "kept"),
    [
        (
            "Ans. (b) Zinc saltsZinc is part of many enzymes. So B is the answer.",
            "Zinc is part of many enzymes.",
        ),
        (
            "Answer- B. Zinc salts\nZinc is a part of many enzymes",
            "Zinc is a part of many enzymes.",
        ),
        (
            "Ans: is 'b' i.e., Zinc salts. Zinc is part of many enzymes.",
            "Zinc is part of many enzymes.",
        ),
        (
            "ANSWER: (B) Zinc salts(Ref Nobody 3/e p12)Zinc is part of many enzymes.",
            "Zinc is part of many enzymes.",
        ),
        (
            "Ans: B. Zinc saltsRef: Nobody & Co, 3 ed., pg. 12-14 Zinc is part of many enzymes.",
            "Zinc is part of many enzymes.",
        ),
        (
            "Zinc is part of many enzymes.It stays.Option C is wrong.",
            "Zinc is part of many enzymes. It stays.",
        ),
        ("Ans. b", ""),
        ("Zinc it is.", ""),
        (None, ""),
    ],
)
def test_an_explanation_loses_what_gives_the_option_away(published: str | None, kept: str) -> None:
    assert named("cleaned")({**explained(""), "exp": published}) == kept


@given(
    st.sampled_from(
        ["Ans. ", "Ans: ", "Answer- ", "ANS is ", "The correct answer is ", "Ans. is "]
    ),
    st.sampled_from(["B", "b", "(B)", "'b'", "B)", "(b)."]),
    st.lists(
        st.sampled_from(
            [
                "Salts of zinc are found in rocks.",
                "So answer is B.",
                "Option (b) is right.",
                "It heals wounds.",
            ]
        )
    ),
)
def test_however_it_begins_no_letter_is_taught(
    start: str, letter: str, sentences: list[str]
) -> None:
    cleaned = named("cleaned")(explained(f"{start}{letter} Zinc salts. {' '.join(sentences)}"))
    assert (
        "nswer" not in cleaned
        and "ption" not in cleaned
        and "B" not in cleaned
        and "b)" not in cleaned
    )


@given(st.text(max_size=400))
def test_a_cleaned_explanation_is_short_and_in_one_line(text: str) -> None:
    cleaned = named("cleaned")(explained(text))
    assert cleaned == " ".join(cleaned.split()) and len(cleaned.split()) <= 45


@pytest.mark.parametrize("draft", DRAFTS)
def test_no_explanation_gets_into_any_prompt(rows: str, draft: str) -> None:
    weak = ScriptedEngine(
        lambda request: "Reasoning: It is so.\nAnswer: A. It", model="scripted/weak"
    )
    strong = ScriptedEngine(lambda request: "A", model="scripted/strong")
    program = named("program")(draft).bind(weak=weak.lm(), strong=strong.lm())
    alone = named("direct")()
    alone.set_lm(strong.lm())
    for split, part in splits(rows).items():
        for example in as_examples(part, INPUTS, where=split):
            inputs = dict(example.inputs())
            assert SECRET not in json.dumps(inputs)
            program(**inputs)
            program.ask_alone(**inputs)
            program.ask_module(alone, **inputs)
    assert len(weak.asked) == 60 and len(strong.asked) == 180
    assert SECRET not in json.dumps(weak.asked + strong.asked)
    taught = named("draft_rows")(rows=rows, draft=draft) + named("answer_rows")(rows=rows)
    assert SECRET not in json.dumps([row["prompt"] for row in taught])


def test_explanations_are_taught_only_of_the_archive_and_looked_up_only_of_training_rows(
    rows: str,
) -> None:
    made = splits(rows)
    ceilings = {
        split: {row["oracle_explanation"] for row in part if SECRET in row["oracle_explanation"]}
        for split, part in made.items()
    }
    taught = {row["completion"][0]["content"] for row in named("draft_rows")(rows=rows)}
    assert taught == ceilings["archive"]
    looked_up = set(named("corpus")(rows=rows))
    assert looked_up == ceilings["archive"] | ceilings["train"]
    assert ceilings["test"] and not looked_up & (ceilings["dev"] | ceilings["test"])


# The program


def test_the_worked_examples_hold_right_and_wrong_drafts_in_the_format_of_the_drafts() -> None:
    letters = {
        draft: [
            demo.background.split("Answer: ")[-1][0] == demo.answer
            for demo in named("program")(draft).refine.demos
        ]
        for draft in ("direct", "chain_of_thought")
    }
    assert letters["direct"] == letters["chain_of_thought"] and {True, False} == set(
        letters["direct"]
    )
    assert all(
        demo.background.startswith("Reasoning: ")
        for demo in named("program")("chain_of_thought").refine.demos
    )
    assert {demo.answer for demo in named("program")().refine.demos} == set("ABCD")
    with pytest.raises(ProgramError, match='no draft format "cot"'):
        named("program")("cot")
