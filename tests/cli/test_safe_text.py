"""What models, servers and files say is shown on a terminal, neither obeyed nor read as markup; a
failure is a message."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import toy
from hypothesis import given
from hypothesis import strategies as st
from report_runs import full_run
from rich.console import Console
from rich.table import Table

from cowest_dspy.cli.console import SafeConsole
from cowest_dspy.cli.main import app, report_errors
from cowest_dspy.cli.verbs import VisibleFormatter
from cowest_dspy.report.facts import Stage
from cowest_dspy.report.run_view import print_report
from cowest_dspy.testing import Fault, OpenAIServer
from cowest_dspy.utils.safe_text import visible

HOSTILE = "use [red] wires [/b] :smile: \x1b[2J\x1b]0;title\x07 \x9b31m \u202e back \ud83d"
SHOWN = (
    "use [red] wires [/b] :smile: \\u001b[2J\\u001b]0;title\\u0007 \\u009b31m \\u202e back \\ud83d"
)


def test_control_characters_are_shown_and_lines_and_tabs_stay() -> None:
    assert visible(HOSTILE) == SHOWN
    assert visible("one\r\ntwo\tthree\r") == "one\ntwo\tthree\\u000d"
    assert visible("naïve 東京 שלום 👩‍🔬") == "naïve 東京 שלום 👩‍🔬"


@given(st.text())
def test_json_says_the_same_when_it_is_made_visible(text: str) -> None:
    document = json.dumps({"text": text}, ensure_ascii=False)
    assert json.loads(visible(document))["text"] == text


@pytest.mark.parametrize(
    "wrap", [str, lambda text: [text], lambda text: grid(text)], ids=["a text", "a list", "a table"]
)
def test_the_console_of_the_commands_prints_text_as_it_is(wrap: Callable[[str], Any]) -> None:
    from cowest_dspy.cli.console import console

    out = io.StringIO()
    for here in (
        SafeConsole(file=out, width=300, markup=False, emoji=False, highlight=False),
        console,
    ):
        with here.capture() as captured:
            here.print(wrap(HOSTILE), soft_wrap=True)
        assert not set("\x1b\x9b\u202e\x07") & set(captured.get())
        assert "[red]" in captured.get() and "[/b]" in captured.get()


def grid(text: str) -> Table:
    table = Table.grid()
    table.add_row(text)
    return table


def test_a_report_on_a_console_of_the_users_obeys_nothing() -> None:
    out = io.StringIO()
    report = dataclasses.replace(full_run(), warnings=(HOSTILE,), stages=(Stage(HOSTILE, 1.0),))
    print_report(report, Console(file=out, width=400, force_terminal=True, color_system=None))
    assert (
        SHOWN in out.getvalue() and "\x1b[2J" not in out.getvalue() and "\x9b" not in out.getvalue()
    )


RECIPE = (
    toy.RECIPE
    + """
def rows(split, seed=0):
    return [{"id": split, "question": f"{split}?", "answer": "yes"}]

def program():
    return Collaboration("question -> answer")

def weak():
    return ScriptedEngine({"": "a draft"}, model="scripted/weak")
"""
)


STRONG = """
[strong]
kind = "api"
model = "openai/scripted"
api_base = "{address}"
api_key_env = "COWEST_TEST_KEY"
num_retries = 0
"""


@pytest.fixture(autouse=True)
def _a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COWEST_TEST_KEY", "none")


@contextmanager
def task(folder: Path, answer: str | Fault) -> Iterator[list[str]]:
    """The arguments of `cowest ask` for a strong model that answers so."""
    with OpenAIServer(lambda request: answer) as server:
        (folder / "toy.py").write_text(RECIPE)
        strong = STRONG.format(address=server.api_base)
        (folder / "toy.toml").write_text(toy.TASK + toy.engine("weak") + strong)
        yield ["ask", str(folder / "toy.toml"), "--run", str(folder / "run"), "-q", "Which wires?"]


def test_ask_prints_an_answer_as_the_text_that_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = "use [red] wires, then [/b] stop \x1b[31m at once \u202e"
    with task(tmp_path, answer) as arguments, pytest.raises(SystemExit) as ended:
        report_errors(lambda: app(arguments))
    out = capsys.readouterr().out
    assert not ended.value.code
    assert "use [red] wires, then [/b] stop \\u001b[31m at once \\u202e" in out


def test_ask_turns_the_failure_of_a_model_into_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hidden = "s" + "k-" + "a1B2c3D4e5F6g7H8i9J0"
    fault = Fault.status(503, message=f"overloaded \x1b[2J with {hidden}")
    with task(tmp_path, fault) as arguments, pytest.raises(SystemExit) as ended:
        report_errors(lambda: app(arguments))
    said = capsys.readouterr().err
    assert ended.value.code == 1
    assert (
        said.startswith("ModelError: The model openai/scripted gave no answer: server: ")
        and "overloaded" in said
    )
    assert (
        "Traceback" not in said and "\x1b" not in said and hidden not in said and len(said) < 1000
    )


def test_a_traceback_and_a_log_line_hold_no_secret_and_no_escape_sequence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    hidden = "s" + "k-" + "a1B2c3D4e5F6g7H8i9J0"

    def broken() -> None:
        raise RuntimeError(f"a fault of ours with {hidden} and \x1b[2J")

    with pytest.raises(SystemExit) as ended:
        report_errors(broken)
    said = capsys.readouterr().err
    assert (
        ended.value.code == 1
        and "Traceback" in said
        and "RuntimeError: a fault of ours with ***" in said
    )
    record = logging.LogRecord(
        "x", logging.ERROR, "x.py", 1, "with %s and %s", (hidden, "\x1b[2J"), None
    )
    line = VisibleFormatter().format(record)
    for text in (said, line):
        assert hidden not in text and "\x1b" not in text and "\\u001b[2J" in text
