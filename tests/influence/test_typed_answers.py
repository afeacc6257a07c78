"""What is kept of an answer is read again as what it was: models, enums, times, lists and
dictionaries of them."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import dspy
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import questions

from cowest_dspy import Collaboration, LineAdapter
from cowest_dspy.influence.arms import Answer, alone_arm, ask_all, restore_outputs
from cowest_dspy.influence.collection import collect
from cowest_dspy.influence.trace import Sampling, Traces
from cowest_dspy.store.store import Store
from cowest_dspy.testing import ScriptedEngine
from cowest_dspy.utils.jsonable import as_text, from_text, plain, restore


class Kind(Enum):
    SAFE = "safe"
    RISKY = "risky"


class Verdict(pydantic.BaseModel):
    label: Kind
    score: float = pydantic.Field(alias="points", default=0.0)
    when: datetime | None = None
    notes: tuple[str, ...] = ()

    @pydantic.computed_field
    @property
    def certain(self) -> bool:
        return self.score > 0.5


class Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="forbid", frozen=True)
    day: date
    verdicts: list[Verdict] = []


VERDICT = Verdict(
    label=Kind.RISKY, points=0.75, when=datetime(2026, 1, 2, 3, 4, tzinfo=UTC), notes=("a", "b")
)
VALUES: list[tuple[Any, Any]] = [
    (str, "a text"),
    (str, "12"),
    (str, '{"a": 1}'),
    (int, 12),
    (bool, True),
    (float, 0.1),
    (float, float("inf")),
    (Decimal, Decimal("0.10")),
    (Kind, Kind.SAFE),
    (Literal["yes", "no"], "no"),
    (Literal[1, 2], 2),
    (date, date(2026, 1, 2)),
    (datetime, datetime(2026, 1, 2, 3, 4)),
    (Verdict, VERDICT),
    (Strict, Strict(day=date(2026, 1, 2), verdicts=[VERDICT])),
    (list[Verdict], [VERDICT, VERDICT]),
    (list[str], ["a", "12", "\u00e9"]),
    (dict[str, Verdict], {"a": VERDICT}),
    (dict[int, list[Kind]], {1: [Kind.SAFE]}),
    (set[int], {1, 2}),
    (tuple[int, str], (1, "a")),
    (int | None, None),
    (list[int] | None, [1]),
]


@pytest.mark.parametrize(("kind", "value"), VALUES, ids=[str(value)[:30] for _, value in VALUES])
def test_a_value_comes_back_from_json_and_from_text(kind: Any, value: Any) -> None:
    for found in (
        restore(json.loads(json.dumps(plain(value))), kind),
        from_text(as_text(value), kind),
    ):
        assert found == value and type(found) is type(value)


def test_what_is_of_another_type_stays_as_it_is() -> None:
    assert (
        restore("5", int) == "5"
        and restore({"x": 1}, Verdict) == {"x": 1}
        and restore("a", object()) == "a"
    )
    assert from_text("neither", Verdict) == "neither" and from_text("12 bar", int) == "12 bar"


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda one: st.lists(one) | st.dictionaries(st.text(), one),
        max_leaves=8,
    )
)
def test_what_json_has_stays_what_it_is(value: Any) -> None:
    assert plain(value) == value


def test_texts_numbers_and_truth_are_kept_as_they_always_were() -> None:
    assert [as_text(value) for value in ("a", 12, 1.5, True, None)] == [
        "a",
        "12",
        "1.5",
        "True",
        "None",
    ]


def judging() -> Collaboration:
    """A program whose answer is a model, and beside it a list of enums."""
    fields: Any = {
        "question": (str, dspy.InputField()),
        "kinds": (list[Kind], dspy.OutputField()),
        "verdict": (Verdict, dspy.OutputField()),
    }
    task = dspy.make_signature(fields, "Judge.")

    def answer(request: dict[str, Any]) -> str:
        return (
            'Kinds: ["safe", "risky"]\nVerdict: '
            f"{VERDICT.model_dump_json(round_trip=True, by_alias=True)}"
        )

    weak, strong = (
        ScriptedEngine(lambda request: "A note."),
        ScriptedEngine(answer, model="scripted/strong"),
    )
    return Collaboration(task, adapter=LineAdapter()).bind(weak=weak.lm(), strong=strong.lm())


def right(example: dspy.Example, prediction: Any, trace: Any = None) -> float:
    return float(prediction.verdict == VERDICT and prediction.kinds == [Kind.SAFE, Kind.RISKY])


def test_traces_that_are_read_from_a_store_equal_those_in_memory(tmp_path: Path) -> None:
    program, examples = judging(), questions(2)
    held = collect(program, examples, right, Sampling(drafts=2))
    with Store(tmp_path) as store:
        stored = collect(program, examples, right, Sampling(drafts=2), store=store)
    assert isinstance(held, Traces) and isinstance(stored, Traces)
    assert stored[0].refined_score == 1.0 and stored[0].error is None
    assert stored == held and list(stored) == list(held)
    assert stored[0].refined == {
        "kinds": [Kind.SAFE, Kind.RISKY],
        "verdict": VERDICT,
        "draft": "A note.",
    }
    assert stored[0].alone == {"kinds": [Kind.SAFE, Kind.RISKY], "verdict": VERDICT}
    with Store(tmp_path) as again:
        assert Traces.load(again, types=program.output_types) == held
        shown = Traces.load(again)[0].refined or {}
        assert shown["verdict"] == plain(VERDICT), "without the program, its types are not known"
        assert shown["kinds"] == ["safe", "risky"]


def test_inputs_and_gold_answers_of_any_type_can_be_kept(tmp_path: Path) -> None:
    one = dspy.Example(id="q", question=VERDICT, verdict=VERDICT, day=date(2026, 1, 2)).with_inputs(
        "question"
    )
    with Store(tmp_path) as store:
        (trace,) = collect(judging(), [one], right, Sampling(drafts=1), store=store)
    assert trace.inputs == {"question": plain(VERDICT)} and trace.gold == {
        "verdict": plain(VERDICT),
        "day": "2026-01-02",
    }


def test_answers_of_an_arm_are_again_what_was_answered() -> None:
    program = judging()
    (kept,) = ask_all(alone_arm(program), questions(1), right)
    kept = Answer(**json.loads(json.dumps(kept.__dict__)))
    outputs = restore_outputs(kept, program.answer_fields[-1], program.output_types)
    assert kept.score == 1.0 and outputs == {"kinds": [Kind.SAFE, Kind.RISKY], "verdict": VERDICT}
    assert right(questions(1)[0], dspy.Prediction(**(outputs or {}))) == kept.score, (
        "scored again, it is as right as it was"
    )
    failed = Answer("q", {}, "", None, None, error="timeout: too slow")
    assert restore_outputs(failed, "verdict", program.output_types) is None
