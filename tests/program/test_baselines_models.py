"""Baselines of one model: what they all have in common, reasoning, demos, self-refinement."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import dspy
import pytest
from baseline_parts import TASK, collaboration, prompts, refiner, users
from dspy.utils.exceptions import AdapterParseError
from scripted import match, questions

from cowest_dspy import Collaboration
from cowest_dspy.errors import DataError, ProgramError
from cowest_dspy.influence.arms import ask_all, module_arm
from cowest_dspy.program import (
    Baseline,
    Confident,
    SelfConsistency,
    SelfRefine,
    chain_of_thought,
    few_shot,
)
from cowest_dspy.testing import ScriptedEngine

# What all have in common


def every(program: Collaboration) -> dict[str, dspy.Module]:
    shown = [dspy.Example(question="Shown?", answer="a", background="A draft.", id="s")]
    return {
        "task": Baseline(program),
        "thought": chain_of_thought(program),
        "shots": few_shot(program, shown, k=1),
        "refined": SelfRefine(program, rounds=2),
        "votes": SelfConsistency(program, samples=3),
        "votes on thoughts": SelfConsistency(chain_of_thought(program), samples=2),
        "refined thoughts with demos": few_shot(SelfRefine(chain_of_thought(program)), shown),
    }


CALLS = {
    "task": 1, "thought": 1, "shots": 1, "refined": 5, "votes": 3, "votes on thoughts": 2, ("refined " "thoughts " "with " "demos"): 3,
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    "adapter", [None, dspy.ChatAdapter(), dspy.JSONAdapter()], ids=["lines", "chat", "json"]
)
def test_a_baseline_of_the_strong_model_never_sees_a_draft(
    name: str, adapter: dspy.Adapter | None
) -> None:
    """The fairness law: same instructions, demos, LM and adapter as the strong model of the
    program, and no trace of a draft."""

    def answer(request: dict[str, Any]) -> str:
        if isinstance(adapter, dspy.JSONAdapter):
            return '{"reasoning": "r", "answer": "a", "feedback": "f"}'
        if adapter is not None:
            return "".join(
                f"[[ ## {field} ## ]]\n{field[0]}\n\n"
                for field in ("reasoning", "answer", "feedback")
            )
        return "Reasoning: r\nAnswer: a"

    strong, weak = ScriptedEngine(answer), ScriptedEngine({})
    demos = [dspy.Example(question="Worked?", background="A draft of it.", answer="worked")]
    program = collaboration(strong, weak, demos=demos, adapter=adapter)
    before = str(program.dump_state())
    module = every(program)[name]
    prediction = module(question="What?", background="A draft that somebody gave.")
    assert prediction.answer[-1] == "a" and not weak.asked
    assert len(strong.asked) == CALLS[name]
    assert "background" not in prompts(strong).lower() and "draft" not in prompts(strong).lower()
    assert all(TASK in request["messages"][0]["content"] for request in strong.asked)
    assert ("Worked?" in prompts(strong)) == (name in ("task", "refined", "votes")), (
        "shown where its fields are all there"
    )
    assert ("Shown?" in prompts(strong)) == (name in ("shots", "refined thoughts with demos"))
    assert ("[[ ##" in prompts(strong)) == (adapter is not None), (
        "in the prompt format of the program"
    )
    assert str(program.dump_state()) == before, "the program that it was made of stays as it was"


@pytest.mark.parametrize("name", CALLS)
def test_a_baseline_is_a_module_like_any_other(name: str, tmp_path: Path) -> None:
    engine = ScriptedEngine(lambda request: "Reasoning: r\nAnswer: a")
    module = every(collaboration(engine))[name]
    first, last = module.predictors()[0], module.predictors()[-1]
    first.demos = [dspy.Example(question="Kept?", answer="k", feedback="f")]
    last.signature = last.signature.with_instructions("Found by an optimiser.")  # pyright: ignore
    module.save(tmp_path / "module.json")
    assert "scripted" not in (tmp_path / "module.json").read_text()
    other = every(collaboration(engine))[name]
    other.load(tmp_path / "module.json")
    found: Any = other.predictors()
    assert found[0].demos and found[-1].signature.instructions == "Found by an optimiser."
    other.set_lm(engine.lm())
    copied = other.deepcopy()
    copied(question="What?")
    assert "Kept?" in prompts(engine) and "Found by an optimiser." in prompts(engine)


@pytest.mark.parametrize("name", CALLS)
def test_threads_do_not_mix_questions(name: str) -> None:
    def answer(request: dict[str, Any]) -> str:
        number = request["messages"][-1]["content"].split("Question number ")[1].split("?")[0]
        return (
            f"Reasoning: r\nAnswer: {number}"
            if "Reasoning" in request["messages"][0]["content"]
            else number
        )

    engine = ScriptedEngine(answer)
    program = collaboration(engine)
    module = every(program)[name]
    answers = ask_all(module_arm(program, module), questions(40), match, num_threads=16)
    assert [one.answer for one in answers] == [str(number) for number in range(40)]
    assert [one.score for one in answers] == [1.0] * 40
    assert len(engine.asked) == 40 * CALLS[name]


def test_a_baseline_of_a_module_or_a_signature() -> None:
    engine = ScriptedEngine({"What?": "a"})
    task = refiner("question -> answer")
    task.set_lm(engine.lm())
    module = Baseline(task)
    assert module(question="What?").answer == "a" and users(engine) == ["Question: What?"]
    assert module.module is not task
    with dspy.context(lm=engine.lm(), adapter=dspy.ChatAdapter()), pytest.raises(AdapterParseError):
        Baseline("question -> answer")(question="What?")
    with pytest.raises(ProgramError, match="asks no model"):
        Baseline(dspy.Module())
    with pytest.raises(ProgramError, match="asks no model"):
        Confident(dspy.Module())


def test_the_page_on_baselines_runs() -> None:
    text = (Path(__file__).parents[2] / "docs/baselines.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)), names)
    strong = ScriptedEngine(lambda request: "Reasoning: 180 is more.\nAnswer: Orvane")
    with dspy.context(lm=strong.lm()):
        assert names["voted"](question="What?").agreement == 1.0
        assert (
            names["read"]
            .ask_refine(names["read"].ask_draft(question="Tamber").draft, question="Tamber")
            .draft.endswith("90 degrees.")
        )
    assert (
        "Reasoning: 180 degrees is more than 90.\nAnswer: Orvane"
        in strong.asked[0]["messages"][2]["content"]
    )


# Chain of thought


def test_chain_of_thought_asks_as_dspy_does() -> None:
    ours = chain_of_thought("question -> answer")
    theirs = dspy.ChainOfThought("question -> answer")
    with dspy.context(adapter=dspy.ChatAdapter()):
        ours = chain_of_thought("question -> answer")
    assert ours.module.signature.equals(theirs.predict.signature)  # pyright: ignore
    own: Any = chain_of_thought("question -> reasoning, answer").module
    assert list(own.signature.output_fields) == ["reasoning", "answer"]
    strong = ScriptedEngine({"What?": "So it is.\nAnswer: a"})
    bare = dspy.Example(question="Bare?", background="b", answer="w")
    reasoned = dspy.Example(
        question="Reasoned?", background="b", reasoning="For so it is.", answer="w"
    )
    answer = chain_of_thought(collaboration(strong, demos=[bare, reasoned]))(question="What?")
    assert answer.toDict() == {"reasoning": "So it is.", "answer": "a"}
    said = f'{TASK}\nThink step by step first. Write lines: "Reasoning: ...", "Answer: ...".'
    shown = ["Question: Reasoned?", "Reasoning: For so it is.\nAnswer: w", "Question: What?"]
    # A demo without a reasoning says "Not supplied", and that is what a model then writes.
    assert [message["content"] for message in strong.asked[0]["messages"]] == [said, *shown]


# Demos


def test_few_shot_draws_by_seed_and_shows_the_fields_of_the_task_only() -> None:
    examples = [
        dspy.Example(id=f"e{n}", question=f"Q{n}?", answer=f"A{n}", background="secret", hard=1)
        for n in range(20)
    ]

    def drawn(k: int, seed: int) -> list[str]:
        demos = few_shot("question -> answer", examples, k=k, seed=seed).predictors()[0].demos
        assert all(set(demo.keys()) == {"question", "answer"} for demo in demos)
        return [demo.question for demo in demos]

    assert drawn(4, 0) == drawn(4, 0) != drawn(4, 1) and len(set(drawn(4, 0))) == 4
    assert sorted(drawn(99, 0)) == sorted(example.question for example in examples)
    assert drawn(0, 0) == []
    strong = ScriptedEngine({"What?": "a"})
    few_shot(collaboration(strong), examples[:1], k=1)(question="What?")
    assert [message["content"] for message in strong.asked[0]["messages"][1:]] == [
        "Question: Q0?",
        "A0",
        "Question: What?",
    ]
    with pytest.raises(ProgramError, match="k is -1"):
        few_shot("question -> answer", examples, k=-1)
    with pytest.raises(DataError, match=r"Example e0 has none of the outputs \['label'\]"):
        few_shot("question -> label", examples[:1])


# Self-refinement


def test_self_refine_gives_feedback_and_answers_again() -> None:
    def answer(request: dict[str, Any]) -> str:
        system, user = request["messages"][0]["content"], request["messages"][-1]["content"]
        if "Say what is wrong" in system:
            return "Too short." if "Attempt: five" in user else "Good."
        return "five" if system == TASK else "five bar" if user.count("Feedback") == 1 else "5 bar"

    strong = ScriptedEngine(answer)
    once, twice = SelfRefine(collaboration(strong)), SelfRefine(collaboration(strong), rounds=2)
    prediction = once(question="How much?")
    assert prediction.toDict() == {
        "attempts": "1. five\nFeedback: Too short.",
        "answer": "five bar",
    }
    assert list(prediction.keys())[-1] == "answer", "the answer is the last field, as everywhere"
    assert users(strong) == [
        "Question: How much?",
        "Question: How much?\nAttempt: five",
        "Question: How much?\nAttempts: 1. five\n  Feedback: Too short.",
    ]
    strong.asked.clear()
    assert twice(question="How much?").answer == "5 bar"
    assert users(strong)[-1] == (
        "Question: How much?\nAttempts: 1. five\n  Feedback: Too short.\n  2. five bar\n  "
        "Feedback: Too short."
    )
    assert len(strong.asked) == 5
    assert {request["config"]["temperature"] for request in strong.asked} == {0.0}


def test_worked_examples_of_a_refinement_have_its_form() -> None:
    """A small model answers as it was shown: 115 of 120 refinements could not be read while the
    examples showed no attempt."""
    strong = ScriptedEngine(lambda request: "text")
    program = collaboration(
        strong, demos=[dspy.Example(question="Worked?", background="A draft.", answer="worked")]
    )
    SelfRefine(program)(question="How much?")
    assert [message["content"] for message in strong.asked[-1]["messages"][1:3]] == [
        "Question: Worked?\nAttempts: 1. worked\n  Feedback: Nothing is wrong with it.",
        "worked",
    ]


def test_self_refine_of_several_steps_has_the_inputs_of_the_task() -> None:
    class Steps(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plan = dspy.Predict("question, unit -> plan")
            self.solve = dspy.Predict("question, plan -> answer")

        def forward(self, question: str, unit: str) -> dspy.Prediction:
            return self.solve(question=question, plan=self.plan(question=question, unit=unit).plan)

    module = SelfRefine(Steps())
    assert list(module.criticise.signature.input_fields) == ["question", "unit", "attempt"]  # pyright: ignore
    assert list(module.again.signature.fields) == ["question", "unit", "attempts", "answer"]  # pyright: ignore
    engine = ScriptedEngine(lambda request: "text")
    module.set_lm(engine.lm())
    assert module(question="Q", unit="bar").answer == "text" and len(engine.asked) == 4
    for fields in ("question, attempt -> answer", "question -> feedback"):
        with pytest.raises(ProgramError, match="which it needs for itself"):
            SelfRefine(fields)
    with pytest.raises(ProgramError, match="rounds is 0"):
        SelfRefine("question -> answer", rounds=0)
