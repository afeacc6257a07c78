"""Law 11: alone is refine less the draft, declared once and frozen: no optimiser changes it."""

from __future__ import annotations

import warnings
from typing import Any

import dspy
import pytest
from scripted import instructions, strong_that_reads, together, weak_that_varies

from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.testing import ScriptedEngine


def test_law_11_alone_has_the_same_prompt_less_the_draft() -> None:
    demos = [dspy.Example(question="One?", background="A note.", answer="1")]
    strong = strong_that_reads()
    program = Collaboration("question -> answer", demos=demos).bind(
        weak=ScriptedEngine({"": "draft"}).lm(), strong=strong.lm()
    )
    program(question="Two?")
    program.ask_alone(question="Two?")
    refine, alone = strong.asked
    assert refine["config"] == alone["config"]
    without = [
        {
            **message,
            "content": "\n".join(
                line
                for line in message["content"].splitlines()
                if not line.startswith("Background")
            ),
        }
        for message in refine["messages"]
    ]
    assert without == alone["messages"]
    assert "draft" not in str(alone).lower()


def test_law_11_an_optimiser_that_changes_refine_leaves_alone_as_it_was() -> None:
    program = together(weak_that_varies(["x"]), strong_that_reads())
    names = [name for name, _ in program.named_predictors()]
    assert names == ["draft", "refine"]
    for _, predictor in program.named_predictors():
        signature: Any = predictor.signature
        predictor.signature = signature.with_instructions("Answer badly.")
    assert "badly" not in str(
        [predictor.signature for _, predictor in program.alone.module.named_predictors()]
    )


def test_law_11_of_instructions_that_dspy_writes_alone_has_those_without_the_draft() -> None:
    strong = ScriptedEngine({"": "Reasoning: It is.\nAnswer: yes"}, model="scripted/strong")
    program = Collaboration(
        draft=dspy.Predict("question -> hints"),
        refine=dspy.ChainOfThought("question, hints -> answer"),
    ).bind(weak=ScriptedEngine({"": "It may be."}).lm(), strong=strong.lm())
    assert program(question="Is it?").answer == program.ask_alone(question="Is it?").answer == "yes"
    refine, alone = strong.asked
    assert instructions(program.alone.module) == instructions(
        dspy.ChainOfThought("question -> answer")
    )
    assert "hints" in str(refine) and "hints" not in str(alone).lower()


def test_law_11_instructions_of_ones_own_that_name_the_draft_are_a_warning() -> None:
    class Refine(dspy.Signature):
        """Answer the question. Use the hints where they help."""

        question: str = dspy.InputField()
        hints: str = dspy.InputField()
        answer: str = dspy.OutputField()

    parts: dict[str, Any] = {
        "draft": dspy.Predict("question -> hints"),
        "refine": dspy.Predict(Refine),
    }
    with pytest.warns(UserWarning, match='"Use the hints where they help."') as found:
        told = Collaboration(**parts)
    assert "alone_instructions=" in str(found[0].message)
    assert found[0].filename == __file__, "the warning is where the program is declared"
    assert instructions(told.alone.module) == instructions(told.refine)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        program = Collaboration(**parts, alone_instructions="Answer the question.")
        assert instructions(program.with_fresh_baseline().alone.module) == ["Answer the question."]
    assert instructions(program.alone.module) == ["Answer the question."]
    assert instructions(program.refine) == [Refine.instructions]
    alone: Any = program.alone.module
    assert "hints" not in alone.signature.fields


def test_law_11_prompts_that_were_found_are_those_of_a_fresh_baseline() -> None:
    program = Collaboration(
        draft=dspy.Predict("question -> hints"),
        refine=dspy.Predict("question, hints -> answer"),
        alone_instructions="Answer.",
    )
    predictor: Any = program.refine
    predictor.signature = predictor.signature.with_instructions("Weigh the hints. Be short.")
    with pytest.warns(UserWarning, match="Weigh the hints"):
        fresh = program.with_fresh_baseline()
    assert instructions(fresh.alone.module) == ["Weigh the hints. Be short."]
    assert instructions(program.alone.module) == ["Answer."]
