"""report.json and report.html, written together: the page shows nothing that does not follow from
the JSON beside it.

The page is one file that asks the network for nothing (page.py). Its charts are SVG that Vega-Lite
drew (charts.py), its one script pages through answers and traces. Jinja2 escapes every text: a
draft with ``<script>`` in it is shown, and not run.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from markupsafe import Markup

from cowest_dspy.errors import ReportError
from cowest_dspy.report import charts
from cowest_dspy.report.browse import MAX_ROWS, browsers, change, clipped, evenly, labelled, outcome
from cowest_dspy.report.differing import WordDiff, word_diff
from cowest_dspy.report.figures import Figures, figures
from cowest_dspy.report.hiding import hidden
from cowest_dspy.report.masking import mask_document
from cowest_dspy.report.model import Curve, PairRow, RunReport
from cowest_dspy.report.page import asset, flat, page_environment, policy, read_document
from cowest_dspy.report.sections import drawings
from cowest_dspy.report.verdict import (
    arm_notes,
    doubt_about,
    format_share,
    format_usd,
    influence_notes,
    pairs_notes,
    spoken,
)
from cowest_dspy.utils.files import write_whole
from cowest_dspy.utils.reading import file_errors

MAX_PAIRS = 30
MAX_CHANGES = 4
MAX_POINTS = 100
_MEASURES = (
    ("loss", "loss"),
    ("reward_margin", "reward margin"),
    ("reward_accuracy", "reward accuracy"),
    ("kl", "log-ratio to the reference"),
)


@dataclasses.dataclass(frozen=True)
class WrittenReport:
    """Where the two files are."""

    json: Path
    html: Path

    @classmethod
    def within(cls, folder: Path) -> WrittenReport:
        """The files of a folder, written or not."""
        return cls(folder / "report.json", folder / "report.html")


def write_report(report: RunReport, folder: str | os.PathLike[str]) -> WrittenReport:
    """Writes report.json and report.html into the folder, whole or not at all. Secrets are masked
    in both.

    The JSON holds the report and, under "numbers", what follows from it. The HTML is drawn from the
    JSON as read back.

    Raises:
        ReportError: the folder cannot be written, or the disk is full; what was there before is as
            it was.
    """
    target = Path(folder)
    facts = mask_document(report.to_json())
    shown = RunReport.from_json(facts)
    numbers = figures(shown)
    document = json.dumps(
        {**facts, "numbers": numbers.to_json()}, ensure_ascii=False, indent=1, allow_nan=False
    )
    written = WrittenReport.within(target)
    page = render_html(shown, numbers)
    with file_errors(ReportError, target):
        target.mkdir(parents=True, exist_ok=True)
        write_whole({written.json: document + "\n", written.html: page})
    return written


def read_report(path: str | os.PathLike[str]) -> RunReport:
    """The report in a run folder, or in a report.json.

    Raises:
        ReportError: there is none, or it is not one that this version reads.
    """
    return RunReport.from_json(read_document(path, "report", "cowest report RUN"))


def render_html(
    report: RunReport, numbers: Figures | None = None, *, max_rows: int = MAX_ROWS
) -> str:
    """The page; ``numbers`` are those of ``figures(report)``, where they are at hand already.

    At most ``max_rows`` answers and as many traces go into it, fewer where they are long, and it
    says when there are more. Inputs that the report's configuration hides ([report] hide) are not
    in it.
    """
    numbers = numbers or figures(report)
    report = hidden(report)
    environment = page_environment(labelled=labelled, clipped=clipped)
    style, script = asset(environment, "page.css", "report.css"), asset(environment, "report.js")
    rounds = [(f"round {number}", counts) for number, counts in numbers.influence.items()]
    return environment.get_template("report.html.j2").render(
        report=report,
        figures=numbers,
        style=style,
        script=script,
        policy=policy([style], [script]),
        tiles=_tiles(report, numbers),
        drawn=drawings(report, numbers),
        reference=report.arm(report.judged),
        tuning=_tuning(report, numbers),
        outcome=outcome,
        rounds=rounds,
        by_draft=[(group.title, group.counts) for group in numbers.by_draft],
        notes=influence_notes(report) if rounds else [],
        arm_notes=arm_notes(report),
        pairs_notes=pairs_notes(report),
        pairs=_pairs(report),
        left_out=max((line.test.left_out for line in numbers.arms if line.test), default=0),
        curves=[found for curve in report.curves if (found := _curve(curve))],
        browsers=browsers(report, max_rows),
        settings=flat(report.config),
    )


def _tiles(report: RunReport, numbers: Figures) -> list[tuple[str, str, str]]:
    """The few numbers that one looks for first: a name, the number, what belongs beside it."""
    lines = {line.name: line for line in numbers.arms}
    tiles = []
    for name in (report.judged, *report.rivals[:1]):
        if (line := lines.get(name)) and line.accuracy is not None:
            tiles.append(
                (
                    spoken(report, name).removeprefix("the "),
                    format_share(line.accuracy),
                    f"n {line.answered:,}",
                )
            )
    helped = sum(counts.helped for counts in numbers.influence.values())
    hurt = sum(counts.hurt for counts in numbers.influence.values())
    if numbers.influence:
        drafts = sum(counts.n for counts in numbers.influence.values())
        tiles.append(("drafts that helped", f"{helped:,}", f"{hurt:,} hurt, of {drafts:,}"))
    if report.pairs:
        tiles.append(("pairs", f"{report.pairs.kept:,}", f"{report.pairs.examples:,} examples"))
    if report.stages:
        tiles.append(
            ("time", _duration(numbers.totals.seconds), f"USD {format_usd(numbers.totals.usd)}")
        )
    return tiles


def _duration(seconds: float) -> str:
    """``_duration(5400)`` is ``"1 h 30 min"``."""
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min"


def _tuning(report: RunReport, numbers: Figures) -> dict[str, Any] | None:
    """What changed between the arms before and after tuning, with some examples of each kind."""
    before, after = report.arm(report.before), report.arm(report.after)
    if before is None or after is None or numbers.tuning is None:
        return None
    earlier = {answer.example_id: answer for answer in before.answers}
    both = [
        (earlier[answer.example_id], answer)
        for answer in after.answers
        if answer.example_id in earlier
    ]
    fixed = [(old, new) for old, new in both if change(old, new) > 0]
    broken = [(old, new) for old, new in both if change(old, new) < 0]
    kinds = [
        (word, evenly(changes, MAX_CHANGES), len(changes))
        for word, changes in (("Fixed", fixed), ("Broken", broken))
    ]
    return {
        "before": before,
        "after": after,
        "test": numbers.tuning,
        "doubt": doubt_about(numbers.tuning),
        "kinds": kinds,
    }


def _pairs(report: RunReport) -> list[tuple[PairRow, WordDiff]]:
    """Some pairs with what is different between their drafts."""
    rows = evenly(report.pairs.rows, MAX_PAIRS) if report.pairs else []
    return [
        (row, word_diff(clipped(row.rejected, 1200), clipped(row.chosen, 1200))) for row in rows
    ]


def _curve(
    curve: Curve,
) -> (
    tuple[str, list[tuple[str, Markup]], list[str], list[tuple[float, list[float | None]]], int]
    | None
):
    """Charts of what training logged, one per measure, and its numbers as a table; None where too
    little was logged to draw."""

    def points(field: str) -> list[charts.Point]:
        return [
            (point.step, value)
            for point in curve.points
            if (value := getattr(point, field)) is not None
        ]

    drawn = [
        (title, charts.lines(points(field), points(f"eval_{field}"), "step", title))
        for field, title in _MEASURES
    ]
    drawn = [(title, drawing) for title, drawing in drawn if drawing]
    both = [
        (field, title)
        for name, words in _MEASURES
        for field, title in ((name, words), (f"eval_{name}", f"{words}, held out"))
    ]
    used = [(field, title) for field, title in both if points(field)]
    table = [
        (point.step, [getattr(point, field) for field, _ in used])
        for point in evenly(curve.points, MAX_POINTS)
    ]
    return (
        (curve.stage, drawn, [title for _, title in used], table, len(curve.points))
        if drawn
        else None
    )
