"""What a benchmark measured, written between two marks of a page, so that text around it can be by
hand."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

README = Path(__file__).resolve().parent / "README.md"


def put(page: Path, begin: str, end: str, text: str) -> None:
    """Puts ``text`` between the marks of ``page``; a page without them raises ValueError, with
    nothing written."""
    written = page.read_text(encoding="utf-8")
    before, found, rest = written.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{page} has not both of {begin} and {end}")
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def publish(part: str, made: Sequence[Table | str]) -> None:
    """Puts the tables and sentences of one benchmark into benchmarks/README.md, if it was run
    without options."""
    if len(sys.argv) > 1:
        return
    text = "\n\n".join(one if isinstance(one, str) else markdown(one) for one in made)
    put(README, f"<!-- {part}: written by `make bench` -->", f"<!-- end of {part} -->", text)


def markdown(table: Table) -> str:
    """A table of the terminal as one of Markdown, with its title as the sentence before it."""
    heads = [str(column.header) for column in table.columns]
    sides = ["---:" if column.justify == "right" else "---" for column in table.columns]
    rows = [
        heads,
        sides,
        *(
            list(map(str, row))
            for row in zip(*(column.cells for column in table.columns), strict=True)
        ),
    ]
    title = f"{str(table.title)[:1].upper()}{str(table.title)[1:]}:\n\n" if table.title else ""
    return title + "\n".join("| " + " | ".join(row) + " |" for row in rows)
