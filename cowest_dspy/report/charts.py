"""Small SVG charts, drawn here so that a report needs no script, font or request to show them.

Colours come from the page's CSS. Every text and attribute is escaped. Line charts scale with their viewBox; bars use
percentages, so that they fit any width without changing their height.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

from cowest_dspy.report.numbers import ArmLine, InfluenceCounts

Point = tuple[float, float]
_WIDTH, _HEIGHT = 420, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 38


def interval_bar(line: ArmLine) -> Markup:
    """The accuracy of an arm as a bar over 0 to 100 %, with its interval as a whisker and light quarter lines."""
    grid = [tag("line", x1=f"{x}%", x2=f"{x}%", y1=0, y2=30, class_="grid") for x in (0, 25, 50, 75, 100)]
    if line.accuracy is None:
        return svg(f"{line.title}: no answers", *grid, class_="bar", height=30)
    bar = tag("rect", x=0, y=8, width=_percent(line.accuracy), height=14, rx=2, class_="fill")
    whisker = []
    if line.interval is not None:
        low, high = _percent(line.interval.low), _percent(line.interval.high)
        ends = ((low, high, 15, 15), (low, low, 10, 20), (high, high, 10, 20))
        whisker = [
            tag("line", x1=x1, x2=x2, y1=y1, y2=y2, class_=kind)
            for kind in ("halo", "whisker")  # a halo keeps the dark line readable on a dark bar
            for x1, x2, y1, y2 in ends
        ]
    return svg(f"{line.title}: accuracy {_percent(line.accuracy)}", *grid, bar, *whisker, class_="bar", height=30)


def share_bar(counts: InfluenceCounts) -> Markup:
    """Helped, same, hurt and failed as one bar, in that order, each as its share of all drafts."""
    parts, start = [], 0.0
    for name in ("helped", "same", "hurt", "failed"):
        share = getattr(counts, name) / max(counts.n, 1)
        title = tag("title", f"{name}: {getattr(counts, name)} of {counts.n}")
        parts.append(tag("rect", title, x=_percent(start), y=0, width=_percent(share), height=22, class_=name))
        start += share
    label = f"{counts.helped} helped, {counts.same} same, {counts.hurt} hurt, {counts.failed} failed"
    return svg(label, *parts, class_="share", height=22)


def histogram(values: Sequence[float], label: str, *, bins: int = 21) -> Markup:
    """How often each influence in [-1, 1] occurs; the middle bin is centred on 0."""
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, max(0, int((value + 1) / 2 * bins)))] += 1
    y_ticks = nice_ticks(0, max([*counts, 1]))
    frame = Frame((-1.0, 1.0), (0.0, y_ticks[-1]))
    width = (_WIDTH - _LEFT - _RIGHT) / bins
    bars = []
    for index, count in enumerate(counts):
        kind = "same" if index == bins // 2 else "hurt" if index < bins // 2 else "helped"
        top = frame.y(count)
        title = tag("title", f"about {-1 + (2 * index + 1) / bins:+.2f}: {count} drafts")
        left, height = _LEFT + index * width + 0.5, frame.y(0) - top
        bars.append(tag("rect", title, x=left, y=top, width=width - 1, height=height, class_=kind))
    axes = frame.axes([-1, -0.5, 0, 0.5, 1], y_ticks, "influence", "drafts")
    return svg(label, *axes, *bars, class_="plot", viewBox=f"0 0 {_WIDTH} {_HEIGHT}")


def line_chart(points: Sequence[Point], x_label: str, y_label: str, *, held_out: Sequence[Point] = ()) -> Markup:
    """A line over axes with round ticks, and a dashed one of what was measured on held-out rows, named in the chart.

    With fewer than two points in each nothing is drawn (an empty Markup).
    """
    named = ((points, "line", ""), (held_out, "line held-out", ", held out"))
    lines = [(line, kind, name) for line, kind, name in named if len(line) >= 2]
    if not lines:
        return Markup()
    xs, ys = ([point[axis] for line, _, _ in lines for point in line] for axis in (0, 1))
    y_ticks = nice_ticks(min(ys), max(ys))
    frame = Frame((min(xs), max(xs)), (y_ticks[0], y_ticks[-1]))
    x_ticks = [tick for tick in nice_ticks(min(xs), max(xs), 6) if min(xs) <= tick <= max(xs)]
    parts, said = frame.axes(x_ticks, y_ticks, x_label, y_label), []
    for line, kind, name in lines:
        path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in line)
        x, y = line[-1]
        title = tag("title", f"{y_label}{name} {y:.4g} at {x_label} {x:g}")
        parts.append(tag("polyline", points=path, class_=kind))
        parts.append(tag("circle", title, cx=frame.x(x), cy=frame.y(y), r=3.5))
        said.append(f"{y_label}{name} over {x_label}: from {line[0][1]:.4g} to {y:.4g}")
    if len(held_out) >= 2:
        parts.append(tag("text", "dashed: held out", x=_WIDTH - _RIGHT, y=_TOP - 2, class_="tick end"))
    return svg("; ".join(said), *parts, class_="plot", viewBox=f"0 0 {_WIDTH} {_HEIGHT}")


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About ``count`` + 1 round numbers that span [low, high] (steps of 1, 2 or 5 times a power of ten), ascending.

    >>> nice_ticks(0.13, 0.71)
    [0.0, 0.2, 0.4, 0.6, 0.8]
    """
    flat = high - low <= max(1e-9 * max(abs(low), abs(high)), 1e-300)
    span = max(abs(high), 1.0) if flat else high - low
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * count >= span * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, max(last, first + 1) + 1)]


def tag(name: str, content: Markup | str = "", **attributes: object) -> Markup:
    """One SVG element; what is not Markup is escaped, attributes always are. ``class_`` is class, ``a_b`` is a-b."""
    pairs = (f' {key.rstrip("_").replace("_", "-")}="{escape(_short(value))}"' for key, value in attributes.items())
    return Markup(f"<{name}{''.join(pairs)}>{escape(content)}</{name}>")


class Frame:
    """From data to the pixels inside the axes."""

    def __init__(self, x_span: Point, y_span: Point) -> None:
        self.x_span, self.y_span = x_span, y_span

    def x(self, value: float) -> float:
        low, high = self.x_span
        return _LEFT + (value - low) / ((high - low) or 1) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_span
        return _HEIGHT - _BOTTOM - (value - low) / ((high - low) or 1) * (_HEIGHT - _TOP - _BOTTOM)

    def axes(self, x_ticks: Sequence[float], y_ticks: Sequence[float], x_label: str, y_label: str) -> list[Markup]:
        """Grid lines, tick labels and the two axis titles."""
        parts = []
        for tick in y_ticks:
            y = self.y(tick)
            kind = "grid zero" if tick == 0 else "grid"
            parts.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_=kind))
            parts.append(tag("text", f"{tick:g}", x=_LEFT - 6, y=y + 4, class_="tick end"))
        for tick in x_ticks:
            parts.append(tag("text", f"{tick:g}", x=self.x(tick), y=_HEIGHT - _BOTTOM + 16, class_="tick middle"))
        middle = (_TOP + _HEIGHT - _BOTTOM) / 2
        parts.append(tag("text", x_label, x=(_LEFT + _WIDTH - _RIGHT) / 2, y=_HEIGHT - 4, class_="axis middle"))
        turned = f"rotate(-90 12 {middle:g})"
        return [*parts, tag("text", y_label, x=12, y=middle, transform=turned, class_="axis middle")]


def svg(label: str, *parts: Markup, **attributes: object) -> Markup:
    return tag("svg", Markup().join(parts), role="img", aria_label=label, **attributes)


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def _short(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value
