"""Which charts a report has: each from the numbers that stand in report.json."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from markupsafe import Markup

from cowest_dspy.report import charts
from cowest_dspy.report.charts import Axis, Row
from cowest_dspy.report.figures import Figures
from cowest_dspy.report.model import RoundRow, RunReport, StepRow
from cowest_dspy.report.numbers import ArmLine, InfluenceCounts
from cowest_dspy.report.verdict import format_interval, format_share, format_usd

_KINDS = ("helped", "same", "hurt", "failed")


def drawings(report: RunReport, numbers: Figures) -> dict[str, Any]:
    """The charts by the name that the template knows them by; an empty Markup, or an empty list,
    where there is nothing to draw."""
    return {
        "arms": charts.bars([arm_row(line) for line in numbers.arms], "Score of each arm"),
        "tuning": _tuning(report, numbers),
        "rounds": _gains(
            "Gain of each round on the dev split",
            [(f"round {row.number}", row) for row in report.rounds],
        ),
        "cycle": _gains(
            "Gain of each step over the start, on the dev split",
            [(f"{row.number} {row.name}", row) for row in report.steps],
        ),
        "influence": charts.shares(
            [
                (f"round {number}", f"n {counts.n:,}", _counts(counts))
                for number, counts in numbers.influence.items()
            ],
            "Drafts that helped, changed nothing, hurt or failed, by round",
        ),
        "means": _means(report, numbers),
        "distribution": [
            (
                f"drafts of round {number}",
                charts.histogram(
                    [(one.low, one.high, one.count) for one in bins],
                    f"Influences in round {number}",
                ),
            )
            for number, bins in numbers.distribution.items()
            if numbers.graded
        ],
        "by_draft": charts.shares(
            [
                (group.title, f"n {group.counts.n:,}", _counts(group.counts))
                for group in numbers.by_draft
            ],
            "What drafts did, by how right they were themselves",
        ),
        "stages": _stages(report),
    }


def arm_row(line: ArmLine) -> Row:
    """An arm's score with its interval."""
    if line.accuracy is None:
        return Row(line.title, None, f"{line.title}: no answers", text="no answers")
    right = (
        f", {line.correct:,} of {line.answered:,} right"
        if line.correct is not None
        else f", n {line.answered:,}"
    )
    told = (
        f"{line.title}: {format_share(line.accuracy)}, 95 % {format_interval(line.interval)}{right}"
    )
    low, high = (line.interval.low, line.interval.high) if line.interval else (None, None)
    kind = "accent" if line.is_reference else "plain"
    return Row(line.title, line.accuracy, told, low, high, kind, format_share(line.accuracy))


def reach(values: Iterable[float | None], least: float = 0.1) -> float:
    """How far an axis of differences goes to either side, so that all values are on it: 0.1, 0.2,
    0.4, 0.6, 0.8 or 1."""
    most = max((abs(value) for value in values if value is not None), default=0.0)
    return next(
        (step for step in (0.1, 0.2, 0.4, 0.6, 0.8) if step >= max(most, least) - 1e-9),
        max(1.0, math.ceil(most)),
    )


def _counts(counts: InfluenceCounts) -> list[tuple[str, int]]:
    return [(kind, getattr(counts, kind)) for kind in _KINDS]


def _tuning(report: RunReport, numbers: Figures) -> Markup:
    """What the tuned collaboration did with the examples that both arms have a score for."""
    test = numbers.tuning
    if test is None or not test.n:
        return Markup()
    rest = test.n - numbers.right_both - test.fixed - test.broken
    counts = [
        ("helped", test.fixed),
        ("plain", numbers.right_both),
        ("failed", max(rest, 0)),
        ("hurt", test.broken),
    ]
    label = (
        f"{test.fixed} fixed, {numbers.right_both} right both times, {rest} no better and no "
        f"worse, {test.broken} broken"
    )
    named = {
        "helped": "fixed",
        "plain": "right both times",
        "failed": "no better, no worse, and not right",
        "hurt": "broken",
    }
    return charts.shares([("before and after tuning", f"n {test.n:,}", counts)], label, named)


def _gains(label: str, rows: Sequence[tuple[str, RoundRow | StepRow]]) -> Markup:
    """A point with its interval for each round or step that has a measured gain."""
    known = [(name, row) for name, row in rows if row.mean is not None]
    if not known:
        return Markup()
    axis = charts.signed_axis(
        reach(end for _, row in known for end in (row.mean, row.low, row.high)), "gain in score"
    )

    def taken(row: RoundRow | StepRow) -> bool:
        return row.accepted if isinstance(row, RoundRow) else row.best

    drawn = [
        Row(
            name,
            row.mean,
            f"{name}: {row.gain}",
            row.low,
            row.high,
            "helped" if taken(row) else "plain",
            row.gain,
        )
        for name, row in known
    ]
    return charts.points(drawn, label, axis, line=0.0)


def _means(report: RunReport, numbers: Figures) -> Markup:
    """The mean influence of each round with its interval, on the band of what the strong model's
    own sampling may make."""
    known = [
        (number, counts) for number, counts in numbers.influence.items() if counts.mean is not None
    ]
    if not known:
        return Markup()
    floor = report.noise.of_mean if report.noise else 0.0
    spans = [counts.interval for _, counts in known if counts.interval]
    ends = [
        floor,
        *(counts.mean for _, counts in known),
        *(end for span in spans for end in (span.low, span.high)),
    ]
    axis: Axis = charts.signed_axis(reach(ends), "mean influence")
    rows = []
    for number, counts in known:
        low, high = (counts.interval.low, counts.interval.high) if counts.interval else (None, None)
        text = f"{counts.mean:+.3f}" + (f" [{low:+.3f}, {high:+.3f}]" if low is not None else "")
        kind = "accent" if low is not None and low > floor else "plain"
        rows.append(
            Row(
                f"round {number}",
                counts.mean,
                f"round {number}: mean influence {text}",
                low,
                high,
                kind,
                text,
            )
        )
    return charts.points(
        rows, "Mean influence by round", axis, band=(-floor, floor) if floor else None, line=0.0
    )


def _stages(report: RunReport) -> list[tuple[str, Markup]]:
    """One chart per measure that some stage has: seconds, calls, tokens, dollars; stages that have
    none of it are left out."""
    measures = (
        ("seconds", lambda stage: stage.seconds, lambda value: f"{value:,.1f}"),
        ("calls made", lambda stage: stage.calls, lambda value: f"{value:,}"),
        (
            "tokens, in and out",
            lambda stage: (stage.tokens_in or 0) + (stage.tokens_out or 0),
            lambda value: f"{value:,}",
        ),
        ("US dollars", lambda stage: stage.usd, format_usd),
    )
    found = []
    for title, value_of, words in measures:
        known = [(stage.name, value) for stage in report.stages if (value := value_of(stage))]
        if not known:
            continue
        axis = Axis(0.0, float(max(value for _, value in known)), (), "''")
        rows = [
            Row(name, value, f"{name}: {words(value)} {title}", kind="accent", text=words(value))
            for name, value in known
        ]
        found.append((title, charts.bars(rows, f"{title} of each stage", axis, small=True)))
    return found
