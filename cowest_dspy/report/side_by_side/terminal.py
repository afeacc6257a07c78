"""Runs side by side in a terminal: what the tests found first, then tables with a column for each
run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from cowest_dspy.report.side_by_side.model import SideBySide
from cowest_dspy.report.side_by_side.words import facts, scores
from cowest_dspy.utils.safe_text import visible_text

STYLES = {1: "bold green", -1: "bold yellow", 0: "bold", None: ""}


def print_side_by_side(view: SideBySide, console: Console | None = None) -> None:
    """Prints what was found, each run's verdict and warnings, and the tables."""
    console = console or Console()
    for sentence, test in zip(view.sentences, view.tests, strict=True):
        console.print(visible_text(sentence, style=STYLES[test.finding]))
    for run in view.runs:
        console.print(visible_text(f"\n{run.name}: {' '.join(run.verdict)}"))
        for warning in run.warnings:
            console.print(visible_text(f"Warning, {run.name}: {warning}", style="yellow"))
    names = [run.name for run in view.runs]
    console.print(
        _table("Scores on the test examples, with 95 % intervals", "arm", names, scores(view))
    )
    console.print(_table("Runs", "", names, facts(view)))
    for title, rows in (
        ("Configuration, where it differs", view.settings),
        ("Versions that differ", view.versions),
    ):
        if rows:
            console.print(_table(title, "key", names, rows))
    if not view.settings:
        console.print("The configurations do not differ.")


def _table(title: str, head: str, names: Sequence[str], rows: Mapping[str, Sequence[str]]) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for name in (head, *names):
        table.add_column(visible_text(name), overflow="fold")
    for key, cells in rows.items():
        table.add_row(visible_text(key), *(visible_text(cell) for cell in cells))
    return table
