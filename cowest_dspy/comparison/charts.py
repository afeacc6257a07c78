"""Charts of a comparison as inline SVG: a dot with its interval per arm, and a curve per series of a sweep."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from cowest_dspy.comparison.numbers import ArmNumbers, Numbers, PointNumbers
from cowest_dspy.comparison.tables import format_difference, format_percent, settings_text, varying
from cowest_dspy.intervals import Interval
from cowest_dspy.report.charts import Frame, nice_ticks, svg, tag
from cowest_dspy.report.verdict import format_interval

HEIGHT, WIDTH = 230, 420  # those of Frame
SERIES = 6  # styles in comparison.css
_LOGARITHMIC = 20  # from this ratio of largest to smallest on


def score_dots(line: ArmNumbers, against: ArmNumbers | None) -> Markup:
    """The score over 0 to 100 % as a dot with its interval, small dots for single seeds, and a line at ``against``."""
    parts = [_upright(x, "grid") for x in (0, 25, 50, 75, 100)]
    if against is not None and against.score is not None:
        parts.append(_upright(100 * against.score, "against"))
    if line.score is None:
        return svg(f"{line.title}: no answers", *parts, class_="bar", height=30)
    if line.spread is not None:
        parts += [_dot(100 * score, 3, "seed") for score in line.seed_scores if score is not None]
    label = f"{line.title}: {format_percent(line.score)} %, 95 % {format_interval(line.interval)}"
    ends = None if line.interval is None else (100 * line.interval.low, 100 * line.interval.high)
    return svg(label, *parts, *_whisker(ends), _dot(100 * line.score, 5.5, "dot"), class_="bar", height=30)


def difference_reach(numbers: Numbers) -> int:
    """How many points the axis of differences reaches to either side: a multiple of 10, at least 10, at most 100."""
    tests = [line.test for line in numbers.arms if line.test is not None and line.test.difference is not None]
    ends = [abs(end) for test in tests for end in (*_ends(test.interval), test.difference or 0.0)]
    return min(100, max(10, 10 * math.ceil(10 * max(ends, default=0.0) - 1e-9)))


def difference_dots(line: ArmNumbers, reach: int) -> Markup:
    """The difference to ``against`` over -reach to +reach points; its class says what was found after correction."""
    test = line.test
    parts = [_upright(x, "against" if x == 50 else "grid") for x in (0, 25, 50, 75, 100)]
    if test is None or test.difference is None:
        return svg(f"{line.title}: not tested", *parts, class_="bar", height=30)

    def place(difference: float) -> float:
        return min(100.0, max(0.0, 50 + 50 * 100 * difference / reach))

    kind = {1: "dot helped", -1: "dot hurt"}.get(line.finding or 0, "dot")
    ends = None if test.interval is None else (place(test.interval.low), place(test.interval.high))
    label = f"{line.title}: {format_difference(test)} points"
    return svg(label, *parts, *_whisker(ends), _dot(place(test.difference), 5.5, kind), class_="bar", height=30)


def sweep_axis(numbers: Numbers) -> str | None:
    """The setting for the x axis: of those that vary, the one with most values, if they are numbers; None without one."""
    counts = {}
    for key in varying(numbers):
        values = [point.settings.get(key) for point in numbers.sweep]
        if all(isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) for value in values):
            counts[key] = len(set(values))
    return max(counts, key=lambda key: counts[key]) if counts else None


def sweep_series(numbers: Numbers, axis: str) -> dict[str, list[PointNumbers]]:
    """The points of each combination of the other settings, ascending along the axis, under a name for the legend."""
    others = [key for key in varying(numbers) if key != axis]
    series: dict[str, list[PointNumbers]] = {}
    for point in sorted(numbers.sweep, key=lambda point: point.settings[axis]):
        series.setdefault(settings_text(point.settings, others) or point.arm.title, []).append(point)
    return {name: series[name] for name in sorted(series)}


def sweep_chart(numbers: Numbers, axis: str, against: ArmNumbers | None) -> Markup:
    """Score over one setting: a curve per series with intervals, and a line at ``against``. From 20-fold on x is logarithmic."""
    values = sorted({float(point.settings[axis]) for point in numbers.sweep})
    logarithmic = values[0] > 0 and values[-1] / values[0] >= _LOGARITHMIC

    def across(value: float) -> float:
        return math.log(value) if logarithmic else value

    scored = [point.arm for point in numbers.sweep if point.arm.score is not None]
    ys = [100 * end for arm in scored for end in (*_ends(arm.interval), arm.score or 0.0)]
    ys += [100 * against.score] if against is not None and against.score is not None else []
    if not scored or len(values) < 2:
        return Markup()
    y_ticks = nice_ticks(min(ys), max(ys))
    low, high = across(values[0]), across(values[-1])
    margin = 0.06 * (high - low)
    frame = Frame((low - margin, high + margin), (y_ticks[0], y_ticks[-1]))
    parts = [*frame.axes([], y_ticks, f"{axis}{', logarithmic' if logarithmic else ''}", "score, %")]
    parts += _x_ticks(frame, [(value, across(value)) for value in values])
    if against is not None and against.score is not None:
        y = frame.y(100 * against.score)
        parts.append(tag("line", tag("title", against.title), x1=frame.x(low), x2=frame.x(high), y1=y, y2=y, class_="against"))
    series, said = sweep_series(numbers, axis), []
    for index, (name, points) in enumerate(series.items()):
        shift = (index - (len(series) - 1) / 2) * 4  # pixels: intervals of one x stand beside each other
        marks = [(frame.x(across(float(point.settings[axis]))) + shift, point) for point in points if point.arm.score is not None]
        parts += _curve(frame, f"series-{index % SERIES}", marks)
        said.append(f"{name}: {', '.join(f'{format_percent(p.arm.score)} % at {p.settings[axis]:g}' for _, p in marks)}")
    return svg("; ".join(said), *parts, class_="plot sweep", viewBox=f"0 0 {WIDTH} {HEIGHT}")


def _curve(frame: Frame, kind: str, marks: Sequence[tuple[float, PointNumbers]]) -> list[Markup]:
    path = " ".join(f"{x:.1f},{frame.y(100 * (point.arm.score or 0.0)):.1f}" for x, point in marks)
    parts = [tag("polyline", points=path, class_=f"line {kind}")] if len(marks) > 1 else []
    for x, point in marks:
        if point.arm.interval is not None:
            low, high = (frame.y(100 * end) for end in _ends(point.arm.interval))
            parts.append(tag("line", x1=x, x2=x, y1=low, y2=high, class_=f"span {kind}"))
        where = settings_text(point.settings, list(point.settings))
        title = tag("title", f"{where}: {format_percent(point.arm.score)} % [{format_interval(point.arm.interval)}]")
        parts.append(tag("circle", title, cx=x, cy=frame.y(100 * (point.arm.score or 0.0)), r=3.5, class_=kind))
    return parts


def _x_ticks(frame: Frame, values: Sequence[tuple[float, float]]) -> list[Markup]:
    """A label at each value, but where it would touch the one before it."""
    parts, free = list[Markup](), -math.inf
    for value, at in values:
        text, x = f"{value:g}", frame.x(at)
        if x - 3.5 * len(text) > free:
            parts.append(tag("text", text, x=x, y=HEIGHT - 22, class_="tick middle"))
            free = x + 3.5 * len(text) + 4
    return parts


def _ends(interval: Interval | None) -> tuple[float, ...]:
    return () if interval is None else (interval.low, interval.high)


def _upright(percent: float, kind: str) -> Markup:
    return tag("line", x1=f"{percent:.2f}%", x2=f"{percent:.2f}%", y1=0, y2=30, class_=kind)


def _dot(percent: float, radius: float, kind: str) -> Markup:
    return tag("circle", cx=f"{percent:.2f}%", cy=15, r=radius, class_=kind)


def _whisker(ends: tuple[float, float] | None) -> list[Markup]:
    if ends is None:
        return []
    low, high = (f"{end:.2f}%" for end in ends)
    sides = ((low, high, 15, 15), (low, low, 10, 20), (high, high, 10, 20))
    return [tag("line", x1=x1, x2=x2, y1=y1, y2=y2, class_="whisker") for x1, x2, y1, y2 in sides]
