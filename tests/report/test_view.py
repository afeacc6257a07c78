"""Views: a table fits any terminal whole, notes and folded tables are for pages, code is marked."""

from __future__ import annotations

import io
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from cowest_dspy.report.page import render_page
from cowest_dspy.report.view import (
    Section,
    Table,
    Verdict,
    View,
    print_view,
    view_html,
    view_markdown,
)

CELLS = st.text(alphabet="abc0123456789.+-%", min_size=1, max_size=14)


def view_of(*tables: Table, **changes: Any) -> View:
    section = Section("one", "One", tables, **changes)
    return View("A view", "today", Verdict(("It is so.",), True), (section,), "facts.json")


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 9).flatmap(
        lambda n: st.lists(st.lists(CELLS, min_size=n, max_size=n), min_size=2, max_size=5)
    ),
    st.integers(40, 140),
)
def test_law_a_table_of_numbers_fits_any_width_and_loses_no_cell(
    rows: list[list[str]], width: int
) -> None:
    table = Table("T", tuple(rows[0]), tuple(map(tuple, rows[1:])))
    stream = io.StringIO()
    print_view(view_of(table), Console(file=stream, width=width))
    text = stream.getvalue()
    assert all(len(line.rstrip()) <= width for line in text.splitlines())
    assert all(cell in text for row in rows for cell in row)


def test_notes_and_folded_tables_are_on_the_page_only() -> None:
    shown = Table("Shown", ("a", "b"), (("x", "1"),), notes=("a remark",))
    folded = Table("Folded", ("k", "v"), (("key", "value"),), texts=True, folded=True)
    view = view_of(shown, folded)
    stream = io.StringIO()
    print_view(view, Console(file=stream, width=80))
    page = render_page(view)
    for text in (stream.getvalue(), view_markdown(view), view_html(view)):
        assert "Shown" in text and "remark" not in text and "value" not in text
    assert "a remark" in page and "<summary><strong>Folded</strong></summary>" in page


def test_what_is_missing_is_told_on_the_page_with_its_command_as_code() -> None:
    page = render_page(view_of(missing="Nothing <yet>: `cowest collect` does it."))
    assert "Nothing &lt;yet&gt;: <code>cowest collect</code> does it." in page
