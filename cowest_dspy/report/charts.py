"""The charts of a page as Vega-Lite specifications: rows of bars, of points with intervals, of
shares; histograms; lines.

Vega-Lite does the scales, axes and marks, drawing.py makes SVG of them. A chart of rows is drawn
twice, for a wide page and for a phone, of which CSS shows one: text that is scaled down with its
chart cannot be read. Every mark has its numbers in a ``<title>``.
"""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from cowest_dspy.influence.statistics import Interval
from cowest_dspy.report.drawing import draw
from cowest_dspy.report.numbers import sample_evenly

Point = tuple[float, float]
Spec = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Chart:
    """A drawing, its caption, and its legend: the colour and the words of each entry."""

    drawing: Markup
    caption: str = ""
    legend: tuple[tuple[str, str], ...] = ()


NARROW = 343  # pixels: a phone of 375 less its margins
_LEFT, _PLOT, _RIGHT = 240, 570, 178
_WIDE = _LEFT + _PLOT + _RIGHT
_MOST_POINTS = 400


@dataclasses.dataclass(frozen=True)
class Axis:
    """From ``low`` to ``high`` with a tick at each of ``ticks``, whose words are a Vega
    ``expression``; ``title`` is under it."""

    low: float
    high: float
    ticks: tuple[float, ...]
    expression: str
    title: str = ""


SIGNED = "(datum.value > 0 ? '+' : '') + format(datum.value, '~g')"
SHARE = Axis(
    0.0,
    1.0,
    (0.0, 0.25, 0.5, 0.75, 1.0),
    "format(100 * datum.value, 'd') + (datum.value == 1 ? ' %' : '')",
)


def reach(values: Iterable[float | None], least: float = 0.1) -> float:
    """The length of an axis of differences to either side, so that all values are on it: 0.1, 0.2,
    0.4, 0.6, 0.8 or 1."""
    most = max((abs(value) for value in values if value is not None), default=0.0)
    return next(
        (step for step in (0.1, 0.2, 0.4, 0.6, 0.8) if step >= max(most, least) - 1e-9),
        max(1.0, math.ceil(most)),
    )


@dataclasses.dataclass(frozen=True)
class ChartRow:
    """One row: its ``label``, ``value`` and interval on the axis, ``text`` beside it, and the
    ``description`` of its mark.

    ``kind`` is the colour, a CSS variable of the page. ``dots`` are single seeds.
    """

    label: str
    value: float | None
    description: str
    low: float | None = None
    high: float | None = None
    kind: str = "plain"
    text: str = ""
    dots: tuple[float, ...] = ()


def ends_of(interval: Interval | None) -> tuple[float | None, float | None]:
    """The ends of an interval, for a row or a mark."""
    return (None, None) if interval is None else (interval.low, interval.high)


def bars(rows: Sequence[ChartRow], label: str, axis: Axis = SHARE) -> Markup:
    """A bar per row from 0 to its value, with its interval as a whisker."""

    def layers(data: list[Spec]) -> list[Spec]:
        bar = {
            "x": _across("value", axis),
            "x2": {"datum": axis.low},
            "y": _down("top"),
            "y2": {"field": "bottom"},
        }
        return [_mark("rect", data, bar, "colour"), *_whiskers(data, axis, halo=True)]

    return _both(rows, label, axis, layers)


def points(
    rows: Sequence[ChartRow],
    label: str,
    axis: Axis,
    *,
    band: tuple[float, float] | None = None,
    line: float | None = None,
) -> Markup:
    """A point per row with its interval; a grey ``band`` behind all of them, and a dashed upright
    ``line``."""

    def layers(data: list[Spec]) -> list[Spec]:
        across, found = _across("value", axis), list[Spec]()
        place = {"x": across, "y": _down("middle")}
        if band is not None:
            ends = {"x": _across("low", axis), "x2": {"field": "high"}}
            row = {"low": band[0], "high": band[1]}
            found.append(_mark("rect", [row], ends, color="var(--band)"))
        if line is not None:
            found.append(_mark("rule", [{"value": line}], {"x": across}, **_DASHED))
        seeds = [{**row, "value": dot} for row in data for dot in row["dots"]]
        found.append(_mark("circle", seeds, place, color="var(--soft)", size=26, opacity=0.7))
        point = {"size": 110, "opacity": 1, "stroke": "var(--ink)"}
        return [*found, *_whiskers(data, axis), _mark("circle", data, place, "colour", **point)]

    return _both(rows, label, axis, layers)


def differences(
    rows: Sequence[ChartRow], label: str, title: str, *, floor: float = 0.0, unit: float = 1.0
) -> Markup:
    """A point per row on an axis that goes equally far to both sides of a line at 0; a grey band
    from -``floor`` to ``floor``. ``unit``: how much a difference of the whole score is."""
    ends = [end for row in rows for end in (row.value, row.low, row.high) if end is not None]
    most = unit * reach(end / unit for end in (floor, *ends))
    axis = Axis(-most, most, (-most, -most / 2, 0.0, most / 2, most), SIGNED, title)
    return points(rows, label, axis, band=(-floor, floor) if floor else None, line=0.0)


def shares(
    groups: Sequence[tuple[str, str, Sequence[tuple[str, int]]]],
    label: str,
    words: Mapping[str, str] | None = None,
) -> Markup:
    """A full bar per group (label, text beside it, counts by kind), cut into the shares of its
    kinds, each with its count.

    ``words`` says what a kind is called, where that is not its name.
    """
    rows = [ChartRow(name, 1.0, "", text=text) for name, text, _ in groups]

    def layers(data: list[Spec]) -> list[Spec]:
        parts: list[Spec] = []
        for row, (name, _, counts) in zip(data, groups, strict=True):
            start, total = 0.0, max(sum(count for _, count in counts), 1)
            for kind, count in counts:
                share = count / total
                word = (words or {}).get(kind, kind)
                part = {
                    "start": start,
                    "end": start + share,
                    "mid": start + share / 2,
                    "count": f"{count:,}" if share >= 0.08 else "",
                    "colour": f"var(--{kind})",
                    "on": f"var(--on-{kind})",
                    "description": f"{name}: {count:,} of {total:,} {word}",
                }
                parts += [{**row, **part}] if count else []
                start += share
        ends = {
            "x": _across("start", SHARE),
            "x2": {"field": "end"},
            "y": _down("top"),
            "y2": {"field": "bottom"},
        }
        count = {
            "x": _across("mid", SHARE),
            "y": _down("middle"),
            "text": {"field": "count"},
            "color": _raw("on"),
        }
        return [
            _mark("rect", parts, ends, "colour", stroke="var(--paper)", strokeWidth=1.5),
            _mark("text", parts, count, baseline="middle", fontSize=12),
        ]

    return _both(rows, label, SHARE, layers)


def histogram(bins: Sequence[tuple[float, float, int]], label: str) -> Markup:
    """The influences of drafts as bins (low, high, count) over [-1, 1]."""
    data = []
    for low, high, count in bins:
        kind = "same" if low < 0 < high else "hurt" if high <= 0 else "helped"
        data.append(
            {
                "low": low,
                "high": high,
                "count": count,
                "colour": f"var(--{kind})",
                "description": f"influence {low:+.2f} to {high:+.2f}: {count:,} drafts",
            }
        )
    x = {"field": "low", "type": "quantitative", "scale": {"domain": [-1, 1]}, "title": "influence"}
    across = {**x, "axis": {"values": [-1, 0, 1], "labelExpr": SIGNED, "grid": False}}
    y = {
        "field": "count",
        "type": "quantitative",
        "title": None,
        "axis": {"tickCount": 4, "format": ",d"},
    }
    encoding = {"x": across, "x2": {"field": "high"}, "y": y, "y2": {"datum": 0}}
    bar = _mark("rect", data, encoding, "colour", stroke="var(--paper)", strokeWidth=1)
    return _plots([bar], label, 150)


def lines(
    training: Sequence[Point], held_out: Sequence[Point], x_title: str, y_title: str
) -> Markup:
    """A line over axes, and a dashed one of what was measured on held-out rows. Fewer than two
    points in each: an empty Markup.

    At most 400 points of a line are drawn, evenly spaced, the last one always.
    """
    drawn: list[Spec] = []
    labels: list[str] = []
    place = {"x": _free("x", x_title, grid=False), "y": _free("y", "")}
    for series, name, colour, dash in (
        (training, y_title, "var(--accent)", [1, 0]),
        (held_out, f"{y_title}, held out", "var(--second)", [5, 4]),
    ):
        if len(series) < 2:
            continue
        data = [
            {"x": x, "y": y, "description": f"{name} {y:.4g} at {x_title} {x:g}"}
            for x, y in (*sample_evenly(series[:-1], _MOST_POINTS), series[-1])
        ]
        look = {"color": colour, "strokeWidth": 2, "strokeDash": dash, "strokeJoin": "round"}
        dots = data if len(data) <= 40 else data[-1:]
        drawn.append(_mark("line", data, place, **look))
        drawn.append(_mark("circle", dots, place, "", color=colour, size=24, opacity=1))
        labels.append(f"{name} over {x_title}: from {series[0][1]:.4g} to {series[-1][1]:.4g}")
    return _plots(drawn, "; ".join(labels), 220) if drawn else Markup()


@dataclasses.dataclass(frozen=True)
class Mark:
    """A point of a series with its interval, and the description of its mark."""

    x: float
    y: float
    description: str
    low: float | None = None
    high: float | None = None


@dataclasses.dataclass(frozen=True)
class Series:
    """A line through marks: its ``kind`` is the colour, a CSS variable of the page, and its place
    in the order is its dashes."""

    name: str
    kind: str
    marks: Sequence[Mark]


_DASHED = {"color": "var(--accent)", "strokeWidth": 1.5, "strokeDash": [4, 3]}
_DASHES = ([1, 0], [7, 3], [2, 3], [8, 3, 2, 3], [12, 4], [4, 4])


def curves(
    series: Sequence[Series],
    label: str,
    titles: tuple[str, str],
    ticks: Sequence[float],
    *,
    logarithmic: bool = False,
    level: float | None = None,
    apart: bool = True,
) -> Markup:
    """A line per series with its points and their intervals, over an x axis with a tick at each
    measured value (``ticks``, ascending); a dashed line across at ``level``. ``apart``: series
    stand a few pixels beside each other, so that intervals at one x can be told apart."""
    first, last = ticks[0], ticks[-1]
    if logarithmic:
        margin = (last / first) ** 0.06
        scale: Spec = {"type": "log", "domain": [first / margin, last * margin], "nice": False}
    else:
        margin = 0.06 * (last - first)
        scale = {"zero": False, "domain": [first - margin, last + margin], "nice": False}
    axis = {"values": list(ticks), "grid": False, "format": "~r", "labelOverlap": True}
    x = {"field": "x", "type": "quantitative", "title": titles[0], "scale": scale, "axis": axis}
    place = {"x": x, "y": _free("y", titles[1])}
    upright = {"x": x, "y": _free("low", titles[1]), "y2": {"field": "high"}}
    layers: list[Spec] = []
    if level is not None:
        layers.append(_mark("rule", [{"y": level}], {"y": place["y"]}, **_DASHED))
    for index, one in enumerate(series):
        data = [dataclasses.asdict(mark) for mark in one.marks]
        spans = [row for row in data if row["low"] is not None]
        offset = (index - (len(series) - 1) / 2) * 4 if apart else 0
        look = {"xOffset": offset, "color": f"var(--{one.kind})"}
        dash = _DASHES[index % len(_DASHES)]
        layers += [
            _mark("line", data, place, strokeWidth=2, strokeDash=dash, **look),
            _mark("rule", spans, upright, strokeWidth=1.25, opacity=0.75, **look),
            _mark("circle", data, place, "", size=48, opacity=1, **look),
        ]
    return _plots(layers, label, 240)


Layers = Callable[[list[Spec]], list[Spec]]
"""Makes the marks of rows, from rows that have their places."""


def _both(rows: Sequence[ChartRow], label: str, axis: Axis, layers: Layers) -> Markup:
    """The drawing of these rows for a wide page and the one for a narrow page, in that order."""
    if not rows:
        return Markup()
    drawings: list[tuple[int | None, str]] = [(None, "rows at-wide"), (NARROW, "rows at-narrow")]
    return Markup().join(
        draw(_rows_spec(rows, axis, layers, width), label, kind) for width, kind in drawings
    )


def _rows_spec(rows: Sequence[ChartRow], axis: Axis, layers: Layers, width: int | None) -> Spec:
    """The specification of rows with words beside the plot on a wide page (``width`` None), above
    each bar on one of so many pixels."""
    characters, left, plot, right, half = 32, _LEFT, _PLOT, _RIGHT, 9
    if width is not None:
        characters = width // 8 - max(len(row.text) for row in rows)
        left, plot, right, half = 2, width - 4, 2, 8
    labels = [_wrap(row.label, characters) for row in rows]
    most = max(label.count("\n") + 1 for label in labels)
    step = max(34, 16 * most + 10) if width is None else 16 * most + 36
    data = list[Spec]()
    for index, (row, label) in enumerate(zip(rows, labels, strict=True)):
        middle = index * step + (step // 2 if width is None else 16 * most + 18)
        text_y = middle + 4.5 if width is None else middle - half - 8
        place = {
            "top": middle - half,
            "bottom": middle + half,
            "middle": middle,
            "w0": middle - 5,
            "w1": middle + 5,
            "label_y": text_y - (8 if width is None else 16) * label.count("\n"),
            "text_y": text_y,
        }
        look = {"label": label, "colour": f"var(--{row.kind})"}
        data.append({**dataclasses.asdict(row), **look, **place})
    words = [("label", -14, "right"), ("text", plot + 12, "left")]
    if width is not None:
        words = [("label", 0, "left"), ("text", plot, "right")]
    written = [
        _mark(
            "text",
            data,
            {"text": {"field": field}, "y": _down(f"{field}_y"), "x": {"value": x}},
            align=side,
        )
        for field, x, side in words
    ]
    bottom = (26 if axis.ticks else 2) + (20 if axis.title else 0)
    return {
        "width": plot,
        "height": step * len(rows),
        "autosize": "none",
        "padding": {"left": left, "right": right, "top": 4, "bottom": bottom},
        "layer": [*layers(data), *written],
    }


def _whiskers(data: list[Spec], axis: Axis, halo: bool = False) -> list[Spec]:
    """The interval of each row that has one; a halo keeps the line readable on a bar."""
    spans = [row for row in data if row["low"] is not None and row["high"] is not None]
    ends = [{**row, "end": row[end]} for row in spans for end in ("low", "high")]
    along = {"x": _across("low", axis), "x2": {"field": "high"}, "y": _down("middle")}
    upright = {"x": _across("end", axis), "y": _down("w0"), "y2": {"field": "w1"}}
    found: list[Spec] = []
    for colour, width in (("var(--paper)", 4.5), ("var(--ink)", 1.5))[0 if halo else 1 :]:
        look = {"color": colour, "strokeWidth": width}
        found += [_mark("rule", spans, along, **look), _mark("rule", ends, upright, **look)]
    return found if spans else []


def _across(field: str, axis: Axis) -> Spec:
    ticks = {
        "values": list(axis.ticks),
        "labelExpr": axis.expression,
        "title": axis.title or None,
        "labelFlush": True,
    }
    scale = {"domain": [axis.low, axis.high], "nice": False, "clamp": True}
    return {"field": field, "type": "quantitative", "scale": scale, "axis": ticks}


def _free(field: str, title: str, *, grid: bool = True) -> Spec:
    axis = {"tickCount": 4, "grid": grid}
    scale = {"zero": False, "nice": grid}
    return {
        "field": field,
        "type": "quantitative",
        "title": title or None,
        "scale": scale,
        "axis": axis,
    }


def _down(field: str) -> Spec:
    """A place in pixels, as it stands in the data."""
    return {"field": field, "type": "quantitative", "scale": None, "axis": None}


def _raw(field: str) -> Spec:
    """A colour as it stands in the data."""
    return {"field": field, "type": "nominal", "scale": None, "legend": None}


def _mark(
    kind: str, data: list[Spec], encoding: Spec, fill: str | None = None, **look: Any
) -> Spec:
    """One layer. ``fill``: the field with the colour of each row; "" for one colour. Then, each
    mark has the description of its row as its title."""
    look = {"aria": fill is not None, **look}
    if kind == "text":
        look = {"baseline": "alphabetic", **look}
    if fill is not None:
        encoding = {**encoding, "description": {"field": "description", "type": "nominal"}}
    if fill:
        encoding = {**encoding, "fill": _raw(fill)}
    return {"data": {"values": data}, "mark": {"type": kind, **look}, "encoding": encoding}


def _plots(layers: list[Spec], label: str, height: int) -> Markup:
    """The drawing of these layers over two axes for a wide page and the one for a narrow page."""
    padding = {"left": 52, "right": 12, "top": 10, "bottom": 44}
    plot = {"height": height, "autosize": "none", "padding": padding, "layer": layers}
    return Markup().join(
        draw({**plot, "width": width - 64}, label, kind)
        for width, kind in ((_WIDE, "plot at-wide"), (NARROW, "plot at-narrow"))
    )


def _wrap(text: str, characters: int) -> str:
    """At most three lines, cut at words where that can be."""
    return (
        "\n".join(
            textwrap.wrap(
                text, max(characters, 12), max_lines=3, placeholder=" ...", break_long_words=True
            )
        )
        or text
    )
