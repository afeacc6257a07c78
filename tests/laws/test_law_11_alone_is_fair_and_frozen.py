"""Law 11: alone is refine less the draft, declared once and frozen: no optimiser changes it."""

from __future__ import annotations

from typing import Any

import dspy
import pytest
from scripted import strong_that_reads, together, weak_that_varies

from cowest_dspy.errors import ProgramError
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


def test_law_11_instructions_that_speak_of_a_draft_are_refused() -> None:
    class Refine(dspy.Signature):
        """Use the draft, answer the question."""

        question: str = dspy.InputField()
        draft: str = dspy.InputField()
        answer: str = dspy.OutputField()

    with pytest.raises(ProgramError, match="told of something that it is not given"):
        Collaboration(draft=dspy.Predict("question -> draft"), refine=dspy.Predict(Refine))
