"""What Python code gives as examples: dictionaries, a dataset, examples without ids or without
marked inputs."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import dspy
import pytest
from pydantic import BaseModel
from scripted import questions, strong_that_reads, together, weak_that_varies

from cowest_dspy import Collaboration
from cowest_dspy.errors import DataError
from cowest_dspy.program.examples import accepted_inputs, prepare_examples

ROWS = [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(3)]


class Refine(dspy.Signature):
    """Answer in one word."""

    question: str = dspy.InputField()
    background: str = dspy.InputField()
    answer: str = dspy.OutputField()


def program(task: str = "question -> answer") -> Collaboration:
    return Collaboration(task)


def ids(given: Any, of: Collaboration | None = None) -> list[str]:
    return [one.id for one in prepare_examples(given, of or program())]


def test_dictionaries_a_dataset_and_examples_are_the_same() -> None:
    from datasets import Dataset

    wanted = prepare_examples(ROWS, program())
    bare = [dspy.Example(**row) for row in ROWS]
    for given in (
        Dataset.from_list(ROWS),
        bare,
        [one.with_inputs("question") for one in bare],
        iter(ROWS),
        [ROWS[0], *bare[1:]],
    ):
        found = prepare_examples(given, program())
        assert [one.toDict() for one in found] == [one.toDict() for one in wanted]
        assert [one.inputs().toDict() for one in found] == [
            {"question": row["question"]} for row in ROWS
        ]
    assert [one.labels().answer for one in wanted] == ["1", "2", "3"]
    assert not any("id" in one for one in bare), "what was given is left as it was"


def test_an_id_is_made_of_the_content() -> None:
    text = json.dumps(ROWS[0], sort_keys=True)
    assert ids(ROWS)[0] == hashlib.sha256(text.encode()).hexdigest()[:12]
    assert ids([dict(reversed(row.items())) for row in ROWS]) == ids(ROWS)
    assert ids([ROWS[2], ROWS[0]]) == [ids(ROWS)[2], ids(ROWS)[0]]
    assert len({*ids(ROWS), *ids([{**row, "answer": "other"} for row in ROWS])}) == 6


def test_an_id_is_the_same_in_every_process() -> None:
    code = (
        "from cowest_dspy import Collaboration\n"
        "from cowest_dspy.program.examples import prepare_examples\n"
        "row = {'question': '?', 'tags': {'one', 'two', 'three', 'four'}}\n"
        "print(prepare_examples([row], Collaboration('question -> answer'))[0].id)"
    )
    made = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(made) == 1 and len(made.pop().strip()) == 12


def test_what_dspys_datasets_draw_anew_is_no_content() -> None:
    def loaded() -> Any:
        return [dspy.Example(**row, dspy_uuid=str(uuid4()), dspy_split="train") for row in ROWS]

    assert ids(loaded()) == ids(ROWS) == ids(loaded())


def test_what_is_there_twice_without_an_id_is_numbered() -> None:
    one, other = ids(ROWS[:2])
    assert ids([ROWS[0], ROWS[1], ROWS[0], ROWS[0]]) == [one, other, f"{one}-2", f"{one}-3"]


def test_ids_that_are_given_stay() -> None:
    given = questions(3)
    assert prepare_examples(given, program()) is given
    assert ids([{"id": 7, "question": "?"}, {"id": None, "question": "!"}])[0] == "7"
    assert ids([given[0], given[1], given[0]]) == ["q0", "q1"], "the same example is one"
    with pytest.raises(DataError, match='Two different examples have the id "q0"'):
        ids([given[0], given[1].copy(id="q0")])


def test_inputs_that_are_not_marked_are_those_of_the_signatures() -> None:
    made = program("question, options: list[str] | None -> answer")
    assert accepted_inputs(made) == ["question", "options"]
    with_options = {"question": "?", "options": ["a"], "answer": "a"}
    without = {"question": "!", "options": None, "answer": "b"}
    found = prepare_examples([with_options, without], made)
    assert [sorted(one.inputs().keys()) for one in found] == [["options", "question"], ["question"]]
    # A gold background of the draft's own name is no input.
    assert accepted_inputs(program()) == ["question"]
    (one,) = prepare_examples([{"question": "?", "background": "gold"}], program())
    assert one.inputs().keys() == ["question"] and one.labels().background == "gold"


class Draft(dspy.Module):
    """A drafter whose inputs are its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.ask = dspy.Predict("question, table -> background")

    def forward(self, question: str, rows: list[str] | None = None) -> dspy.Prediction:
        return self.ask(question=question, table="|".join(rows or []))


class Anything(dspy.Module):
    """A drafter that names no input: a part of it asks no model."""

    def __init__(self, predictor: dspy.Module) -> None:
        super().__init__()
        self.ask, self.find = predictor, Nothing()

    def forward(self, **inputs: Any) -> dspy.Prediction:
        return self.ask(**inputs)


class Nothing(dspy.Module):
    """Gives nothing."""

    def forward(self, **inputs: Any) -> dspy.Prediction:
        return dspy.Prediction()


def test_inputs_of_a_module_of_ones_own_are_its_parameters() -> None:
    made = Collaboration(draft=Draft(), refine=dspy.Predict(Refine))
    assert accepted_inputs(made) == ["question", "rows"]


def test_inputs_that_nothing_names_must_be_marked() -> None:
    open_ended = Collaboration(
        draft=Anything(dspy.Predict("question -> background")),
        refine=Anything(dspy.Predict(Refine)),
    )
    with pytest.raises(DataError, match=r"row 1: none of its fields \(question, answer\) is an"):
        prepare_examples(ROWS, open_ended)
    marked = [dspy.Example(**row).with_inputs("question") for row in ROWS]
    assert len(prepare_examples(marked, open_ended)) == 3


def test_what_lacks_an_input_is_named() -> None:
    made = program("question, table -> answer")
    with pytest.raises(DataError, match=r'needs the input "table".*Give every row the field "tabl'):
        prepare_examples([{"question": "?", "tabel": "x"}], made)
    with pytest.raises(DataError, match=r'Give every row the field "table"'):
        prepare_examples([{"question": "?", "table": None}], made)
    # Marked inputs are taken as they are: the signature is not asked for more.
    half = [dspy.Example(question="?", table="t").with_inputs("question")]
    with pytest.raises(DataError, match=r'Write example.with_inputs\("question", "table"\)'):
        prepare_examples(half, made)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "no examples"),
        (["question"], "row 1: a str is no row"),
        ({"train": ROWS}, "given as a dict; .*Of several splits, give one"),
        ([{"question": "\ud800"}], "half of a surrogate pair"),
        ([dspy.Example(id="a", question="\ud800").with_inputs("question")], "half of a surrogate"),
        ([{1: "?"}], "a field is called 1"),
    ],
    ids=["none", "texts", "splits", "half a character", "half, with an id", "a number for a name"],
)
def test_what_cannot_be_examples_is_said(given: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        prepare_examples(given, program())


class Table(BaseModel):
    """A value of a type of one's own."""

    rows: list[str]


def test_values_stay_what_they_are() -> None:
    table = Table(rows=["a"])
    (one,) = prepare_examples([{"question": "?", "table": table}], program("question, table -> a"))
    assert one.table is table


def test_a_program_that_is_bound_takes_the_same_inputs() -> None:
    bound = together(weak_that_varies(["a"]), strong_that_reads())
    assert ids(ROWS, bound) == ids(ROWS)
