"""Rationales: asked once, kept by the store, dropped and counted where they fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.utils.exceptions import LMTimeoutError
from hypothesis import given
from hypothesis import strategies as st

from cowest_dspy import Budget, Store
from cowest_dspy.errors import BudgetError, DataError
from cowest_dspy.experiment.rationales import _states, rationales
from cowest_dspy.store.call_context import keeping
from cowest_dspy.testing import ScriptedEngine

TASK = "Say which animal it is."
EXAMPLES = [
    dspy.Example(
        question=f"Which animal is number {number}?", answer=answer, id=str(number)
    ).with_inputs("question")
    for number, answer in enumerate(("Otter", "Heron", "Badger", "Lynx", "Stoat"))
]


def test_each_example_gets_a_rationale_from_its_inputs_and_answer() -> None:
    engine = ScriptedEngine(
        lambda request: f"It lives by rivers, {request['messages'][-1]['content'][-2:]}."
    )
    made = rationales(EXAMPLES, engine.lm(), task=TASK)
    assert [example.rationale for example in made.examples] == [
        f"It lives by rivers, {example.answer[-2:]}." for example in EXAMPLES
    ]
    assert [example.id for example in made.examples] == list("01234") and made.failures == {}
    assert made.examples[0].inputs().toDict() == {"question": "Which animal is number 0?"}
    asked = next(asked for asked in engine.asked if "number 1" in asked["messages"][-1]["content"])
    assert asked["messages"][-1]["content"] == "Question: Which animal is number 1?\nAnswer: Heron"
    assert (
        asked["messages"][0]["content"].startswith(TASK)
        and "Do not state the answer" in asked["messages"][0]["content"]
    )


def test_what_fails_is_dropped_and_counted() -> None:
    answers: dict[str, Any] = {
        "number 0": "It swims.",
        "number 1": "A HERON stands in water.",
        "number 2": LMTimeoutError("too slow"),
        "number 3": "It has tufted ears and...",
        "number 4": " ",
    }
    made = rationales(EXAMPLES, ScriptedEngine(answers).lm(), task=TASK)
    assert [(example.id, example.rationale) for example in made.examples] == [("0", "It swims.")]
    assert made.failures == {"states the answer": 1, "timeout": 1, "cut off": 1, "parse": 1}


def test_reasoning_may_state_the_answer() -> None:
    engine = ScriptedEngine(lambda request: "It swims, so it is the otter.")
    made = rationales(EXAMPLES[:1], engine.lm(), task=TASK, draft="chain_of_thought")
    assert made.examples[0].rationale == "It swims, so it is the otter."
    assert "reasoning that leads to it" in engine.asked[0]["messages"][0]["content"]


def test_secrets_are_what_the_caller_says() -> None:
    engine = ScriptedEngine(lambda request: "It is like an otter, but smaller.")
    with pytest.raises(DataError, match="Not one of 5 rationales was had: states the answer 5"):
        rationales(EXAMPLES, engine.lm(), task=TASK, secret=lambda example: ["otter", "heron"])


def test_the_second_time_costs_nothing(tmp_path: Path) -> None:
    engine = ScriptedEngine(lambda request: "It lives by rivers.")
    for run in range(2):
        told: list[tuple[int, int]] = []
        with Store(tmp_path) as store, keeping(store):
            made = rationales(
                EXAMPLES,
                engine.lm(),
                task=TASK,
                on_progress=lambda *now, told=told: told.append(now),
            )
        assert len(made.examples) == 5 and told == [(done, 5) for done in range(1, 6)], run
        assert len(engine.asked) == 5


def test_a_budget_ends_it_and_what_was_answered_is_kept(tmp_path: Path) -> None:
    engine = ScriptedEngine(lambda request: "It lives by rivers.")
    budget = Budget(strong_calls=3)  # pyright: ignore[reportCallIssue]
    with (
        Store(tmp_path, budget=budget, strong=engine.model) as store,
        keeping(store),
        pytest.raises(BudgetError),
    ):
        rationales(EXAMPLES, engine.lm(), task=TASK, num_threads=1)
    assert len(engine.asked) == 3
    with Store(tmp_path) as store, keeping(store):
        assert len(rationales(EXAMPLES, engine.lm(), task=TASK).examples) == 5
    assert len(engine.asked) == 5


@pytest.mark.parametrize(
    "examples",
    [
        [],
        [dspy.Example(question="Which?", answer="").with_inputs("question")],
        [dspy.Example(question="Which?").with_inputs("question")],
        [dspy.Example(question="Which?", answer="Otter").with_inputs("question", "answer")],
        [EXAMPLES[0], dspy.Example(text="Which?", answer="Otter").with_inputs("text")],
    ],
)
def test_examples_without_what_is_needed_are_an_error(examples: list[dspy.Example]) -> None:
    with pytest.raises(DataError):
        rationales(examples, ScriptedEngine({}).lm(), task=TASK)


@pytest.mark.parametrize(
    ("text", "secret", "inputs", "states"),
    [
        ("It is the Otter.", "otter", "", True),
        ("It needs_caution here", "needs caution", "", True),
        ("Otters swim.", "otter", "", False),
        ("The otter is smaller.", "otter", "The otter or the seal?", False),
        ("A genetic disease.", "A", "", False),
        ("It is 12.", "12", "", True),
        ("Anything.", "...", "", False),
    ],
)
def test_an_answer_is_stated_as_whole_words_that_the_inputs_do_not_hold(
    text: str, secret: str, inputs: str, states: bool
) -> None:
    assert _states(text, [secret], inputs) is states


@given(
    st.lists(st.sampled_from(["otter", "heron", "the", "needs caution"]), min_size=1, max_size=6)
)
def test_law_what_a_text_is_joined_from_is_stated_unless_it_was_asked(words: list[str]) -> None:
    text = ", ".join(words)
    assert all(_states(text, [word.upper()], "") for word in words)
    assert not any(_states(text, [word], text) for word in words)
