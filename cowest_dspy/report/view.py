"""A run, a comparison, several runs or a router to read: sections of text tables. A
terminal and a notebook show them by Rich, a page of results as Markdown, page.py as one HTML page.

    print_view(run_view(report))
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table as RichTable

from cowest_dspy.report.charts import Chart
from cowest_dspy.utils import notebook
from cowest_dspy.utils.safe_text import visible_text

_NAME_WIDTH = 16  # names wrap at words, where Rich would squeeze them to a letter
_GAP = 3  # between columns, as Rich draws them; and at the edges together one less
_MOST_ROWS = 20  # in a notebook


@dataclass(frozen=True)
class Verdict:
    """The first of the ``sentences`` is the verdict, the others are further claims, one each.
    ``good`` is True when every claim holds, False when one does not, None without claims."""

    sentences: tuple[str, ...]
    good: bool | None


@dataclass(frozen=True)
class Table:
    """Rows of text. The first column names the row, the others hold numbers, or text where
    ``texts``.

    ``marked``: the rows that stand out. ``notes``: a remark on each row, on a page. ``folded``: on
    a page only, where the reader unfolds it.
    """

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    marked: frozenset[int] = frozenset()
    caption: str = ""
    texts: bool = False
    notes: tuple[str, ...] = ()
    folded: bool = False


@dataclass(frozen=True)
class Section:
    """A part of a view. ``name`` is its id on a page, ``lead`` what a page says above its
    ``charts``, which are drawn only there; ``missing`` what a page says where there is nothing to
    show yet: text in backquotes is code. ``extra`` is for the page's template."""

    name: str
    title: str
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    lead: str = ""
    charts: Callable[[], Sequence[Chart]] = tuple
    missing: str = ""
    extra: Any = None


@dataclass(frozen=True)
class View:
    """A title, what it shows in words, and its sections. ``tiles``: a name, a number and a remark
    each, at the head of a page. ``source``: the file beside the page that has every number.
    ``created``: an ISO 8601 time, for people in the place that they look at."""

    title: str
    subtitle: str
    verdict: Verdict
    sections: tuple[Section, ...]
    source: str
    warnings: tuple[str, ...] = ()
    tiles: tuple[tuple[str, str, str], ...] = ()
    created: str = ""

    @property
    def tables(self) -> list[Table]:
        """All tables that are not folded."""
        return [table for section in self.sections for table in section.tables if not table.folded]


def print_view(view: View, console: Console | None = None) -> None:
    """Prints verdict, warnings, tables and notes; plain text without colour where it is piped. A
    table that is wider than the console goes on in another one below it."""
    console = console or Console()
    for part in rich_parts(view, console.width):
        console.print(part)


def view_html(view: View) -> str:
    """The view as a fragment of HTML, small enough for a notebook's cell."""
    parts = rich_parts(view, notebook.WIDTH, _MOST_ROWS)
    about = " · ".join(filter(None, (format_date(view.created), view.subtitle)))
    return notebook.view(view.title, *parts, notebook.line(about, soft=True))


def format_date(created: str) -> str:
    """An ISO 8601 time for people, in UTC; a text that is none stays as it is.

    >>> format_date("2026-11-30T15:05:09+01:00")
    '30 November 2026, 14:05 UTC'
    """
    try:
        moment = datetime.fromisoformat(created)
    except ValueError:
        return created
    if moment.tzinfo is None:
        return created
    moment = moment.astimezone(UTC)
    return f"{moment.day} {moment:%B %Y, %H:%M} UTC"


def rich_parts(view: View, width: int, most: int | None = None) -> Iterator[RenderableType]:
    """The view for Rich; of each table at most ``most`` rows."""
    style = {True: "bold green", False: "bold yellow", None: "bold"}[view.verdict.good]
    for sentence in view.verdict.sentences:
        yield visible_text(sentence, style=style)
    for warning in view.warnings:
        yield visible_text(f"Warning: {warning}", style="yellow")
    for section in view.sections:
        for table in section.tables:
            if not table.folded:
                yield from _rich_tables(table, width, most)
        for note in section.notes:
            yield visible_text(note)


def _rich_tables(table: Table, width: int, most: int | None) -> Iterator[RenderableType]:
    parts = [table] if table.texts else _split(table, width)
    for part in parts:
        drawn = RichTable(
            title=visible_text(part.title),
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
        )
        drawn.add_column(visible_text(part.heads[0]), min_width=_least(part), overflow="fold")
        for head in part.heads[1:]:
            drawn.add_column(
                visible_text(head),
                justify="left" if table.texts else "right",
                no_wrap=not table.texts,
                overflow="fold",
            )
        for index, row in enumerate(part.rows[:most]):
            drawn.add_row(*map(visible_text, row), style="bold" if index in part.marked else "")
        yield drawn
    if table.caption:
        yield visible_text(table.caption, style="dim")
    if most is not None and len(table.rows) > most:
        yield notebook.format_rest(len(table.rows) - most)


def _least(table: Table) -> int:
    """The least width of the first column, in characters."""
    return min(
        _NAME_WIDTH, max(len(cell) for cell in (table.heads[0], *(r[0] for r in table.rows)))
    )


def _split(table: Table, width: int) -> Iterator[Table]:
    """The table in parts that fit: each has the first column, and as many of the others as there is
    room for."""
    widths = [max(map(len, column)) for column in zip(table.heads, *table.rows, strict=True)]
    start = 1
    while start < len(widths):
        end, room = start, width - _least(table) - _GAP + 1
        while end < len(widths) and (end == start or room >= widths[end] + _GAP):
            room -= widths[end] + _GAP
            end += 1
        columns = [0, *range(start, end)]
        yield dataclasses.replace(
            table,
            title=table.title if start == 1 else f"{table.title}, continued",
            heads=tuple(table.heads[i] for i in columns),
            rows=tuple(tuple(row[i] for i in columns) for row in table.rows),
        )
        start = end


def view_markdown(view: View) -> str:
    """Title, verdict, warnings and tables in Markdown; every text is escaped."""
    parts = [f"## {escape_markdown(view.title)}"]
    parts += [escape_markdown(sentence) for sentence in view.verdict.sentences]
    parts += [f"Warning: {escape_markdown(warning)}" for warning in view.warnings]
    for table in view.tables:
        parts += [f"### {escape_markdown(table.title)}", markdown_table(table)]
        parts += [escape_markdown(table.caption)] if table.caption else []
    return "\n\n".join(parts) + "\n"


def escape_markdown(text: str) -> str:
    r"""One line that Markdown shows as it stands.

    >>> escape_markdown("a|b *c* <d>")
    'a\\|b \\*c\\* &lt;d&gt;'
    """
    one_line = re.sub(r"\s+", " ", text).strip()
    plain = one_line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    escaped = re.sub(r"([\\`*_\[\]|~#])", r"\\\1", plain)
    return re.sub(
        r"^([-+]|\d+[.)])(?=\s)", lambda found: f"{found[1][:-1]}\\{found[1][-1]}", escaped
    )


def markdown_table(table: Table) -> str:
    """The rows in Markdown, without title and caption; every text is escaped."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    lines = [line([*map(escape_markdown, table.heads)]), "|---|" + "---:|" * (len(table.heads) - 1)]
    for index, row in enumerate(table.rows):
        first, *cells = map(escape_markdown, row)
        lines.append(line([f"**{first}**" if index in table.marked and first else first, *cells]))
    return "\n".join(lines)
