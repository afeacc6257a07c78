"""The comparison in a terminal: the verdict first, then Rich tables; plain text without colour
where it is piped."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.table import Table

from cowest_dspy.report.comparison.model import Comparison
from cowest_dspy.report.comparison.numbers import Numbers, numbers_of
from cowest_dspy.report.comparison.tables import TextTable, text_tables
from cowest_dspy.report.comparison.verdict import verdict
from cowest_dspy.utils.safe_text import visible_text

_NAME_WIDTH = 16  # titles wrap at words, where Rich would squeeze them to a letter
_GAP = 3  # between columns, as Rich draws them; and at the edges together one less


def print_comparison(
    comparison: Comparison, console: Console | None = None, *, numbers: Numbers | None = None
) -> None:
    """Prints verdict, warnings and tables. A table that is wider than the console goes on in
    another one below it.

    ``numbers`` are those of ``numbers_of(comparison)``, where they are at hand already.
    """
    console = console or Console()
    numbers = numbers or numbers_of(comparison)
    found = verdict(comparison, numbers)
    style = {True: "bold green", False: "bold yellow", None: "bold"}[found.good]
    for sentence in found.sentences:
        console.print(visible_text(sentence, style=style))
    for warning in comparison.warnings:
        console.print(visible_text(f"Warning: {warning}", style="yellow"))
    for table in text_tables(comparison, numbers):
        for part in _fitting(table, console.width):
            console.print(_drawn(part))


def _fitting(table: TextTable, width: int) -> Iterator[TextTable]:
    """The table in parts that fit: each has the first column, and as many of the others as there is
    room for."""
    widths = [
        max(len(cell) for cell in column) for column in zip(table.heads, *table.rows, strict=True)
    ]
    start = 1
    while start < len(widths):
        end, room = start, width - _NAME_WIDTH - _GAP + 1
        while end < len(widths) and (end == start or room >= widths[end] + _GAP):
            room -= widths[end] + _GAP
            end += 1
        columns = [0, *range(start, end)]
        yield dataclasses.replace(
            table,
            title=table.title if start == 1 else f"{table.title}, continued",
            heads=tuple(table.heads[i] for i in columns),
            rows=tuple(tuple(row[i] for i in columns) for row in table.rows),
            caption=table.caption if end == len(widths) else "",
        )
        start = end


def _drawn(table: TextTable) -> Table:
    drawn = Table(
        title=visible_text(table.title),
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    drawn.add_column(visible_text(table.heads[0]), min_width=_NAME_WIDTH)
    for head in table.heads[1:]:
        drawn.add_column(visible_text(head), justify="right", no_wrap=True)
    for index, row in enumerate(table.rows):
        drawn.add_row(
            *(visible_text(cell) for cell in row), style="bold" if index in table.marked else ""
        )
    if table.caption:
        drawn.caption, drawn.caption_justify = visible_text(table.caption), "left"
    return drawn
