"""What a stage looks like while it runs."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich import progress
from rich.console import Console

from cowest_dspy import live


def drawn(monkeypatch: pytest.MonkeyPatch, seconds: float, terminal: bool = True) -> str:
    """What a stage of ten steps writes, four of them done, each of so many seconds on a clock of ours."""
    clock = [1000.0]
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=140, get_time=lambda: clock[0], highlight=False)
    monkeypatch.setattr(live, "console", console)

    class Clocked(progress.Progress):
        def __init__(self, *columns: Any, **options: Any) -> None:
            super().__init__(*columns, get_time=lambda: clock[0], auto_refresh=False, **options)

    monkeypatch.setattr(live, "Progress", Clocked)
    with live.Live().stage("Training the weak model") as step:
        for done in range(5):
            step(done, 10)
            clock[0] += seconds
    return output.getvalue()


@pytest.mark.parametrize(("seconds", "left"), [(2, "0:00:12"), (45, "0:04:30"), (300, "0:30:00")])
def test_a_bar_says_what_is_done_and_the_time_left_also_of_slow_steps(
    seconds: float, left: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = drawn(monkeypatch, seconds)
    assert "Training the weak model" in last and "4/10" in last and left in last


def test_without_a_terminal_a_stage_is_a_few_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = drawn(monkeypatch, 2, terminal=False).splitlines()
    assert lines == ["Training the weak model ...", "Training the weak model: 3 of 10"]
