"""LineAdapter: an answer in any form is parsed, or is a failure that is recorded; it never ends a run."""

from __future__ import annotations

import dspy
import pytest
from dspy.utils.exceptions import AdapterParseError

from cowest_dspy import LineAdapter
from cowest_dspy.influence import attempt
from cowest_dspy.program import Collaboration
from cowest_dspy.testing import ScriptedEngine


class Worked(dspy.Signature):
    """Answer with the working."""

    question: str = dspy.InputField()
    working: str = dspy.OutputField()
    answer: str = dspy.OutputField()


@pytest.mark.parametrize("completion", ["", "9", "no label\nin two lines", "Working: 4 + 5", "answer 9", "Answer:"])
def test_an_answer_that_lacks_a_label_is_a_parse_error_with_what_was_said(completion: str) -> None:
    with pytest.raises(AdapterParseError) as caught:
        LineAdapter().parse(Worked, completion)
    assert caught.value.lm_response == completion


def test_an_answer_without_any_label_is_recorded_and_no_end_of_a_run() -> None:
    rambling = ScriptedEngine(lambda request: "It depends.").lm()
    program = Collaboration("question -> working, answer", adapter=LineAdapter()).bind(weak=rambling, strong=rambling)
    made = attempt(lambda: program.answered_alone(question="May it run?"))
    assert made.outputs is None and (made.error or "").startswith("parse: ")


def test_text_before_the_first_label_belongs_to_the_first_field() -> None:
    assert LineAdapter().parse(Worked, "4 + 5 = 9\nAnswer: 9") == {"working": "4 + 5 = 9", "answer": "9"}
