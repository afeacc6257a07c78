"""Views for notebooks: the small pieces of HTML that ``_repr_html_`` of our objects is made of.

A view is a fragment that asks for nothing: no script, no style sheet, no address. Its colours are
the notebook's own (light or dark), or half-transparent ones that can be read on both. Every text is
escaped. A view is small: it shows the first few rows and says how many more there are, and a long
text is cut and says so.

A class whose view needs what stands further down in the house hands itself to :func:`html_of`,
where that registers.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

MOST_ROWS = 5
MOST_TEXT = 300
MOST_WORDS = 200
"""Words of a text that are compared; a diff takes time that grows with the product of both."""

WORD = re.compile(r"\s+|\w+|[^\w\s]")
"""A word, the space between two, or a sign."""

_COLOURS = {
    "helped": "rgba(13,148,126,.75)",
    "same": "rgba(128,136,150,.45)",
    "hurt": "rgba(217,84,20,.75)",
    "failed": "rgba(90,98,112,.9)",
}
_SOFT = "opacity:.75;font-size:.9em"
_CELL = (
    "padding:3px 12px 3px 0;vertical-align:top;text-align:{align};border-bottom:1px solid "
    "rgba(128,128,128,.25)"
)
_TEXT = "white-space:pre-wrap;overflow-wrap:anywhere;font-family:ui-monospace,Menlo,Consolas,monospace;font-size:.92em"


@functools.singledispatch
def html_of(thing: Any) -> str:
    """The view of an object whose class was registered.

    Raises:
        TypeError: it was not.
    """
    raise TypeError(f"There is no view of a {type(thing).__name__}.")


def tag(name: str, *children: Any, **attributes: object) -> Markup:
    """An element; children that are no Markup are escaped, attributes always. ``aria_label`` is
    aria-label, ``class_`` is class.

    >>> tag("b", "1 < 2", class_='"')
    Markup('<b class="&#34;">1 &lt; 2</b>')
    """
    inside = Markup("").join(escape(child) for child in children)
    given = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), value)
        for key, value in attributes.items()
    )
    return Markup("<{}{}>{}</{}>").format(Markup(name), given, inside, Markup(name))


def view(title: str, *parts: Markup | str | None) -> str:
    """A whole view: its title in bold, then its parts; what is empty is left out."""
    shown = [part if isinstance(part, Markup) else line(part) for part in parts if part]
    return str(
        tag(
            "div",
            tag("div", tag("strong", title)),
            *shown,
            style="max-width:900px;line-height:1.45",
        )
    )


def line(text: Any, *, soft: bool = False) -> Markup:
    """One line of text."""
    return tag("div", text, style=_SOFT) if soft else tag("div", text)


def said(text: Any, most: int = MOST_TEXT) -> Markup:
    """A text as it is, its line breaks kept; cut where it is long."""
    return tag("span", clipped(str(text), most), style=_TEXT)


def clipped(text: str, most: int = MOST_TEXT) -> str:
    """The text, cut where it is longer, and saying so.

    >>> clipped("abcdef", 4)
    'abcd ... [2 more characters]'
    """
    return (
        text if len(text) <= most else f"{text[:most]} ... [{len(text) - most:,} more characters]"
    )


def table(
    heads: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    texts: int = 1,
    total: int | None = None,
    most: int = MOST_ROWS,
) -> Markup:
    """The first ``most`` rows; the first ``texts`` columns are aligned as text, the others as
    numbers. ``total``: how many rows there are, where ``rows`` has not all of them."""
    given = list(rows)
    shown, count = given[:most], total if total is not None else len(given)

    def aligned(name: str, cells: Sequence[Any]) -> Markup:
        styles = [
            _CELL.format(align="left" if place < texts else "right") for place in range(len(cells))
        ]
        return tag(
            "tr", *(tag(name, cell, style=style) for cell, style in zip(cells, styles, strict=True))
        )

    made = tag(
        "table",
        tag("thead", aligned("th", heads)),
        tag("tbody", *(aligned("td", row) for row in shown)),
        style="border-collapse:collapse;margin:6px 0",
    )
    return made if count <= len(shown) else made + more(count - len(shown))


def several(count: int, what: str) -> str:
    """
    >>> several(1, "pair"), several(2000, "pair")
    ('1 pair', '2,000 pairs')
    """
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def more(count: int, what: str = "row") -> Markup:
    """That there are more of something than are shown."""
    return line(f"and {several(count, f'more {what}')}", soft=True)


def counted(counts: Mapping[str, int]) -> str:
    """Counts by reason as one text, the largest first: ``"dropped: 12 no margin, 3 near"``; empty
    without any."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return (
        f"dropped: {', '.join(f'{count:,} {reason}' for reason, count in ordered)}"
        if ordered
        else ""
    )


def shares(counts: Mapping[str, int]) -> Markup:
    """Counts of "helped", "same", "hurt" and "failed" as one bar with its legend; empty when all
    are 0."""
    total = sum(counts.values())
    if not total:
        return Markup("")
    bar = [
        tag(
            "span",
            style=f"display:inline-block;height:14px;width:{100 * count / total:.2f}%;background:{_COLOURS[name]}",
        )
        for name, count in counts.items()
    ]
    label = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    legend = [
        tag(
            "span",
            tag(
                "span",
                style=f"display:inline-block;width:10px;height:10px;margin-right:5px;background:{_COLOURS[name]}",
            ),
            f"{name} {count:,}",
            style="margin-right:14px",
        )
        for name, count in counts.items()
    ]
    style = (
        "display:block;width:100%;max-width:420px;margin:6px 0 "
        "2px;font-size:0;line-height:0;white-space:nowrap"
    )
    return tag("div", *bar, role="img", aria_label=label, style=style) + tag(
        "div", *legend, style="font-size:.9em"
    )


def interval_bar(value: float | None, low: float | None, high: float | None) -> Markup:
    """A share in [0, 1] as a bar, its interval as a line over it; empty where there is no share."""
    if value is None:
        return Markup("")

    def percent(share: float) -> str:
        return f"{100 * min(max(share, 0.0), 1.0):.2f}%"

    frame = "display:inline-block;position:relative;width:140px;height:12px;background:rgba(128,128,128,.15)"
    parts = [
        tag(
            "span",
            style=f"position:absolute;left:0;top:0;height:12px;width:{percent(value)};background:rgba(74,120,214,.7)",
        )
    ]
    if low is not None and high is not None:
        width = percent(high - low)
        parts.append(
            tag(
                "span",
                style=f"position:absolute;top:5px;height:2px;left:{percent(low)};width:{width};background:currentColor",
            )
        )
    return tag("span", *parts, role="img", aria_label=f"{100 * value:.1f} %", style=frame)


def word_diff(chosen: str, rejected: str) -> tuple[Markup, Markup]:
    """Two texts with the words marked that only one of them has; the second one's are struck
    through, too.

    Words stay in their order, and what is between them stays as it is: without the marks each text
    is what it was.
    """
    one, two = _words(chosen), _words(rejected)
    first, second = marked_sides(
        difflib.SequenceMatcher(None, one, two, autojunk=False),
        (one, two),
        (lambda text: _marked("ins", text, "helped"), lambda text: _marked("del", text, "hurt")),
    )
    return tag("span", first, style=_TEXT), tag("span", second, style=_TEXT)


def marked_sides(
    matcher: difflib.SequenceMatcher[str],
    sides: tuple[Sequence[str], Sequence[str]],
    marks: tuple[Callable[[str], Markup], Callable[[str], Markup]],
) -> tuple[Markup, Markup]:
    """The two texts, given as the words that ``matcher`` compares, escaped; what only one of them
    has goes through its mark."""
    first, second = Markup(""), Markup("")
    for kind, start, end, begin, stop in matcher.get_opcodes():
        here, there = "".join(sides[0][start:end]), "".join(sides[1][begin:stop])
        first += escape(here) if kind == "equal" else marks[0](here)
        second += escape(there) if kind == "equal" else marks[1](there)
    return first, second


def _marked(name: str, text: str, colour: str) -> Markup:
    background = _COLOURS[colour].replace(".75)", ".25)")
    decoration = "underline" if name == "ins" else "line-through"
    return (
        tag(name, text, style=f"background:{background};text-decoration:{decoration}")
        if text
        else Markup("")
    )


def _words(text: str) -> list[str]:
    """Words and the spaces between them; of a very long text the first ones, and that there are
    more."""
    found = WORD.findall(text)
    return (
        found
        if len(found) <= MOST_WORDS
        else [*found[:MOST_WORDS], f" ... [{len(found) - MOST_WORDS:,} more]"]
    )


def signed(value: float | None) -> str:
    """A number with its sign and two decimals; "failed" for None.

    >>> signed(0.5), signed(None)
    ('+0.50', 'failed')
    """
    return "failed" if value is None else f"{value:+.2f}"
