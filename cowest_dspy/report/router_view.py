"""The curve of a router to read: a sentence, tables, one page with a chart; and everything in it
as JSON."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console

from cowest_dspy.influence.statistics import Interval
from cowest_dspy.optimizers.router import ROUTES
from cowest_dspy.optimizers.router_curve import Curve, Point
from cowest_dspy.report.charts import Chart, Mark, Series, curves, ends_of
from cowest_dspy.report.page import WrittenPage, render_page
from cowest_dspy.report.view import Section, Table, Verdict, View, print_view

HEADS = {
    "weak": "the draft is right",
    "strong": "the strong model alone is right",
    "collaborate": "the refined answer is right",
}


def describe_curve(curve: Curve) -> str:
    """Describe what the router does in one sentence: points against always collaborating, with the
    95 % interval, and what it saves."""
    router = curve.point("router")
    assert router is not None
    gap, interval = curve.against["always collaborate"]
    saved = (
        f"{100 * (1 - router.cost):.0f} % less"
        if router.cost <= 1
        else f"{100 * (router.cost - 1):.0f} % more"
    )
    return (
        f"The router scores {100 * gap:+.1f} points{_format_span(interval)} against always "
        f"collaborating, at {saved} of the strong model's cost, n {curve.n}."
    )


def print_curve(curve: Curve, console: Console | None = None) -> None:
    """Prints the sentence, the ways to route, and how good the predictions are."""
    print_view(curve_view(curve), console)


def write_curve(
    curve: Curve, folder: str | os.PathLike[str], title: str = "The router"
) -> WrittenPage:
    """Writes router_curve.json and router.html into the folder."""
    target = Path(folder)
    written = WrittenPage(target / "router_curve.json", target / "router.html")
    written.write({"schema_version": 1, **curve.to_json()}, render_page(curve_view(curve, title)))
    return written


def curve_view(curve: Curve, title: str = "The router") -> View:
    """The sections of a curve."""
    lead = (
        "The router at every trade between score and cost, on examples that it has not seen; "
        "beside "
        "it going always one way, and as many of each route at random. Whiskers: 95 % intervals. A "
        "failure scores 0."
    )
    sections = (
        Section(
            "curve",
            "Score over cost",
            (_routing(curve),),
            lead=lead,
            charts=lambda: [curve_chart(curve)],
        ),
        Section("routes", "Routes taken", (_routes(curve),)),
        Section("predictions", "Predictions", (_predictions(curve),)),
    )
    return View(
        title=title,
        subtitle="",
        verdict=Verdict((describe_curve(curve),), None),
        sections=tuple(one for one in sections if one.tables[0].rows),
        source="router_curve.json",
    )


def curve_chart(curve: Curve) -> Chart:
    """Score over cost: the router at every trade as a line, and each other way to route as a
    point."""
    over = sorted({round(point.cost, 4): point for point in curve.over}.items())
    line = [Mark(point.cost, point.score, _describe_point(point)) for _, point in over]
    shown = [point for point in curve.points if point.name != "best there was"]
    series = [Series("the router, at every trade", "s0", line)]
    for number, point in enumerate(shown, start=1):
        mark = Mark(point.cost, point.score, _describe_point(point), *ends_of(point.interval))
        series.append(Series(point.name, f"s{number}", [mark]))
    most = max([1.0, *(point.cost for point in (*curve.points, *curve.over))])
    drawing = curves(
        series,
        "Score over the strong model's cost",
        ("cost, of always collaborating", "score"),
        [*(number / 5 for number in range(5)), most],
        apart=False,
    )
    return Chart(drawing, legend=tuple((one.kind, one.name) for one in series))


def _describe_point(point: Point) -> str:
    return f"{point.name}: score {100 * point.score:.1f} % at {100 * point.cost:.0f} % of the cost"


def _routing(curve: Curve) -> Table:
    rows = []
    for point in curve.points:
        gap = curve.against.get(point.name)
        rows.append(
            (
                point.name,
                f"{100 * point.score:.1f}",
                f"{100 * point.interval.low:.1f} to {100 * point.interval.high:.1f}",
                f"{100 * point.cost:.0f}",
                "-" if gap is None else f"{100 * gap[0]:+.1f}{_format_span(gap[1])}",
            )
        )
    heads = ("way to route", "score, %", "95 %", "cost, %", "router less it")
    return Table(
        f"Score and cost ({curve.unit}) on {curve.n} held-out examples", heads, tuple(rows)
    )


def _routes(curve: Curve) -> Table:
    """The number of times that the router, and a choice by the outcome, took each route."""
    points = [point for name in ("router", "best there was") if (point := curve.point(name))]
    rows = tuple(
        (point.name, *(str(point.routes.get(route, 0)) for route in ROUTES)) for point in points
    )
    return Table("Routes taken", ("way to route", *ROUTES), rows)


def _predictions(curve: Curve) -> Table:
    fields = ("rate", "brier", "brier_of_rate", "calibration_error")
    rows = []
    for name, found in curve.about.get("heads", {}).items():
        values = (found.get(field) for field in fields)
        cells = ("-" if value is None else f"{value:.3f}" for value in values)
        rows.append((HEADS.get(name, name), *cells))
    heads = ("that", "share", "Brier", "Brier of the share", "calibration error")
    return Table("Predictions, of examples left out of the fit", heads, tuple(rows))


def _format_span(interval: Interval | None) -> str:
    return f" [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]" if interval else ""
