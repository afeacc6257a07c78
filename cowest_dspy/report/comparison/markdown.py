"""The comparison in Markdown: the verdict, then one table each; every text is escaped."""

from __future__ import annotations

import re

from cowest_dspy.report.comparison.model import Comparison
from cowest_dspy.report.comparison.numbers import Numbers
from cowest_dspy.report.comparison.tables import TextTable, text_tables
from cowest_dspy.report.comparison.verdict import verdict


def to_markdown(comparison: Comparison, numbers: Numbers) -> str:
    """A section with title, verdict, warnings and tables, for a page of results."""
    parts = [f"## {escape_markdown(comparison.title)}"]
    parts += [escape_markdown(sentence) for sentence in verdict(comparison, numbers).sentences]
    parts += [f"Warning: {escape_markdown(warning)}" for warning in comparison.warnings]
    for table in text_tables(comparison, numbers):
        parts.append(f"### {escape_markdown(table.title)}")
        parts.append(_table(table))
        parts += [escape_markdown(table.caption)] if table.caption else []
    return "\n\n".join(parts) + "\n"


def escape_markdown(text: str) -> str:
    r"""One line that Markdown shows as it stands.

    >>> escape_markdown("a|b *c* <d>")
    'a\\|b \\*c\\* &lt;d&gt;'
    """
    one_line = re.sub(r"\s+", " ", text).strip()
    escaped = re.sub(
        r"([\\`*_\[\]|~#])",
        r"\\\1",
        one_line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"),
    )
    return re.sub(
        r"^([-+]|\d+[.)])(?=\s)", lambda found: f"{found[1][:-1]}\\{found[1][-1]}", escaped
    )


def _table(table: TextTable) -> str:
    lines = [_line(table.heads), "|---|" + "---:|" * (len(table.heads) - 1)]
    for index, row in enumerate(table.rows):
        cells = [escape_markdown(cell) for cell in row]
        lines.append(
            "| "
            + " | ".join(
                [f"**{cells[0]}**" if index in table.marked and cells[0] else cells[0], *cells[1:]]
            )
            + " |"
        )
    return "\n".join(lines)


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(map(escape_markdown, cells)) + " |"
