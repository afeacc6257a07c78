"""LineAdapter: an answer in any form is parsed, or is a failure that is recorded; it never ends a
run."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Literal

import dspy
import pytest
from dspy.utils.exceptions import AdapterParseError
from hypothesis import given
from hypothesis import strategies as st

from cowest_dspy import LineAdapter
from cowest_dspy.influence.metric import Influence, attempt
from cowest_dspy.program.adapters import choice_in
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.testing import ScriptedEngine


class Worked(dspy.Signature):
    """Answer with the working."""

    question: str = dspy.InputField()
    working: str = dspy.OutputField()
    answer: str = dspy.OutputField()


@pytest.mark.parametrize(
    "completion", ["", "9", "no label\nin two lines", "Working: 4 + 5", "answer 9", "Answer:"]
)
def test_an_answer_that_lacks_a_label_is_a_parse_error_with_what_was_said(completion: str) -> None:
    with pytest.raises(AdapterParseError) as caught:
        LineAdapter().parse(Worked, completion)
    assert caught.value.lm_response == completion


def test_an_answer_without_any_label_is_recorded_and_no_end_of_a_run() -> None:
    rambling = ScriptedEngine(lambda request: "It depends.").lm()
    program = Collaboration("question -> working, answer", adapter=LineAdapter()).bind(
        weak=rambling, strong=rambling
    )
    made = attempt(lambda: program.ask_alone(question="May it run?"))
    assert made.outputs is None and (made.error or "").startswith("parse: ")


def test_text_before_the_first_label_belongs_to_the_first_field() -> None:
    assert LineAdapter().parse(Worked, "4 + 5 = 9\nAnswer: 9") == {
        "working": "4 + 5 = 9",
        "answer": "9",
    }


LETTERS = ("A", "B", "C", "D")
LABELS = (
    "casual",
    "possibly needs caution",
    "probably needs caution",
    "needs caution",
    "needs intervention",
)


def choosing(choices: tuple[str, ...]) -> type[dspy.Signature]:
    """A signature whose only output, ``safety_label``, is one of ``choices``."""
    fields = {
        "text": (str, dspy.InputField()),
        "safety_label": (Literal[choices], dspy.OutputField()),
    }
    return dspy.make_signature(fields, "Choose.")  # pyright: ignore[reportArgumentType]


def chosen(choices: tuple[str, ...], completion: str) -> str:
    return LineAdapter().parse(choosing(choices), completion)["safety_label"]


@pytest.mark.parametrize(
    ("completion", "choice"),
    [
        ("B", "B"),
        ("b", "B"),
        ("b)", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ('"B"', "B"),
        ("**B**", "B"),
        ("**B.** Some option", "B"),
        ("B. Some option", "B"),
        ("B.Some option", "B"),
        ("b) some option", "B"),
        ("B: Some option", "B"),
        ("B - some option", "B"),
        ("A. A genetic disease", "A"),
        ("C. Vitamin D", "C"),
        ("D. Both A and B", "D"),
        ("B, because the others do not fit", "B"),
        ("Answer: B", "B"),
        ("**Answer:** B", "B"),
        ("Answer = B", "B"),
        ("Answer: (b) Some option", "B"),
        ("The answer is B.", "B"),
        ("The correct answer is option C", "C"),
        ("Safety label: B", "B"),
        ("Option D", "D"),
        ("- B", "B"),
        ("B\n\nSome words that explain it.", "B"),
        ("B\nB. Some option", "B"),
        ("Literal[B]", "B"),
    ],
)
def test_a_letter_is_read_from_what_small_models_say(completion: str, choice: str) -> None:
    assert chosen(LETTERS, completion) == choice


@pytest.mark.parametrize(
    "completion",
    [
        "A or B",
        "A and B",
        "A, B",
        "A, or B",
        "A) or B)",
        "(A) and (B)",
        "A/B",
        "A: B",
        "A) one thing or B) another",
        "A) one thing and B) another",
        "A: one thing B: another",
        '"A" or "B"',
        "A. One thing\nB. Another\nC. A third",
        "A. One thing is wrong.\nAnswer: B",
        "A genetic disease",
        "a genetic disease",
        "The answer is a genetic disease",
        "A's disease",
        "B-cell lymphoma",
        "C-reactive protein",
        "B.cereus",
        "E",
        "not B",
        "It is not what the answer: B says",
        "It depends.",
        "...",
        "Some option",
    ],
)
def test_what_names_no_letter_or_two_is_a_parse_error(completion: str) -> None:
    with pytest.raises(AdapterParseError) as caught:
        chosen(LETTERS, completion)
    assert caught.value.lm_response == completion


@pytest.mark.parametrize(
    ("completion", "choice"),
    [
        ("needs caution.", "needs caution"),
        ("Needs Caution", "needs caution"),
        ("__needs_caution__", "needs caution"),
        ("needs-caution", "needs caution"),
        ("'Casual'!", "casual"),
        ("possibly needs caution", "possibly needs caution"),
        ("Label: __probably_needs_caution__", "probably needs caution"),
        ("The safety label is needs intervention.", "needs intervention"),
        ("casual conversation about a walk", "casual"),
        ("needs caution: it may hurt somebody", "needs caution"),
    ],
)
def test_words_are_read_from_what_small_models_say(completion: str, choice: str) -> None:
    assert chosen(LABELS, completion) == choice


@pytest.mark.parametrize(
    "completion",
    [
        "casual or needs caution",
        "needs caution, possibly needs caution",
        "casual-ish",
        "caution",
        "not casual",
        "It is casual",
        "casually",
    ],
)
def test_what_names_no_words_or_two_is_a_parse_error(completion: str) -> None:
    with pytest.raises(AdapterParseError):
        chosen(LABELS, completion)


@pytest.mark.parametrize(
    ("choices", "completion", "choice"),
    [
        (("1", "2", "3"), "2.", "2"),
        (("1", "2", "3"), "2) the second", "2"),
        (("1", "-1"), "-1.", "-1"),
        (("A", "a"), "a", "a"),
        (("a b", "a_b"), "a_b", "a_b"),
        (("+", "-"), "-", "-"),
        (("C", "C++"), "c++.", "C++"),
        (("yes", "no"), "Yes.", "yes"),
        (("yes", "no", "not known"), "Not known", "not known"),
    ],
)
def test_signs_and_choices_that_look_alike_are_kept_apart(
    choices: tuple[str, ...], completion: str, choice: str
) -> None:
    assert chosen(choices, completion) == choice


@pytest.mark.parametrize(
    ("choices", "completion"),
    [(("1", "2"), "-1"), (("1", "2"), "2.5"), (("1", "5"), ".5"), (("10", "20"), "10.5 mg"), (("10", "20"), "10%"),
     (("A", "a"), "A."),
     (("a b", "a_b"), "a-b"), (("no", "yes"), "no-one"), (("+", "-"), "+."), (("yes", "no"), ("yes and " "no"))],
)  # fmt: skip
def test_numbers_that_go_on_and_choices_that_look_alike_are_not_guessed(
    choices: tuple[str, ...], completion: str
) -> None:
    with pytest.raises(AdapterParseError):
        chosen(choices, completion)


class Reasoned(dspy.Signature):
    """Choose, with a reason."""

    text: str = dspy.InputField()
    reason: str = dspy.OutputField()
    answer: Literal["A", "B"] = dspy.OutputField()


def test_a_choice_is_repaired_beside_other_fields_too() -> None:
    made = LineAdapter().parse(Reasoned, "Reason: B is larger.\nAnswer: (b) the larger")
    assert made == {"reason": "B is larger.", "answer": "B"}


TEXTS = st.text(min_size=1, max_size=12).filter(lambda text: text.strip() == text)
CHOICES = st.lists(TEXTS, min_size=1, max_size=5, unique=True)


@given(choices=CHOICES, data=st.data())
def test_law_each_choice_is_read_as_itself(choices: list[str], data: st.DataObject) -> None:
    choice = data.draw(st.sampled_from(choices))
    assert choice_in(choice, choices) == choice


@given(
    choices=st.one_of(CHOICES, st.just(list(LETTERS)), st.just(list(LABELS))),
    before=st.text(alphabet="Answer: *_\"'(-1.", max_size=9),
    after=st.text(alphabet="ABCor,.)-:'5 \n", max_size=9),
    data=st.data(),
)
def test_law_a_repair_is_a_choice_or_an_error(
    choices: list[str], before: str, after: str, data: st.DataObject
) -> None:
    said = before + data.draw(st.sampled_from(choices)) + after
    with suppress(ValueError):
        assert choice_in(said, choices) in choices


@given(
    choice=st.sampled_from(LABELS),
    mark=st.sampled_from([".", "!", "'", "**", "__", " "]),
    upper=st.booleans(),
)
def test_law_marks_case_and_joints_do_not_change_the_choice(
    choice: str, mark: str, upper: bool
) -> None:
    said = f"{mark}{choice.upper() if upper else choice}{mark}"
    assert {
        choice_in(said.replace(" ", joint), LABELS)
        for joint in " _-"
        if joint != "-" or mark != " "
    } == {choice}


# One output, with its label


def answered_by(kind: Any, completion: str) -> Any:
    fields: Any = {"question": (str, dspy.InputField()), "final_answer": (kind, dspy.OutputField())}
    return LineAdapter().parse(dspy.make_signature(fields, "Answer."), completion)["final_answer"]


LABELLED = (
    "Final answer: {}",
    "final answer: {}",
    "FINAL ANSWER : {}",
    "final_answer: {}",
    "Final answer:\n{}",
    "\n Final answer:\n\n{}\n",
    "**Final answer:** {}",
    "**Final answer**: {}",
    "**Final answer: {}**",
    "__Final answer:__ {}",
    "*Final answer:* {}",
    "### Final answer: {}",
    "- **Final Answer:** {}",
    "Final answer\uff1a{}",
    "{}",
)


@pytest.mark.parametrize("form", LABELLED)
@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (str, "yes", "yes"),
        (str, "12 bar: at most\nNote: never more", "12 bar: at most\nNote: never more"),
        (int, "12", 12),
        (int, "-7", -7),
        (float, "0.5", 0.5),
        (bool, "True", True),
        (bool, "no", False),
        (Literal["A", "B"], "B", "B"),
        (Literal[1, 2], "2", 2),
        (list[str], '["a", "b"]', ["a", "b"]),
        (dict[str, int], '{"a": 1}', {"a": 1}),
    ],
)
def test_the_label_of_a_single_output_is_no_part_of_its_value(
    kind: Any, text: str, value: Any, form: str
) -> None:
    found = answered_by(kind, form.format(text))
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("completion", ["**12**", "12.", "Final answer: **12**", "`12`"])
def test_a_number_is_read_with_the_signs_that_small_models_put_around_it(completion: str) -> None:
    assert answered_by(int, completion) == 12


@pytest.mark.parametrize(
    "answer",
    [
        "Note: it may run at 25 bar.",
        "Final answers: two",
        "Finally, answer: yes",
        "The final answer: yes",
        "Question: what else?",
        "**Bold** words",
        "# Heading\nFinal answer: yes",
        "Finalanswer: yes",
        "https://a.b/c",
    ],
)
def test_an_answer_that_begins_with_other_words_and_a_colon_stays_as_it_is(answer: str) -> None:
    assert answered_by(str, answer) == answer


@pytest.mark.parametrize("completion", ["Final answer:", "**Final answer:**", "Final answer: **"])
def test_a_label_with_nothing_behind_it_is_no_answer(completion: str) -> None:
    if completion.endswith(": **"):
        assert answered_by(str, completion) == "**"
        return
    with pytest.raises(AdapterParseError):
        answered_by(str, completion)


@given(st.text(), st.sampled_from(LABELLED[:-1]))
def test_any_text_is_read_from_behind_its_label(text: str, form: str) -> None:
    bare = text.strip()
    if (
        not bare
        or bare.startswith(("*", "_", "`"))
        or bare.endswith(("*", "_"))
        or answered_by(str, bare) != bare
    ):
        return
    assert answered_by(str, form.format(bare)) == bare


def test_labels_in_bold_are_found_where_there_are_several_outputs() -> None:
    assert LineAdapter().parse(Worked, "**Working:** 4 + 5\n= 9\n\n**Answer:** 9") == {
        "working": "4 + 5\n= 9",
        "answer": "9",
    }
    assert LineAdapter().parse(Worked, "## Working: 4 + 5\n**Answer: 9**") == {
        "working": "4 + 5",
        "answer": "9",
    }


def test_influence_is_not_lost_by_a_label() -> None:
    weak = ScriptedEngine(lambda request: "A hint.").lm()
    strong = ScriptedEngine(
        lambda request: (
            "Answer: yes" if "Background" in request["messages"][-1]["content"] else "no"
        )
    ).lm()
    program = Collaboration("question -> answer").bind(weak=weak, strong=strong)
    one = dspy.Example(question="May it run?", answer="yes").with_inputs("question")
    prediction = program(question="May it run?")
    assert (
        Influence(
            lambda example, prediction, trace=None: float(prediction.answer == example.answer),
            program,
        )(one, prediction)
        == 1.0
    )


def test_several_outputs_without_an_example_are_asked_for_as_lines() -> None:
    signature: Any = dspy.ensure_signature("question -> reasoning, count: int")
    asked = LineAdapter().format(signature, [], {"question": "How many?"})
    assert asked[0]["content"].endswith(
        "Answer in these lines:\nReasoning: {reasoning}\n"
        "Count: {count}        # note: the value you produce must be a single int value"
    )
    demo = dspy.Example(question="How many?", reasoning="Two and one.", count=3)
    shown = LineAdapter().format(signature, [demo], {"question": "How many?"})
    alone: Any = dspy.ensure_signature("question -> count: int")
    one = LineAdapter().format(alone, [], {"question": "Q?"})
    assert "these lines" not in shown[0]["content"] + one[0]["content"]
