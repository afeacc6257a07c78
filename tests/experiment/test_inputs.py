"""Inputs that a program needs and its examples lack: said before a model is asked or trained, by
every way in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dspy
import pytest
import toy
from scripted import match, questions, strong_that_reads, weak_that_varies

from cowest_dspy import Collaboration, CoWest, Cycle, Influence, collect, load_config
from cowest_dspy.errors import CowestError, DataError
from cowest_dspy.experiment import Experiment
from cowest_dspy.experiment.doctor import examine
from cowest_dspy.program.examples import needed_by, needed_inputs, possible_inputs

RECIPE = (
    toy.RECIPE
    + """
import dspy

asked = []

def rows(split, seed=0):
    return [{"question": f"{split} {i}?", "results": f"table {i}", "answer": "yes"} for i in range(3)]

def program():
    return Collaboration("question, results -> answer", draft="knowledge")

def direct():
    return dspy.Predict("question, results -> answer")

def model():
    def answer(request):
        asked.append(request)
        return "yes"
    return ScriptedEngine(answer)

weak = strong = model
"""
)


def task(folder: Path, inputs: str, *tables: str, recipe: str = RECIPE) -> list[str]:
    (folder / "toy.py").write_text(recipe)
    text = toy.TASK.replace('inputs = ["question"]', f"inputs = {inputs}")
    (folder / "toy.toml").write_text(
        "\n".join([text, toy.engine("weak"), toy.engine("strong"), *tables])
    )
    return [str(folder / "toy.toml")]


def asked(folder: Path) -> list[Any]:
    from cowest_dspy.utils.importing import load

    return load(f"{folder}/toy.py:asked")


SAYS = (
    'The program (draft, refine, alone) needs the input "results"; [data] names inputs = '
    '["question"]. The rows of train have the '
    'fields question, results, answer. Write inputs = ["question", "results"] in [data].'
)


@pytest.mark.parametrize("stage", ["collect", "cycle", "evaluate", "tune", "pairs"])
def test_a_missing_input_ends_every_stage_before_a_model_is_asked(
    tmp_path: Path, stage: str
) -> None:
    config = load_config(task(tmp_path, '["question"]'))
    with Experiment(config, tmp_path / "run") as experiment, pytest.raises(DataError) as caught:
        getattr(experiment, stage)()
    assert str(caught.value) == SAYS and asked(tmp_path) == []


def test_the_doctor_says_the_same_and_asks_nothing(tmp_path: Path) -> None:
    found = examine(load_config(task(tmp_path, '["question"]')))
    assert [check.text for check in found.checks if check.level == "error"] == [SAYS]
    assert asked(tmp_path) == []
    (tmp_path / "whole").mkdir()
    assert examine(load_config(task(tmp_path / "whole", '["question", "results"]'))).healthy


def test_a_run_with_all_inputs_is_collected(tmp_path: Path) -> None:
    with Experiment(
        load_config(task(tmp_path, '["question", "results"]')), tmp_path / "run"
    ) as experiment:
        assert len(experiment.collect()) == 12


def test_a_field_that_no_row_has_names_the_nearest(tmp_path: Path) -> None:
    recipe = RECIPE.replace(
        '"question, results -> answer", draft', '"question, result -> answer", draft'
    )
    found = examine(load_config(task(tmp_path, '["question"]', recipe=recipe)), ask=False)
    (error,) = [check.text for check in found.checks if check.level == "error"]
    assert (
        'needs the input "result"' in error
        and 'Did you mean "results"? Give every row the field "result"' in error
    )


def test_the_weak_baseline_is_looked_at_too(tmp_path: Path) -> None:
    recipe = RECIPE.replace('Collaboration("question, results', 'Collaboration("question')
    config = load_config(
        task(tmp_path, '["question"]', '[evaluate]\nweak = "toy.py:direct"', recipe=recipe)
    )
    with (
        Experiment(config, tmp_path / "run") as experiment,
        pytest.raises(DataError, match=r"\(\[evaluate\] weak\) needs"),
    ):
        _ = experiment.splits


def test_examples_of_python_are_told_the_same() -> None:
    weak, strong = weak_that_varies(["a"]), strong_that_reads()
    program = Collaboration("question, results -> answer").bind(weak=weak.lm(), strong=strong.lm())
    examples = [
        dspy.Example(**one.toDict(), results="t").with_inputs("question") for one in questions(3)
    ]
    influence = Influence(match, program)
    ways = (
        lambda: collect(program, examples, match),
        lambda: influence.report(examples),
        lambda: influence(examples[0], dspy.Prediction(answer="1")),
        lambda: CoWest(match).compile(program, trainset=examples),
        lambda: Cycle(match, "w", {"w": CoWest(match)}).compile(
            program, trainset=examples, valset=examples
        ),
    )
    for way in ways:
        with pytest.raises(
            DataError,
            match=r'example q0 has the inputs \["question"\].*with_inputs\("question", "results"\)',
        ):
            way()
    assert weak.asked == strong.asked == []


# What a module needs


class TwoSteps(dspy.Module):
    """Notes first, then the draft: the notes come from the module itself."""

    def __init__(self) -> None:
        super().__init__()
        self.note = dspy.Predict("question, results -> notes")
        self.write = dspy.ChainOfThought("question, notes -> background")

    def forward(self, question: str, results: str, hint: str = "") -> dspy.Prediction:
        return self.write(
            question=question, notes=self.note(question=question, results=results).notes
        )


class Open(TwoSteps):
    def forward(self, **inputs: Any) -> dspy.Prediction:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.write(notes=self.note(**inputs).notes, **inputs)


class TwoFields(dspy.Signature):
    question: str = dspy.InputField()
    results: str = dspy.InputField()
    answer: str = dspy.OutputField()


class Optional(dspy.Signature):
    question: str = dspy.InputField()
    style: str = dspy.InputField(default="short")
    image: str | None = dspy.InputField()
    answer: str = dspy.OutputField()


@pytest.mark.parametrize(
    ("module", "needed", "possible"),
    [
        (dspy.Predict("question, results -> answer"), {"question", "results"}, set[str]()),
        (dspy.ChainOfThought("question, results -> answer"), {"question", "results"}, set[str]()),
        (dspy.ReAct(TwoFields, tools=[]), {"question", "results"}, set[str]()),
        (dspy.Predict(Optional), {"question"}, set[str]()),
        (TwoSteps(), {"question", "results"}, set[str]()),
        (Open(), set[str](), {"question", "results"}),
    ],
    ids=["Predict", "ChainOfThought", "ReAct", "optional", "two steps", "open"],
)
def test_what_a_module_makes_itself_is_not_asked_of_examples(
    module: dspy.Module, needed: set[str], possible: set[str]
) -> None:
    assert needed_inputs(module) == needed and possible_inputs(module) == possible


def test_the_draft_itself_is_no_input_of_examples() -> None:
    program = Collaboration("question -> answer", draft=TwoSteps())
    assert needed_by(program) == {"question": ("draft", "refine", "alone"), "results": ("draft",)}


def test_the_doctor_warns_of_an_input_that_a_module_of_ones_own_may_make(tmp_path: Path) -> None:
    recipe = RECIPE.replace(
        'Collaboration("question, results -> answer", draft="knowledge")',
        'Collaboration("question -> answer", draft=Open())',
    )
    recipe += """
class Open(dspy.Module):
    def __init__(self):
        super().__init__()
        self.write = dspy.Predict("question, passages -> background")

    def forward(self, **inputs):
        return self.write(passages="p", **inputs)
"""
    found = examine(load_config(task(tmp_path, '["question"]', recipe=recipe)))
    assert found.healthy
    (text,) = [check.text for check in found.checks if check.name == "inputs"]
    assert (
        'draft (Open) has a predictor with the input "passages", which [data] inputs does not name'
        in text
    )


def test_a_metric_that_cannot_be_called_is_an_error_of_the_run_and_of_the_doctor(
    tmp_path: Path,
) -> None:
    config = load_config(task(tmp_path, '["question", "results"]', recipe=RECIPE + "\nmatch = 3\n"))
    with pytest.raises(CowestError, match=r'toy\.py:match" is a int, and a function is expected'):
        Experiment(config, tmp_path / "run")
    assert any(
        "a function is expected" in check.text
        for check in examine(config, ask=False).checks
        if check.level == "error"
    )
