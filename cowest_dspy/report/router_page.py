"""A curve of the router for people: a sentence, tables, one page with a chart; and everything in it
as JSON."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup
from rich import box
from rich.console import Console
from rich.table import Table

from cowest_dspy.influence.statistics import Interval
from cowest_dspy.optimizers.router import ROUTES
from cowest_dspy.optimizers.router_curve import Curve, Point
from cowest_dspy.report.charts import Curve as Line
from cowest_dspy.report.charts import Mark, curves
from cowest_dspy.report.page import asset, page_environment, policy
from cowest_dspy.utils.files import write_whole
from cowest_dspy.utils.safe_text import visible_text

Shown = tuple[str, list[str], list[list[str]]]

HEADS = {
    "weak": "the draft is right",
    "strong": "the strong model alone is right",
    "collaborate": "the refined answer is right",
}


@dataclass(frozen=True)
class WrittenCurve:
    """Where the files are."""

    json: Path
    html: Path


def sentence(curve: Curve) -> str:
    """What the router does, in one sentence: points against always collaborating, with the 95 %
    interval, and what it saves."""
    router = curve.point("router")
    assert router is not None
    gap, interval = curve.against["always collaborate"]
    span = f" [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]" if interval else ""
    saved = (
        f"{100 * (1 - router.cost):.0f} % less"
        if router.cost <= 1
        else f"{100 * (router.cost - 1):.0f} % more"
    )
    told = f"The router scores {100 * gap:+.1f} points{span} against always collaborating"
    return f"{told}, at {saved} of the strong model's cost, n {curve.n}."


def print_curve(curve: Curve, console: Console | None = None) -> None:
    """Prints the sentence, the ways to route, and how good the predictions are."""
    console = console or Console()
    console.print(visible_text(sentence(curve), style="bold"))
    for title, heads, rows in tables(curve):
        if rows:
            table = Table(
                title=title,
                title_justify="left",
                title_style="bold",
                box=box.SIMPLE_HEAD,
                pad_edge=False,
            )
            for number, head in enumerate(heads):
                justify = "right" if number else "left"
                width = None if number else min(16, max(len(row[0]) for row in rows))
                table.add_column(
                    visible_text(head),
                    justify=justify,
                    no_wrap=bool(number),
                    overflow="fold",
                    min_width=width,
                )
            for row in rows:
                table.add_row(*map(visible_text, row))
            console.print(table)


def write_curve(
    curve: Curve, folder: str | os.PathLike[str], title: str = "The router"
) -> WrittenCurve:
    """Writes router_curve.json and router.html into the folder; the page is one file that asks the
    network for nothing."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    written = WrittenCurve(target / "router_curve.json", target / "router.html")
    document = (
        json.dumps(
            {"schema_version": 1, **curve.to_json()}, indent=1, ensure_ascii=False, allow_nan=False
        )
        + "\n"
    )
    write_whole({written.json: document, written.html: render_curve(curve, title)})
    return written


def render_curve(curve: Curve, title: str = "The router") -> str:
    """The page."""
    environment = page_environment()
    style = asset(environment, "page.css", "series.css")
    return environment.get_template("router.html.j2").render(
        title=title,
        curve=curve,
        said=sentence(curve),
        style=style,
        policy=policy([style]),
        chart=chart(curve),
        names=series_names(curve),
        tables=tables(curve),
    )


def chart(curve: Curve) -> Markup:
    """Score over cost: the router at every trade as a line, and each other way to route as a
    point."""
    over: dict[float, Point] = {round(point.cost, 4): point for point in curve.over}
    series = [
        Line("the router", "s0", [_mark(point, whisker=False) for _, point in sorted(over.items())])
    ]
    series += [
        Line(point.name, f"s{number}", [_mark(point)])
        for number, point in enumerate(curve.points, start=1)
        if point.name != "best there was"
    ]
    ticks = [number / 5 for number in range(6)]
    most = max([1.0, *(point.cost for point in (*curve.points, *curve.over))])
    titles = ("cost, of always collaborating", "score")
    return curves(
        series, "Score over the strong model's cost", titles, [*ticks[:-1], most], apart=False
    )


def tables(curve: Curve) -> list[Shown]:
    """Title, heads and rows: the ways to route, the routes taken, the predictions."""
    return [_routing(curve), _routes(curve), _predictions(curve)]


def series_names(curve: Curve) -> list[str]:
    """The names for the legend, in the order of the chart."""
    return [
        "the router, at every trade",
        *(point.name for point in curve.points if point.name != "best there was"),
    ]


def _mark(point: Point, *, whisker: bool = True) -> Mark:
    said = f"{point.name}: score {100 * point.score:.1f} % at {100 * point.cost:.0f} % of the cost"
    return Mark(
        point.cost,
        point.score,
        said,
        *((point.interval.low, point.interval.high) if whisker else (None, None)),
    )


def _routing(curve: Curve) -> Shown:
    heads = ["way to route", "score, %", "95 %", "cost, %", "router less it"]
    rows = []
    for point in curve.points:
        gap = curve.against.get(point.name)
        told = "-" if gap is None else f"{100 * gap[0]:+.1f}{_span(gap[1])}"
        interval = f"{100 * point.interval.low:.1f} to {100 * point.interval.high:.1f}"
        rows.append(
            [point.name, f"{100 * point.score:.1f}", interval, f"{100 * point.cost:.0f}", told]
        )
    return f"Score and cost ({curve.unit}) on {curve.n} held-out examples", heads, rows


def _routes(curve: Curve) -> Shown:
    """How often the router, and whoever knew best, took each route."""
    points = [point for name in ("router", "best there was") if (point := curve.point(name))]
    rows = [
        [point.name, *(str(point.routes.get(route, 0)) for route in ROUTES)] for point in points
    ]
    return "Routes taken", ["way to route", *ROUTES], rows


def _predictions(curve: Curve) -> Shown:
    rows = []
    for name, found in curve.about.get("heads", {}).items():
        numbers = [
            found.get(key) for key in ("rate", "brier", "brier_of_rate", "calibration_error")
        ]
        rows.append(
            [
                HEADS.get(name, name),
                *("-" if number is None else f"{number:.3f}" for number in numbers),
            ]
        )
    return (
        "Predictions, of examples left out of the fit",
        ["that", "share", "Brier", "Brier of the share", "calibration error"],
        rows,
    )


def _span(interval: Interval | None) -> str:
    return f" [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]" if interval else ""
