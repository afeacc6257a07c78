"""A comparison in a notebook: the verdict, then the tables that the page has. It shows no input and
no answer."""

from __future__ import annotations

from cowest_dspy.report.comparison.model import Comparison
from cowest_dspy.report.comparison.numbers import numbers_of
from cowest_dspy.report.comparison.tables import TextTable, text_tables
from cowest_dspy.report.comparison.verdict import verdict
from cowest_dspy.utils import notebook
from cowest_dspy.utils.notebook import Markup, html_of

MOST = 20


@html_of.register
def comparison_view(comparison: Comparison) -> str:
    """The comparison as a fragment of HTML, small enough for a cell."""
    numbers = numbers_of(comparison)
    tables = text_tables(comparison, numbers)
    return notebook.view(
        comparison.title,
        *verdict(comparison, numbers).sentences,
        *(f"Warning: {warning}" for warning in comparison.warnings),
        *(part for table in tables for part in _drawn(table)),
    )


def _drawn(table: TextTable) -> list[Markup]:
    rows = [
        [notebook.tag("strong", row[0]) if place in table.marked else row[0], *row[1:]]
        for place, row in enumerate(table.rows)
    ]
    drawn = [
        notebook.line(notebook.tag("strong", table.title)),
        notebook.table(table.heads, rows, most=MOST),
    ]
    return [*drawn, notebook.line(table.caption, soft=True)] if table.caption else drawn
