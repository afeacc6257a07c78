"""Programs of modules as DSPy's users write them: string signatures, docstrings, ids of models,
and what was asked."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path
from typing import Any

import dspy
import pytest
from scripted import instructions

from cowest_dspy import Collaboration
from cowest_dspy.errors import ProgramError
from cowest_dspy.testing import OpenAIServer, ScriptedEngine


def signature(fields: str, docstring: str) -> type[dspy.Signature]:
    return dspy.make_signature(fields, docstring)


def react() -> dspy.Module:
    agent: Any = dspy.ReAct  # DSPy types a string as no signature
    return agent("question, hints -> answer", tools=[])


def taking(docstring: str) -> dspy.Predict:
    return dspy.Predict(signature("message, draft_notes -> reply", docstring))


@pytest.mark.parametrize(
    ("refine", "draft"),
    [
        (dspy.Predict("question, hints -> answer"), "question -> hints"),
        (dspy.Predict("hints, question -> answer: bool"), "question -> hints"),
        (dspy.ChainOfThought("question, hints -> answer, source"), "question -> hints"),
        (react(), "question -> hints"),
    ],
)
def test_modules_of_string_signatures_go_together(refine: dspy.Module, draft: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        program = Collaboration(draft=dspy.Predict(draft), refine=refine)
    assert program.draft_field == "hints"
    for one in program.alone.module.predictors():
        of_alone: Any = one.signature
        assert "hints" not in of_alone.fields and "hints" not in of_alone.instructions
        assert "`question`" in of_alone.instructions


def test_words_of_a_task_that_are_no_draft_are_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for docstring in ("Draft a short reply to the customer.", "Notes are not to be trusted."):
            Collaboration(draft=dspy.Predict("message -> draft_notes"), refine=taking(docstring))


@pytest.mark.parametrize(
    "docstring",
    [
        "Be kind.\nUse `draft_notes` if they help",
        "Be kind. Use the draft notes if they help.",
        "Be kind! Mend the draft.",
    ],
)
def test_a_sentence_that_names_the_draft_is_in_the_warning(docstring: str) -> None:
    with pytest.warns(UserWarning, match="not given") as found:
        Collaboration(draft=dspy.Predict("message -> draft_notes"), refine=taking(docstring))
    assert len(found) == 1
    last = docstring.replace("\n", " ").split(" ", 2)[2]
    assert f'"{last}"' in str(found[0].message)


def test_the_drafts_field_of_a_signature_can_be_named() -> None:
    task = signature("question, background -> answer", "Given the patient's background, ...")
    with pytest.raises(ProgramError, match=r'a field "background" of its own.*draft_field='):
        Collaboration(task)
    program = Collaboration(task, draft_field="notes")
    assert program.draft_field == "notes"
    alone: Any = program.alone.module
    assert list(alone.signature.fields) == list(task.fields)
    with pytest.warns(UserWarning, match="Given the patient's background"):
        Collaboration(signature("question -> answer", "Given the patient's background, ..."))


def test_a_refine_that_takes_nothing_but_the_draft_leaves_alone_without_a_question() -> None:
    with pytest.raises(ProgramError, match=r"takes nothing but the draft.*question, summary -> "):
        Collaboration(
            draft=dspy.Predict("question -> summary"), refine=dspy.Predict("summary -> answer")
        )


def test_one_text_is_not_given_to_several_predictors() -> None:
    parts: dict[str, Any] = {
        "draft": dspy.Predict("question -> hints"),
        "refine": react(),
    }
    with pytest.raises(ProgramError, match=r"2 predictors .*react, extract.predict"):
        Collaboration(**parts, alone_instructions="Answer.")


# Models


def test_an_id_makes_a_model() -> None:
    program = Collaboration("question -> answer").bind(
        weak="openai/gpt-4.1-mini", strong="openai/gpt-4.1"
    )
    assert (program.weak.model, program.strong.model) == ("openai/gpt-4.1-mini", "openai/gpt-4.1")
    assert program.alone.module.predictors()[0].lm is program.strong
    wrong: Any = ScriptedEngine({})
    with pytest.raises(ProgramError, match=r"bind\(weak=...\) takes a dspy.LM.*ScriptedEngine"):
        program.bind(weak=wrong)


def printed(of: Any, n: int) -> str:
    out = io.StringIO()
    of.inspect_history(n, file=out)
    return out.getvalue()


def test_what_was_asked_is_in_the_histories_of_program_and_models() -> None:
    weak = ScriptedEngine({"": "It runs at 31 bar."}, model="scripted/weak").lm()
    strong = ScriptedEngine({"": "yes"}, model="scripted/strong").lm()
    program = Collaboration("question -> answer").bind(weak=weak, strong=strong)
    program(question="May it run at 25 bar?")
    asked = printed(program, 2)
    assert asked.index("It runs at 31 bar.") < asked.index("Background: It runs at 31 bar.")
    assert "It runs at 31 bar." in printed(weak, 1) and "yes" not in printed(weak, 1)
    assert "Background: It runs at 31 bar." in printed(strong, 1)
    assert (len(program.history), len(weak.history), len(strong.history)) == (2, 1, 1)
    program.deepcopy()(question="And at 40?")
    assert len(strong.history) == 2, "a copy asks the same model"
    with dspy.context(max_history_size=4):
        program(question="And at 45?")
    assert len(strong.history) == 3
    with dspy.context(max_history_size=2):
        program(question="And at 50?")
    assert len(strong.history) == 2 and "And at 50?" in printed(strong, 1)
    with dspy.context(disable_history=True):
        program(question="And at 60?")
    assert len(strong.history) == 2


def test_tokens_are_counted_once() -> None:
    with OpenAIServer({"": "yes it is"}, model=("weak", "strong")) as server:
        weak, strong = (
            dspy.LM(f"openai/{name}", api_base=server.api_base, api_key="any", cache=False)
            for name in server.models
        )
        program = Collaboration("question -> answer").bind(weak=weak, strong=strong)
        with dspy.track_usage() as usage:
            program(question="Is it?")
        total = usage.get_total_tokens()
    assert {name: one["completion_tokens"] for name, one in total.items()} == {
        "openai/weak": 3,
        "openai/strong": 3,
    }


class Helpdesk(dspy.Module):
    """A module of a user's own with a collaboration in it."""

    def __init__(self, program: Collaboration) -> None:
        super().__init__()
        self.collab = program

    def forward(self, question: str) -> dspy.Prediction:
        return self.collab(question=question)


def test_a_module_with_a_bound_collaboration_in_it_is_saved_without_its_models(
    tmp_path: Path,
) -> None:
    lm = dspy.LM("openai/scripted", api_key="sk-quite-secret-0123456789", api_base="http://x/v1")
    module = Helpdesk(Collaboration("question -> answer").bind(weak=lm, strong=lm))
    predictor: Any = module.collab.draft
    predictor.signature = predictor.signature.with_instructions("Say what you know.")
    module.save(tmp_path / "helpdesk.json")
    written = (tmp_path / "helpdesk.json").read_text()
    assert "secret" not in written and "http://x" not in written
    assert not any(one.get("lm") for one in json.loads(written).values())
    loaded = Helpdesk(Collaboration("question -> answer"))
    loaded.load(tmp_path / "helpdesk.json")
    assert instructions(loaded.collab.draft) == ["Say what you know."]
    assert loaded.collab.draft.predictors()[0].lm is None
