"""Inputs that [report] hide names are in no page and in no terminal; the store and report.json keep
them."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_runs import arm, full_run, pair, run
from rich.console import Console
from toy import engine
from typer.testing import CliRunner

from cowest_dspy import load_config
from cowest_dspy.cli.main import app
from cowest_dspy.errors import ConfigError
from cowest_dspy.influence.arms import Answer
from cowest_dspy.report import (
    Arm,
    PairsSummary,
    RunReport,
    print_change,
    print_report,
    read_report,
    render_html,
    write_report,
)
from cowest_dspy.report.facts import redact
from cowest_dspy.utils.jsonl import write_jsonl

TASK = Path(__file__).parents[2] / "programs" / "prosocial.toml"
SAID = "I keep the old ladder in the shed."


def told(text: str = SAID, *, hide: tuple[str, ...] = ("context",)) -> RunReport:
    """A run in which the input ``context`` stands, and is repeated, wherever a report has texts of
    an example."""
    inputs, quoted = {"context": text, "place": "the yard"}, f'"{text}", they said.'
    answer = Answer(
        "a0", inputs, "casual", quoted, 1.0, None, f"draft: {quoted}", {"working": quoted}
    )
    failed = Answer("a0", inputs, "casual", None, None, f"parse: {quoted}", quoted)
    row = full_run().traces[0]
    trace = dataclasses.replace(
        row,
        example_id="t0",
        inputs=inputs,
        completion=quoted,
        draft=quoted,
        refined={"answer": quoted},
        alone={"answer": quoted},
        prompt=({"role": "user", "content": f"Context: {text}"},),
        feedback=f"It says {quoted}",
    )
    return run(
        Arm("both", "Both", (answer,)),
        Arm("sft", "Before", (failed,)),
        traces=(trace,),
        pairs=PairsSummary(1, 1, {}, (pair("t0", f"Context: {text}", quoted, "worse"),)),
        config={"report": {"hide": list(hide)}},
    )


def test_a_page_shows_the_length_of_what_is_hidden_and_everything_else(tmp_path: Path) -> None:
    written = write_report(told(), tmp_path)
    page = written.html.read_text(encoding="utf-8")
    assert "ladder" not in page
    assert (
        f"(hidden: {len(SAID)} characters)" in page and "they said." in page and "the yard" in page
    )
    assert read_report(written.json) == told(), "what the page is drawn from keeps it"


def test_what_is_not_hidden_is_shown() -> None:
    assert "old ladder" in render_html(told(hide=()))
    assert redact(told(hide=())) == told(hide=()) and redact(run()) == run()
    other = render_html(told(hide=("place",)))
    assert "old ladder" in other and "the yard" not in other


def test_a_terminal_shows_no_inputs_at_all() -> None:
    console = Console(file=io.StringIO(), width=200)
    print_report(told(), console)
    assert "ladder" not in console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_a_single_word_is_hidden_as_an_input_but_not_in_answers() -> None:
    shown = redact(told("Hello"))
    assert shown.arms[0].answers[0].inputs["context"] == "(hidden: 5 characters)"
    assert shown.arms[0].answers[0].answer == '"Hello", they said.'


@settings(max_examples=25)
@given(st.lists(st.text(alphabet="qxzwv&<>'\\", min_size=3, max_size=9), min_size=2, max_size=6))
def test_law_no_hidden_text_is_left_in_the_report_that_is_shown(words: list[str]) -> None:
    text = " ".join(words)
    shown = redact(told(text))
    assert text not in json.dumps(shown.to_json(), ensure_ascii=False).replace("\\\\", "\\")
    assert (
        shown.arms[0].answers[0].draft == f'draft: "(hidden: {len(text)} characters)", they said.'
    )


def configured(folder: Path, hide: str = 'hide = ["context"]') -> list[Path]:
    """The task of prosocial.toml on rows of our own, with models that repeat what they are asked
    about."""
    labels = ("casual", "needs_caution")
    for split, count in {"train": 8, "dev": 4, "test": 4}.items():
        rows = [
            {
                "id": f"{split}{n}",
                "context": f"I put the ladder {split} {n} into the shed.",
                "safety_label": f"__{labels[n % 2]}__",
            }
            for n in range(count)
        ]
        write_jsonl(folder / "rows" / f"{split}.jsonl", rows)
    (folder / "toy.py").write_text("""
from cowest_dspy.testing import ScriptedEngine

def weak():
    return ScriptedEngine(lambda request: request["messages"][-1]["content"].partition(": ")[2] + " Is it?")

def strong():
    return ScriptedEngine(lambda request: "casual" if " 2 " in request["messages"][-1]["content"] else "casual or not casual")
""")
    data = (
        f'[data]\nsource = "{TASK.parent}/prosocial.py:examples"\nrows = "rows"\ninputs = '
        '["context"]\n'
    )
    (folder / "toy.toml").write_text((f"{data}[sft]\n[collect]\ndrafts = 2\nmax_errors = " f"1\n[evaluate]\n[report]\n{hide}\n")
                                     + engine("weak") + engine("strong"))  # fmt: skip
    return [TASK, folder / "toy.toml"]


def test_a_whole_run_prints_and_shows_no_hidden_text(tmp_path: Path) -> None:
    files = [str(file) for file in configured(tmp_path)]
    for verb in (
        ["collect"],
        ["evaluate", "--arm", "strong", "--arm", "collaboration_sft"],
        ["report"],
    ):
        done = CliRunner().invoke(app, [*verb, *files, "--run", str(tmp_path / "run")])
        assert done.exit_code == 0, done.output
        assert "ladder" not in done.output
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "ladder" not in page and "(hidden: " in page
    assert "ladder" in (tmp_path / "run" / "report.json").read_text(encoding="utf-8")


def test_only_inputs_can_be_hidden(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'no input "contxt".*"context"'):
        load_config(configured(tmp_path, 'hide = ["contxt"]'))


def test_the_terminal_shows_one_answer_that_tuning_fixed() -> None:
    def shown(report: RunReport) -> str:
        console = Console(width=100, file=io.StringIO())
        print_change(report, console)
        return cast("io.StringIO", console.file).getvalue()

    arms = arm("sft", "+-!", draft="9 litres."), arm("both", "+++", draft="It holds 17 litres.")
    text = shown(run(*arms))
    assert "How much is 1?" in text and text.index("9 litres.") < text.index("It holds 17")
    assert "score 0" in text and "score 1" in text
    hidden = shown(run(*arms, config={"report": {"hide": ["question"]}}))
    assert "How much is 1?" not in hidden and "It holds 17 litres." in hidden
    same = arm("sft", "+-!", draft="9 litres."), arm("both", "+++", draft="9 litres.")
    assert shown(run(*same)) == ""
