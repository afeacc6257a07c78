"""Charts of a comparison: a point with its interval per arm, the differences to one arm, and a
curve per series of a sweep."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from cowest_dspy.influence.statistics import Interval
from cowest_dspy.report.charts import SHARE, Curve, Mark, Row, curves, points, signed_axis
from cowest_dspy.report.comparison.numbers import ArmNumbers, Numbers, PointNumbers
from cowest_dspy.report.comparison.tables import (
    format_difference,
    format_percent,
    settings_text,
    varying,
)
from cowest_dspy.report.verdict import format_interval, format_share

SERIES = 6  # colours in page.css: --s0 and on
_LOGARITHMIC = 20  # from this ratio of largest to smallest on


def score_chart(numbers: Numbers, against: ArmNumbers | None) -> Markup:
    """The score of each arm over 0 to 100 %, small dots for single seeds, and a line at
    ``against``."""
    line = None if against is None else against.score
    return points([_score_row(arm) for arm in numbers.arms], "Score of each arm", SHARE, line=line)


def difference_chart(numbers: Numbers) -> Markup:
    """The difference of each tested arm to ``against``, in points; the colour says what was found
    after correction."""
    rows = []
    for arm in numbers.arms:
        test = arm.test
        if test is None or not test.n or test.difference is None:
            continue
        low, high = (100 * end for end in _ends(test.interval)) if test.interval else (None, None)
        kind = {1: "helped", -1: "hurt"}.get(arm.finding or 0, "plain")
        told = format_difference(test)
        rows.append(
            Row(
                arm.title,
                100 * test.difference,
                f"{arm.title}: {told} points",
                low,
                high,
                kind,
                told,
            )
        )
    reach = difference_reach(numbers)
    return points(rows, "Differences in points", signed_axis(float(reach), "points"), line=0.0)


def difference_reach(numbers: Numbers) -> int:
    """How many points the axis of differences reaches to either side: a multiple of 10, at least
    10, at most 100."""
    tests = [
        line.test
        for line in numbers.arms
        if line.test is not None and line.test.difference is not None
    ]
    ends = [abs(end) for test in tests for end in (*_ends(test.interval), test.difference or 0.0)]
    return min(100, max(10, 10 * math.ceil(10 * max(ends, default=0.0) - 1e-9)))


def sweep_axis(numbers: Numbers) -> str | None:
    """The setting for the x axis: of those that vary, the one with most values, if they are
    numbers; None without one."""
    counts = {}
    for key in varying(numbers):
        values = [point.settings.get(key) for point in numbers.sweep]
        if all(
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            for value in values
        ):
            counts[key] = len(set(values))
    return max(counts, key=lambda key: counts[key]) if counts else None


def sweep_series(numbers: Numbers, axis: str) -> dict[str, list[PointNumbers]]:
    """The points of each combination of the other settings, ascending along the axis, under a name
    for the legend."""
    others = [key for key in varying(numbers) if key != axis]
    series: dict[str, list[PointNumbers]] = {}
    for point in sorted(numbers.sweep, key=lambda point: point.settings[axis]):
        series.setdefault(settings_text(point.settings, others) or point.arm.title, []).append(
            point
        )
    return {name: series[name] for name in sorted(series)}


def sweep_chart(numbers: Numbers, axis: str, against: ArmNumbers | None) -> Markup:
    """Score over one setting: a curve per series with intervals, and a line at ``against``. From
    20-fold on x is logarithmic."""
    values = sorted({float(point.settings[axis]) for point in numbers.sweep})
    drawn = [
        Curve(
            name,
            f"s{index % SERIES}",
            [_sweep_mark(point, axis) for point in found if point.arm.score is not None],
        )
        for index, (name, found) in enumerate(sweep_series(numbers, axis).items())
    ]
    if len(values) < 2 or not any(curve.marks for curve in drawn):
        return Markup()
    told = "; ".join(
        f"{c.name}: {', '.join(f'{mark.y:.1f} % at {mark.x:g}' for mark in c.marks)}" for c in drawn
    )
    level = None if against is None or against.score is None else 100 * against.score
    logarithmic = values[0] > 0 and values[-1] / values[0] >= _LOGARITHMIC
    title = f"{axis}, logarithmic" if logarithmic else axis
    return curves(drawn, told, (title, "score, %"), values, logarithmic=logarithmic, level=level)


def _score_row(arm: ArmNumbers) -> Row:
    if arm.score is None:
        return Row(arm.title, None, f"{arm.title}: no answers", text="no answers")
    told = f"{arm.title}: {format_percent(arm.score)} %, 95 % {format_interval(arm.interval)}"
    low, high = _ends(arm.interval) or (None, None)
    seeds: Sequence[float] = (
        [score for score in arm.seed_scores if score is not None] if arm.spread is not None else []
    )
    kind = "accent" if arm.is_against else "plain"
    return Row(arm.title, arm.score, told, low, high, kind, format_share(arm.score), tuple(seeds))


def _sweep_mark(point: PointNumbers, axis: str) -> Mark:
    score = 100 * (point.arm.score or 0.0)
    ends = tuple(100 * end for end in _ends(point.arm.interval)) or (None, None)
    where = settings_text(point.settings, list(point.settings))
    told = f"{where}: {format_percent(point.arm.score)} % [{format_interval(point.arm.interval)}]"
    return Mark(float(point.settings[axis]), score, told, *ends)


def _ends(interval: Interval | None) -> tuple[float, ...]:
    return () if interval is None else (interval.low, interval.high)
