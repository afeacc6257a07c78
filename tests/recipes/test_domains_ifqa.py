"""The IfQA recipe on invented rows: splits, what the drafter is taught, the download, and that no
passage gets into a prompt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import dspy
import pytest
from domain_rows import SECRET, counterfactual, write_rows
from hypothesis import given
from hypothesis import strategies as st
from loopback import listening, send_json

from cowest_dspy import load_config
from cowest_dspy.errors import DataError, ProgramError
from cowest_dspy.experiment.data import check_apart, load_program, load_splits
from cowest_dspy.experiment.data import sft_rows as of_table
from cowest_dspy.program.collaboration import signature_of
from cowest_dspy.program.examples import examples as as_examples
from cowest_dspy.testing import ScriptedEngine
from cowest_dspy.tuning.data import sft_rows
from cowest_dspy.utils import importing

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "programs/ifqa.py"
DRAFTS = ("direct", "knowledge", "chain_of_thought")


def named(name: str) -> Any:
    return importing.load(f"{RECIPE}:{name}")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("ifqa")
    return str(write_rows(folder, train=counterfactual(40, "train"), dev=counterfactual(20, "dev")))


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
    assert {one.split("-")[0] for one in ids(made["archive"] + made["train"])} == {"train"}
    assert {one.split("-")[0] for one in ids(made["dev"] + made["test"])} == {"dev"}
    check_apart(
        {name: as_examples(part, ["question"]) for name, part in made.items()}, ["question"]
    )


def test_a_seed_always_makes_the_same_splits_and_another_one_others(
    rows: str, tmp_path: Path
) -> None:
    copy = str(
        write_rows(tmp_path, train=counterfactual(40, "train"), dev=counterfactual(20, "dev"))
    )
    assert splits(rows) == splits(copy), "the same rows from another folder, read anew"
    assert ids(splits(rows)["test"]) != ids(splits(rows, seed=1)["test"])


def test_questions_that_nearly_stand_in_a_more_protected_split_are_dropped_and_counted(
    tmp_path: Path,
) -> None:
    train, dev, test = (
        counterfactual(20, "train"),
        counterfactual(6, "dev"),
        counterfactual(6, "test"),
    )
    again = [{**test[0], "question": test[0]["question"].replace("If ", "Supposing ")}, {**dev[1]}]
    for number, row in enumerate(again):
        row["idx"] = 100 + number
    rows = str(
        write_rows(tmp_path, train=[*train, *again], dev=[*dev, {**test[2], "idx": 100}], test=test)
    )
    made = splits(rows)
    assert not [
        one for part in made.values() for one in ids(part) if one.endswith(("-100", "-101"))
    ]
    dropped = named("dropped")(rows=rows)
    assert (
        dropped["test"] == 0 and dropped["dev"] == 1 and dropped["train"] + dropped["archive"] == 2
    )
    assert ids(made["test"]) == [f"test-{number}" for number in range(6)]


def test_rows_that_do_not_fit_are_errors_that_say_so(tmp_path: Path, rows: str) -> None:
    for broken in (
        {"question": ""},
        {"answers": []},
        {"answers": "one"},
        {"context": "text"},
        {"context": None},
    ):
        folder = tmp_path / "-".join(f"{key}{value}" for key, value in broken.items()).replace(
            "/", ""
        )
        where = str(
            write_rows(
                folder,
                train=counterfactual(2, "train"),
                dev=[{**counterfactual(1, "dev")[0], **broken}],
            )
        )
        with pytest.raises(DataError, match=r"\(dev\), row 1: a row has question, answers"):
            named("examples")("dev", rows=where)
    with pytest.raises(DataError, match='no split "valid": use archive, train, dev, test'):
        named("examples")("valid", rows=rows)


# The download


@contextmanager
def publishing(files: dict[str, Any]) -> Iterator[str]:
    """A server on loopback with these JSON files; gives the URL of their folder."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.removeprefix("/full/")
            send_json(self, 200 if name in files else 404, files.get(name, {"error": "Not Found"}))

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    with listening(server):
        yield f"http://127.0.0.1:{server.server_address[1]}/full"


def test_published_files_are_downloaded_and_make_the_same_splits_as_a_folder(
    tmp_path: Path,
) -> None:
    files = {split: counterfactual(12, split) for split in ("train", "dev", "test")}
    with publishing({f"{split}.json": part for split, part in files.items()}) as url:
        made = splits(url)
    assert made == splits(str(write_rows(tmp_path, **files)))
    assert len(made["test"]) == len(made["dev"]) == 12


def test_a_download_that_fails_says_what_to_do_instead() -> None:
    with (
        publishing({"train.json": counterfactual(3, "train")}) as url,
        pytest.raises(DataError, match=r"404.*one row a line as train\.jsonl"),
    ):
        named("examples")("dev", rows=url)
    with (
        publishing({"train.json": {"rows": []}}) as url,
        pytest.raises(DataError, match="not a JSON list of objects"),
    ):
        named("examples")("dev", rows=url)
    with pytest.raises(DataError, match="give that folder as rows"):
        named("examples")("dev", rows="http://127.0.0.1:9/closed")


# What is taught


@pytest.mark.parametrize("draft", DRAFTS)
def test_the_drafter_is_taught_in_the_prompt_that_it_is_asked_in(rows: str, draft: str) -> None:
    taught = named("draft_rows")(rows=rows, draft=draft)
    assert len(taught) == 30 and sft_rows(taught) == taught
    engine = ScriptedEngine(lambda request: "Reasoning: It is so.\nAnswer: It")
    bound = named("program")(draft).bind(weak=engine.lm())
    for example in splits(rows)["archive"]:
        bound.ask_draft(question=example["question"])
    asked = [
        [(message["role"], message["content"]) for message in request["messages"]]
        for request in engine.asked
    ]
    assert asked == [
        [(message["role"], message["content"]) for message in row["prompt"]] for row in taught
    ]


@pytest.mark.parametrize("draft", DRAFTS)
def test_what_the_drafter_is_taught_to_write_is_read_as_what_was_meant(
    rows: str, draft: str
) -> None:
    for row, example in zip(
        named("draft_rows")(rows=rows, draft=draft), splits(rows)["archive"], strict=True
    ):
        written = row["completion"][0]["content"]
        bound = named("program")(draft).bind(
            weak=ScriptedEngine(lambda request, written=written: written).lm()
        )
        outputs = bound.ask_draft(question=example["question"])
        assert outputs.draft == written
        if draft != "knowledge":
            assert outputs.answer == example["answer"]
        if draft != "direct":
            assert f"in {example['answer']}." in written, "the sentence that holds the answer"


def test_the_weak_model_is_taught_accepted_answers_of_archive_and_train(rows: str) -> None:
    made = splits(rows)
    taught = [row["completion"][0]["content"] for row in named("answer_rows")(rows=rows)]
    assert taught == [example["answer"] for example in made["archive"] + made["train"]]
    assert len(named("answer_rows")(rows=rows, most=5)) == 15


def test_a_row_without_a_passage_is_taught_only_directly_and_one_that_is_too_long_not_at_all(
    tmp_path: Path,
) -> None:
    train = [{**row, "context": []} for row in counterfactual(8, "train")]
    train.append({**counterfactual(9, "train")[8], "question": "If " + "and " * 300})
    rows = str(write_rows(tmp_path, train=train, dev=counterfactual(4, "dev")))
    archive = [one for one in splits(rows)["archive"] if len(one["question"]) < 500]
    assert len(named("draft_rows")(rows=rows, draft="direct")) == len(archive)
    assert (
        named("draft_rows")(rows=rows)
        == named("draft_rows")(rows=rows, draft="chain_of_thought")
        == []
    )


def passage(
    *passages: str,
    question: str = "If iron were rare, where would it be mined?",
    answer: str = "Tarn",
) -> dict[str, Any]:
    return {"question": question, "answers": [answer], "context": list(passages)}


def test_the_nearest_sentences_are_those_of_the_answer_and_of_the_question_in_their_order() -> None:
    nearest = named("nearest_sentences")
    row = passage(
        "Fish swim. Iron was mined by many.",
        "Much of it came from Tarn. " + "Nothing else is told here. " * 12,
    )
    assert nearest(row) == "Iron was mined by many. Much of it came from Tarn."
    assert nearest(row, most_words=7) == "Much of it came from Tarn.", (
        "the answer's before the question's"
    )
    assert nearest(passage("Star Tarnish is no Tar. Iron is mined.")) == "Iron is mined.", (
        "an answer is whole words"
    )
    assert nearest(
        passage("It came from Tarn " + "and on " * 60)
    ) == "It came from Tarn " + " ".join(("and on " * 20 + "and").split())
    assert nearest(passage()) == nearest(passage("  ")) == ""


@given(st.lists(st.text(max_size=200), max_size=3), st.text(max_size=40), st.text(max_size=20))
def test_the_nearest_sentences_are_few_words_of_the_passages(
    passages: list[str], question: str, answer: str
) -> None:
    near = named("nearest_sentences")(passage(*passages, question=question, answer=answer))
    words = " ".join(passages).split()
    assert len(near.split()) <= 45 and set(near.split()) <= set(words)
    assert bool(near) == bool(words)


# Passages


@pytest.mark.parametrize("draft", DRAFTS)
def test_no_passage_gets_into_any_prompt(rows: str, draft: str) -> None:
    weak = ScriptedEngine(lambda request: "Reasoning: It is so.\nAnswer: It", model="scripted/weak")
    strong = ScriptedEngine(lambda request: "It", model="scripted/strong")
    program = named("program")(draft).bind(weak=weak.lm(), strong=strong.lm())
    alone = named("direct")()
    alone.set_lm(strong.lm())
    for part in splits(rows).values():
        for example in as_examples(part, ["question"]):
            assert SECRET in example.context
            inputs = dict(example.inputs())
            program(**inputs)
            program.ask_alone(**inputs)
            program.ask_module(alone, **inputs)
    assert len(weak.asked) == 60 and len(strong.asked) == 180
    assert SECRET not in json.dumps(weak.asked + strong.asked)


@pytest.mark.parametrize("draft", DRAFTS)
def test_with_passages_every_prompt_has_the_passage_and_the_drafter_is_taught_with_it(
    rows: str, draft: str
) -> None:
    weak = ScriptedEngine(lambda request: "Reasoning: It is so.\nAnswer: It", model="scripted/weak")
    strong = ScriptedEngine(lambda request: "It", model="scripted/strong")
    program = named("program")(draft, passages=True).bind(weak=weak.lm(), strong=strong.lm())
    made = named("examples")("archive", rows=rows, passages=True)
    assert [row["id"] for row in made] == ids(splits(rows)["archive"]), "the same splits"
    assert not any("context" in row for row in made)
    for example in as_examples(made, ["passage", "question"]):
        inputs = dict(example.inputs())
        program(**inputs)
        program.ask_alone(**inputs)
    asked = [request["messages"] for request in weak.asked + strong.asked]
    assert len(asked) == 30 * 3
    assert all(SECRET in messages[-1]["content"] for messages in asked)
    shown = [one["content"] for one in strong.asked[0]["messages"]]
    assert all(any(shot["passage"] in text for text in shown) for shot in named("SHOTS"))
    taught = named("draft_rows")(rows=rows, draft=draft, passages=True)
    assert [row["prompt"] for row in taught] == [
        [{"role": one["role"], "content": one["content"]} for one in request["messages"]]
        for request in weak.asked
    ]
    answered = named("answer_rows")(rows=rows, passages=True)
    assert len(answered) == 40 and all(SECRET in str(row["prompt"]) for row in answered)


def test_the_task_with_passages_is_read_as_its_toml_declares_it(rows: str) -> None:
    files = [ROOT / "programs/ifqa_passages.toml", ROOT / "programs/backends/hub.toml"]
    config = load_config(files, overrides={"data.rows": rows, "data.test": 5})
    program = load_program(config)
    made = load_splits(config, program)
    assert {split: len(part) for split, part in made.items()} == {"train": 10, "dev": 10, "test": 5}
    assert list(made["test"][0].inputs()) == ["passage", "question"]
    [drafting] = program.draft.predictors()
    assert list(signature_of(drafting).input_fields) == ["passage", "question"]
    taught = of_table(config, str(config.sft and config.sft.drafts), "drafts")
    assert len(taught) == 30 and "the passage" not in taught[0]["prompt"][0]["content"]
    with pytest.raises(DataError, match="passage"):
        load_splits(
            load_config(files, overrides={"data.rows": rows, "data.arguments.passages": False}),
            program,
        )


def test_the_corpus_is_every_passage_once_and_nothing_of_the_questions(rows: str) -> None:
    corpus = named("corpus")(rows=rows)
    published = [
        row["context"][0]
        for name, count in (("train", 40), ("dev", 20))
        for row in counterfactual(count, name)
    ]
    assert corpus == sorted(set(published))
    assert not any("If " in text for text in corpus)


# The program


def test_the_worked_examples_hold_right_and_wrong_drafts_in_the_format_of_the_drafts() -> None:
    right = [demo.background == demo.answer for demo in named("program")("direct").refine.demos]
    reasoned = [
        demo.background.split("\nAnswer: ")[1] == demo.answer
        for demo in named("program")("chain_of_thought").refine.demos
    ]
    assert right == reasoned and right.count(True) > right.count(False) > 0
    with pytest.raises(ProgramError, match='no draft format "cot"'):
        named("program")("cot")


def test_the_metric_accepts_every_accepted_answer(rows: str) -> None:
    metric = importing.load(
        load_config([ROOT / "programs/ifqa.toml", ROOT / "programs/backends/scripted.toml"]).metric
    )
    for example in as_examples(splits(rows)["test"], ["question"]):
        assert [
            metric(example, dspy.Prediction(answer=answer)) for answer in (*example.answers, "1")
        ] == [1.0, 1.0, 0.0]


def test_the_order_of_sets_decides_nothing() -> None:
    """What the drafter learns is the same in every process: with a plain sum, ties of sentences
    went by the hash of their words."""
    script = """
import random, sys
from cowest_dspy.utils.importing import load
near = load(sys.argv[1] + ":nearest_sentences")
draw = random.Random(0)
words = [f"word{chr(97 + n)}" for n in range(9)]
for _ in range(60):
    said = [" ".join(draw.sample(words, 6)).capitalize() + "." for _ in range(9)]
    print(near({"question": " ".join(words), "answers": ["nothing"], "context": [" ".join(said)]}, 12))
"""
    said = {
        subprocess.run(
            [sys.executable, "-c", script, str(RECIPE)],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in (1, 2, 3)
    }
    assert len(said) == 1
