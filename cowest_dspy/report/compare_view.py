"""A comparison to read: its verdict in words, tables, charts, and comparison.json, .csv, .md and
.html, written together. No input and no answer is on the page: some data sets are disturbing."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import Console

from cowest_dspy.influence.report import format_kinds
from cowest_dspy.report.charts import (
    SHARE,
    Chart,
    ChartRow,
    Mark,
    Series,
    curves,
    differences,
    ends_of,
    points,
)
from cowest_dspy.report.compare import (
    Numbers,
    PointNumbers,
    compute_numbers,
    format_settings,
    sweep_axis,
    sweep_series,
    varying_settings,
)
from cowest_dspy.report.compared import Comparison
from cowest_dspy.report.numbers import ArmNumbers, Extra
from cowest_dspy.report.page import (
    SERIES,
    format_document,
    read_document,
    render_page,
    settings_section,
)
from cowest_dspy.report.run_view import mark_against, score_row
from cowest_dspy.report.verdict import (
    COULD_SHOW,
    bare_p,
    comparison_verdict,
    describe_intervals,
    describe_tests,
    format_count,
    format_detectable,
    format_difference,
    format_interval,
    format_usd,
)
from cowest_dspy.report.view import Section, Table, View, print_view, view_html, view_markdown
from cowest_dspy.utils.files import write_whole
from cowest_dspy.utils.jsonable import flatten
from cowest_dspy.utils.masking import mask_document
from cowest_dspy.utils.notebook import format_plural, html_of

_LOGARITHMIC = 20  # from this ratio of largest to smallest on


@dataclasses.dataclass(frozen=True)
class WrittenComparison:
    """Where the four files are."""

    json: Path
    csv: Path
    md: Path
    html: Path


def write_comparison(comparison: Comparison, folder: str | os.PathLike[str]) -> WrittenComparison:
    """Writes comparison.json, .csv, .md and .html into the folder, all of them or none. Secrets are
    masked. The JSON holds the facts and, under "numbers", what follows from them."""
    facts = mask_document(comparison.to_json())
    shown = Comparison.from_json(facts)
    numbers = compute_numbers(shown)
    words = dataclasses.asdict(comparison_verdict(shown, numbers))
    document = {**facts, "numbers": {"verdict": words, **dataclasses.asdict(numbers)}}
    texts = {
        "json": format_document(document),
        "csv": to_csv(shown, numbers),
        "md": to_markdown(shown, numbers),
        "html": render_comparison(shown, numbers),
    }
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    paths = {kind: target / f"comparison.{kind}" for kind in texts}
    write_whole({paths[kind]: text for kind, text in texts.items()})
    return WrittenComparison(**paths)


def read_comparison(path: str | os.PathLike[str]) -> Comparison:
    """The comparison in a folder, or in a comparison.json.

    Raises:
        ReportError: there is none, or it is not one that this version reads.
    """
    return Comparison.from_json(read_document(path, "comparison", "cowest compare"))


def print_comparison(
    comparison: Comparison, console: Console | None = None, *, numbers: Numbers | None = None
) -> None:
    """Prints verdict, warnings and tables; ``numbers`` are those of
    ``compute_numbers(comparison)``, where they are at hand already."""
    print_view(comparison_view(comparison, numbers or compute_numbers(comparison)), console)


@html_of.register
def comparison_html(comparison: Comparison) -> str:
    """The comparison in a notebook; it shows no input and no answer."""
    return view_html(comparison_view(comparison, compute_numbers(comparison)))


def to_markdown(comparison: Comparison, numbers: Numbers) -> str:
    """A section with title, verdict, warnings and tables, for a page of results."""
    return view_markdown(comparison_view(comparison, numbers))


def render_comparison(comparison: Comparison, numbers: Numbers | None = None) -> str:
    """The page."""
    return render_page(comparison_view(comparison, numbers or compute_numbers(comparison)))


def comparison_view(comparison: Comparison, numbers: Numbers) -> View:
    """The sections of a comparison."""
    against = numbers.arm(comparison.against)
    sections = [_scores(comparison, numbers, against)]
    if numbers.tests and against:
        lead = (
            f"Differences to {against.title} in points, on the examples that both answered, with a "
            "95 % interval that is not corrected for the number of tests. The colour is that of "
            "the corrected test."
        )
        sections.append(
            Section(
                "differences", "Differences", lead=lead, charts=lambda: difference_chart(numbers)
            )
        )
    if numbers.extras or any(line.spread for line in numbers.arms):
        sections.append(Section("further", "Further scores and seeds", (_further(numbers),)))
    if any(line.cost.seconds is not None or line.cost.calls is not None for line in numbers.arms):
        sections.append(Section("costs", "Costs", (_costs(numbers),)))
    if numbers.sweep:
        sections.append(_sweep(numbers, against))
    sections.append(settings_section(comparison.config, comparison.versions))
    return View(
        title=comparison.title,
        subtitle=f"score: {comparison.metric}",
        created=comparison.created,
        verdict=comparison_verdict(comparison, numbers),
        sections=tuple(sections),
        source="comparison.json",
        warnings=comparison.warnings,
    )


def _scores(comparison: Comparison, numbers: Numbers, against: ArmNumbers | None) -> Section:
    dashed = f"; dashed: {against.title}" if against else ""
    dots = "; small dots: single seeds" if any(line.spread for line in numbers.arms) else ""
    lead = (
        f"The score over what each arm answered, with a 95 % interval{dashed}{dots}. A failed call "
        "or an unreadable answer is not a score: the table counts it apart, and its strict column "
        "shows what it would cost to call it wrong."
    )
    return Section(
        "scores",
        "Scores",
        (results_table(comparison, numbers),) if numbers.arms else (),
        lead=lead,
        charts=lambda: [Chart(score_chart(numbers, against))],
        missing="No arm has been evaluated yet: `cowest compare` does it.",
    )


def _sweep(numbers: Numbers, against: ArmNumbers | None) -> Section:
    axis = sweep_axis(numbers)
    dashed = f"; dashed: {against.title}" if against else ""
    return Section(
        "sweep",
        "Sweep",
        (sweep_table(numbers),),
        lead=f"The score over {axis}, with 95 % intervals{dashed}." if axis else "",
        charts=lambda: sweep_chart(numbers, axis, against) if axis else [],
    )


# Tables


def results_table(comparison: Comparison, numbers: Numbers) -> Table:
    """One line per arm: its score both ways, and its difference to ``against`` with the corrected
    p."""
    heads = ("arm", *_CORE)
    rows = tuple((line.title, *_core(line)) for line in numbers.arms)
    caption = _describe_tests(comparison, numbers)
    return Table("Arms", heads, rows, mark_against(numbers.arms), caption)


_CORE = (
    *("n", "failed", "score, %", "95 %", "strict, %"),
    *("difference [95 %]", "p (Holm)", "could show"),
)


def _core(line: ArmNumbers) -> tuple[str, ...]:
    return (
        format_count(line.n),
        format_count(line.failed),
        format_percent(line.score),
        format_interval(line.interval),
        format_percent(line.strict_score),
        "-" if line.test is None else format_difference(line.test),
        "-" if line.holm is None else bare_p(line.holm),
        "-" if line.test is None else format_detectable(line.test),
    )


def _describe_tests(comparison: Comparison, numbers: Numbers) -> str:
    """Describe score, interval and p of the results, for their caption."""
    against = numbers.arm(comparison.against)
    parts = [f"Score: {comparison.metric}, over answered; strict: failures as wrong."]
    parts.append(describe_intervals(numbers.arms))
    failed = "; ".join(
        f"{line.title}: {format_kinds(line.failures)}" for line in numbers.arms if line.failures
    )
    parts += [f"Failed: {failed}."] if failed else []
    if against is not None and numbers.tests:
        parts.append(
            f"Difference: points over {against.title}, on examples that both answered; its "
            "interval is not corrected."
        )
        over = format_plural(numbers.tests, "test")
        parts.append(f"p: {describe_tests(numbers.arms)}, two-sided, Holm-corrected over {over}.")
        parts.append(COULD_SHOW)
    return " ".join(parts)


def format_number(value: float | None) -> str:
    """A number of any size with three decimals; a dash for None.

    >>> format_number(0.41249), format_number(12.0), format_number(None)
    ('0.412', '12.000', '-')
    """
    return "-" if value is None else f"{value:.3f}"


def format_percent(share: float | None) -> str:
    """A share in percent, without the sign.

    >>> format_percent(0.875), format_percent(None)
    ('87.5', '-')
    """
    return "-" if share is None else f"{100 * share:.1f}"


def _format_extra(extra: Extra | None) -> str:
    """A further score with its interval, or the range over its seeds."""
    if extra is None or extra.mean is None:
        return "-"
    text = format_number(extra.mean)
    if extra.interval is not None:
        return f"{text} [{extra.interval.low:.3f}, {extra.interval.high:.3f}]"
    low, high = min(extra.values), max(extra.values)
    return text if len(extra.values) < 2 else f"{text} ({low:.3f} to {high:.3f})"


def _further(numbers: Numbers) -> Table:
    several = any(line.spread for line in numbers.arms)
    heads = ("arm", "seeds", *(("mean of seeds, %", "lowest", "highest", "sd") if several else ()))
    rows = []
    for line in numbers.arms:
        spread = line.spread
        shares = (
            (spread.mean, spread.low, spread.high, spread.sd)
            if spread
            else (line.score, None, None, None)
        )
        cells = tuple(map(format_percent, shares)) if several else ()
        extras = (_format_extra(line.extra.get(name)) for name in numbers.extras)
        rows.append((line.title, str(len(line.seeds)), *cells, *extras))
    caption = "[...]: 95 % interval; (...): lowest and highest seed." if numbers.extras else ""
    return Table(
        "Further scores and seeds",
        (*heads, *numbers.extras),
        tuple(rows),
        mark_against(numbers.arms),
        caption,
    )


def _costs(numbers: Numbers) -> Table:
    counts = ("answers", "calls made", "calls in all", "tokens in", "tokens out")
    rows = []
    for line in numbers.arms:
        cost = line.cost
        numbers_ = (line.asked, cost.calls, cost.calls_in_all, cost.tokens_in, cost.tokens_out)
        seconds = "-" if cost.seconds is None else f"{cost.seconds:,.1f}"
        usd = "-" if cost.calls is None and cost.usd is None else format_usd(cost.usd)
        rows.append((line.title, *map(format_count, numbers_), usd, seconds))
    caption = "All seeds together. Calls in all: made, and answered from a store."
    return Table("Costs", ("arm", *counts, "USD", "seconds"), tuple(rows), caption=caption)


def sweep_table(numbers: Numbers) -> Table:
    """One line per point of the sweep, under the settings that vary; its caption has the others."""
    keys, rows = varying_settings(numbers), []
    extras = tuple(
        name for name in numbers.extras if any(name in point.arm.extra for point in numbers.sweep)
    )
    for point in numbers.sweep:
        pairs = [count for count in point.pairs if count is not None]
        span = "-"
        if pairs and None not in point.pairs:
            low, high = min(pairs), max(pairs)
            span = format_count(low) if low == high else f"{low:,} to {high:,}"
        name = format_settings(point.settings, keys) or point.arm.title
        scores = (_format_extra(point.arm.extra.get(extra)) for extra in extras)
        rows.append((name, str(len(point.arm.seeds)), span, *_core(point.arm), *scores))
    first = numbers.sweep[0].settings
    same = format_settings(first, [key for key in first if key not in keys])
    fixed = f"The same everywhere: {same}. " if same else ""
    caption = (
        f"{fixed}p is corrected over the sweep. The best of many settings owes a part of "
        "its lead to chance."
    )
    heads = ("settings", "seeds", "pairs", *_CORE, *extras)
    return Table("Sweep", heads, tuple(rows), caption=caption)


# Charts


def score_chart(numbers: Numbers, against: ArmNumbers | None) -> Markup:
    """The score of each arm over 0 to 100 %, small dots for single seeds, and a line at
    ``against``."""
    line = None if against is None else against.score
    return points([score_row(arm) for arm in numbers.arms], "Score of each arm", SHARE, line=line)


def difference_chart(numbers: Numbers) -> list[Chart]:
    """The difference of each tested arm to ``against``, in points; the colour is the finding after
    correction."""
    rows = list[ChartRow]()
    for arm in numbers.arms:
        test = arm.test
        if test is None or test.difference is None:
            continue
        kind = {1: "helped", -1: "hurt"}.get(arm.finding or 0, "plain")
        text = format_difference(test)
        low, high = (None if end is None else 100 * end for end in ends_of(test.interval))
        described = f"{arm.title}: {text} points"
        rows.append(ChartRow(arm.title, 100 * test.difference, described, low, high, kind, text))
    legend = (("helped", "better"), ("plain", "not distinguishable"), ("hurt", "worse"))
    drawing = differences(rows, "Differences in points", "points", unit=100.0)
    return [Chart(drawing, legend=legend)]


def sweep_chart(numbers: Numbers, axis: str, against: ArmNumbers | None) -> list[Chart]:
    """Score over one setting: a line per series with intervals, and a line at ``against``. From
    20-fold on x is logarithmic."""
    values = sorted({float(point.settings[axis]) for point in numbers.sweep})
    drawn = [
        Series(
            name,
            f"s{index % SERIES}",
            [_sweep_mark(point, axis) for point in found if point.arm.score is not None],
        )
        for index, (name, found) in enumerate(sweep_series(numbers, axis).items())
    ]
    if len(values) < 2 or not any(one.marks for one in drawn):
        return []
    label = "; ".join(
        f"{c.name}: {', '.join(f'{mark.y:.1f} % at {mark.x:g}' for mark in c.marks)}" for c in drawn
    )
    level = None if against is None or against.score is None else 100 * against.score
    logarithmic = values[0] > 0 and values[-1] / values[0] >= _LOGARITHMIC
    title = f"{axis}, logarithmic" if logarithmic else axis
    drawing = curves(
        drawn, label, (title, "score, %"), values, logarithmic=logarithmic, level=level
    )
    return [Chart(drawing, legend=tuple((one.kind, one.name) for one in drawn))]


def _sweep_mark(point: PointNumbers, axis: str) -> Mark:
    ends = (None if end is None else 100 * end for end in ends_of(point.arm.interval))
    where = format_settings(point.settings, list(point.settings))
    text = f"{where}: {format_percent(point.arm.score)} % [{format_interval(point.arm.interval)}]"
    return Mark(float(point.settings[axis]), 100 * (point.arm.score or 0.0), text, *ends)


# CSV


def to_csv(comparison: Comparison, numbers: Numbers) -> str:
    """One line per arm and per point of the sweep, with the fields that "numbers" in
    comparison.json has, those inside others with a dot (``interval.low``). Numbers in full
    precision, empty where there is none; several values with a space between. A text that a
    spreadsheet would take for a formula has an apostrophe before it."""
    rows = [{"kind": "arm", **_columns(dataclasses.asdict(line))} for line in numbers.arms]
    for point in numbers.sweep:
        settings = json.dumps(point.settings, ensure_ascii=False, default=str)
        pairs = " ".join(str(count) for count in point.pairs if count is not None)
        arm = _columns(dataclasses.asdict(point.arm))
        rows.append({"kind": "sweep", **arm, "settings": settings, "pairs": pairs})
    stream = io.StringIO()
    heads = dict.fromkeys(head for row in rows for head in row) or ["kind", "name"]
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([_escape_formula(head) for head in heads])
    writer.writerows([_escape_formula(row.get(head)) for head in heads] for row in rows)
    return stream.getvalue()


def _columns(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values by dotted names; what is None is left out."""
    return {
        name: " ".join("-" if one is None else str(one) for one in value)
        if isinstance(value, tuple)
        else value
        for name, value in flatten(values)
        if value not in (None, {})
    }


def _escape_formula(value: Any) -> Any:
    formula = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{value}" if formula else value
