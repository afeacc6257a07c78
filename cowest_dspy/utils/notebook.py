"""Views of our objects in a notebook: Rich renderables, as in a terminal, exported as one
fragment of HTML.

    def _repr_html_(self) -> str:
        return notebook.view("3 pairs", notebook.table(("example", "influence"), rows))

A view asks for nothing: no script, no style sheet, no address. Every text is escaped. A view is
small: it shows the first few rows and says how many more there are, and a long text is cut.

A class whose view needs what only a later room has registers it with :func:`html_of`.
"""

from __future__ import annotations

import difflib
import functools
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from cowest_dspy.utils.safe_text import visible_text

MOST_ROWS = 5
MOST_TEXT = 300
MOST_DIFF = 1200  # characters
MOST_WORDS, LEAST_SHARED = 1500, 0.2
"""Limits of a comparison word by word: the number of words, and the share that both have."""
Parts = list[tuple[str, bool]]
WIDTH = 120  # characters
BAR = 40  # characters

WORD = re.compile(r"\s+|\w+|[^\w\s]")
"""A word, the space between two, or a sign."""

STYLES = {"helped": "green", "same": "bright_black", "hurt": "red", "failed": "yellow"}
_PRE = (
    '<pre style="white-space:pre;overflow-x:auto;line-height:1.35;'
    'font-family:ui-monospace,Menlo,Consolas,monospace">{code}</pre>'
)


@functools.singledispatch
def html_of(thing: Any) -> str:
    """The view of an object whose class was registered.

    Raises:
        TypeError: it was not.
    """
    raise TypeError(f"There is no view of a {type(thing).__name__}.")


def view(title: str, *parts: RenderableType | None) -> str:
    """A whole view as HTML: its title in bold, then its parts; what is empty is left out."""
    shown = [line(part) if isinstance(part, str) else part for part in parts if part]
    # In a notebook it would also show what it prints.
    console = Console(
        file=io.StringIO(),
        force_jupyter=False,
        record=True,
        width=WIDTH,
        color_system="truecolor",
    )
    console.print(Group(visible_text(title, style="bold"), *shown))
    return console.export_html(inline_styles=True, code_format=_PRE)


def line(text: Any, *, soft: bool = False) -> Text:
    """One line of text."""
    return visible_text(str(text), style="dim" if soft else "")


def format_text(text: Any, most: int = MOST_TEXT) -> Text:
    """A text with its line breaks; cut where it is long."""
    return visible_text(clip(str(text), most))


def clip(text: str, most: int = MOST_TEXT, where: str = "") -> str:
    """The text, cut where it is longer, with the number of characters that are missing.

    >>> clip("abcdef", 4)
    'abcd ... [2 more characters]'
    """
    left = len(text) - most
    return text if left <= 0 else f"{text[:most]} ... [{left:,} more characters{where}]"


def table(
    heads: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    texts: int = 1,
    total: int | None = None,
    most: int = MOST_ROWS,
) -> RenderableType:
    """The first ``most`` rows; the first ``texts`` columns are aligned as text, the others as
    numbers. ``total``: how many rows there are, where ``rows`` has not all of them."""
    given = list(rows)
    shown, count = given[:most], total if total is not None else len(given)
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, head in enumerate(heads):
        text = place < texts
        made.add_column(visible_text(head), justify="left" if text else "right", overflow="fold")
    for row in shown:
        made.add_row(*(cell if isinstance(cell, Text) else line(cell) for cell in row))
    return made if count <= len(shown) else Group(made, format_rest(count - len(shown)))


def format_plural(count: int, what: str) -> str:
    """A number of things.

    >>> format_plural(1, "pair"), format_plural(2000, "pair")
    ('1 pair', '2,000 pairs')
    """
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def format_rest(count: int, what: str = "row") -> Text:
    """A line that says how many more there are than are shown."""
    return line(f"and {format_plural(count, f'more {what}')}", soft=True)


def format_dropped(counts: Mapping[str, int]) -> str:
    """Counts by reason as one text, the largest first: ``"dropped: 12 no margin, 3 near"``; empty
    without any."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in ordered)
    return f"dropped: {reasons}" if ordered else ""


def format_shares(counts: Mapping[str, int]) -> Text:
    """Counts of "helped", "same", "hurt" and "failed" as one bar with its legend; empty when all
    are 0."""
    total = sum(counts.values())
    if not total:
        return Text()
    bar = Text.assemble(
        *(("█" * round(BAR * count / total), STYLES[name]) for name, count in counts.items())
    )
    legend = Text("   ").join(
        Text(f"{name} {count:,}", style=STYLES[name]) for name, count in counts.items()
    )
    return bar + Text("\n") + legend


def diff_words(old: str, new: str) -> tuple[Parts, Parts]:
    """Both texts in parts, each with whether only this text has it. Upper and lower case are the
    same word. Texts of more than 1,500 words and signs, and texts that share less than a fifth of
    their words, come back as one part each: there, marks would only be noise.

    >>> diff_words("12 mm", "14 mm")
    ([('12', True), (' mm', False)], [('14', True), (' mm', False)])
    """
    before, after = WORD.findall(old), WORD.findall(new)
    whole: tuple[Parts, Parts] = ([(old, False)], [(new, False)])
    if max(len(before), len(after)) > MOST_WORDS:
        return whole
    matcher = difflib.SequenceMatcher(
        None, [word.lower() for word in before], [word.lower() for word in after], autojunk=False
    )
    words = sum(not word.isspace() for word in (*before, *after))
    shared = sum(
        not word.isspace()
        for start, _, size in matcher.get_matching_blocks()
        for word in before[start : start + size]
    )
    if 2 * shared < LEAST_SHARED * words:
        return whole
    parts: tuple[Parts, Parts] = ([], [])
    for kind, start, end, begin, stop in matcher.get_opcodes():
        for side, some in zip(parts, (before[start:end], after[begin:stop]), strict=True):
            text = "".join(some)
            inner = text.strip()
            left, _, right = text.partition(inner) if inner else (text, "", "")
            changed = kind != "equal"
            found = (
                [(left, False), (inner, changed), (right, False)] if changed else [(text, False)]
            )
            side += [part for part in found if part[0]]
    return parts


def word_diff(chosen: str, rejected: str) -> tuple[Text, Text]:
    """Two texts with the words marked that only one of them has; those of the second one are struck
    through, too."""
    styles = ("underline green", "strike red")
    first, second = (
        Text().join(visible_text(text, style=style if changed else "") for text, changed in side)
        for side, style in zip(
            diff_words(clip(chosen, MOST_DIFF), clip(rejected, MOST_DIFF)), styles, strict=True
        )
    )
    return first, second


def format_signed(value: float | None) -> str:
    """A number with its sign and two decimals; "failed" for None.

    >>> format_signed(0.5), format_signed(None)
    ('+0.50', 'failed')
    """
    return "failed" if value is None else f"{value:+.2f}"
