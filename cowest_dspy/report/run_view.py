"""The sections of a run's report: tables, charts and notes, each from the numbers in
report.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup
from rich.console import Console

from cowest_dspy.optimizers.rounds import Gain
from cowest_dspy.report import charts
from cowest_dspy.report.charts import Axis, Chart, ChartRow, ends_of
from cowest_dspy.report.facts import LOGGED, Curve, RunReport
from cowest_dspy.report.figures import Figures, figures
from cowest_dspy.report.numbers import ArmNumbers, InfluenceCounts, sample_evenly
from cowest_dspy.report.verdict import (
    COULD_SHOW,
    arm_notes,
    bare_p,
    describe_intervals,
    describe_tests,
    explain_chance,
    format_count,
    format_detectable,
    format_interval,
    format_p,
    format_points,
    format_share,
    format_usd,
    influence_notes,
    pairs_notes,
    smallest_difference,
)
from cowest_dspy.report.view import Section, Table, View, print_view, view_html
from cowest_dspy.utils.notebook import html_of

MAX_POINTS = 100
_KINDS = ("helped", "same", "hurt", "failed")
_LEGEND = (*((kind, kind) for kind in _KINDS[:3]), ("failed", "failed, not scored"))
_TUNING = {
    "helped": "fixed",
    "plain": "right both times",
    "failed": "no better, no worse, and not right",
    "hurt": "broken",
}


def print_report(report: RunReport, console: Console | None = None) -> None:
    """Prints verdict, warnings, arms, influence, rounds, pairs and costs; parts that are not there
    yet are left out."""
    print_view(run_view(report), console)


@html_of.register
def report_html(report: RunReport) -> str:
    """The report in a notebook; it shows no input and no answer."""
    return view_html(run_view(report))


def run_view(report: RunReport, numbers: Figures | None = None) -> View:
    """The sections of a run; ``numbers`` are those of ``figures(report)``, where they are at hand
    already. What reads examples (changes, pairs, answers, traces) is added by page.py."""
    numbers = numbers or figures(report)
    titles = {stage.name: stage.shown_name for stage in report.stages}
    sections = (
        _arms(report, numbers),
        _tuning(report, numbers),
        _rounds(report),
        _cycle(report),
        _influence(report, numbers),
        _pairs(report),
        _training(report.curves, titles),
        _stages(report, numbers),
    )
    return View(
        title=report.title,
        subtitle=f"seed {report.seed}",
        created=report.created,
        verdict=numbers.verdict,
        sections=tuple(section for section in sections if section is not None),
        source="report.json",
        warnings=report.warnings,
    )


def _arms(report: RunReport, numbers: Figures) -> Section:
    lines, reference = numbers.arms, report.arm(report.main_arm)
    heads = ("arm", "n", "failed", "correct", "score", "95 %", "strict")
    caption = ""
    if reference:
        heads += ("+/-", "p", "could show")
        left_out = max((line.test.left_out for line in lines if line.test), default=0)
        left = f" (up to {left_out:,} left out: failed or missing)" if left_out else ""
        tests = describe_tests(lines)
        caption = (
            f"Score: over answered; strict: failures as wrong. {describe_intervals(lines)} +/-: "
            f"what only this arm / only {reference.title} gets right. p: "
            f"{tests and f'{tests}, '}two-sided, on examples that both have a score for{left}. "
            f"{COULD_SHOW}"
        )
    table = Table(
        "Arms",
        heads,
        tuple(_arm_cells(line, reference is not None) for line in lines),
        mark_against(lines),
        caption,
        notes=tuple(line.note for line in lines),
    )
    return Section(
        "arms",
        "Arms",
        (table,) if lines else (),
        tuple(arm_notes(report)),
        "Score on held-out examples, with a 95 % interval. A failed call or an unreadable answer "
        "is not a score: it is counted apart, and the strict column shows what it would cost to "
        "call it wrong.",
        lambda: [Chart(charts.bars([score_row(line) for line in lines], "Score of each arm"))],
        "No arm has been evaluated yet: `cowest evaluate` does it.",
    )


def mark_against(lines: Sequence[ArmNumbers]) -> frozenset[int]:
    """The row of the arm that the others are tested against."""
    return frozenset(place for place, line in enumerate(lines) if line.is_against)


def _arm_cells(line: ArmNumbers, tested: bool) -> tuple[str, ...]:
    cells = (
        line.title,
        format_count(line.answered),
        format_count(line.failed),
        format_count(line.correct),
        format_share(line.score),
        format_interval(line.interval),
        format_share(line.strict_score),
    )
    if not tested:
        return cells
    test = line.test
    if test is None:
        return (*cells, "", "", "")
    changed = f"+{test.higher:,} -{test.lower:,}"
    return (*cells, changed, bare_p(test.p), format_detectable(test))


def score_row(line: ArmNumbers) -> ChartRow:
    """An arm's score with its interval, and the scores of single seeds where it has several."""
    if line.score is None:
        return ChartRow(line.title, None, f"{line.title}: no answers", text="no answers")
    right = f"n {line.answered:,}"
    if line.correct is not None:
        right = f"{line.correct:,} of {line.answered:,} right"
    score = format_share(line.score)
    return ChartRow(
        line.title,
        line.score,
        f"{line.title}: {score}, 95 % {format_interval(line.interval)}, {right}",
        *ends_of(line.interval),
        kind="accent" if line.is_against else "plain",
        text=score,
        dots=tuple(one for one in line.seed_scores if one is not None) if line.spread else (),
    )


def _tuning(report: RunReport, numbers: Figures) -> Section:
    before, after, test = report.arm(report.before), report.arm(report.after), numbers.tuning
    missing = (
        "Nothing to compare yet: the arms before and after tuning have not both been evaluated. "
        "`cowest tune`, then `cowest evaluate`."
    )
    if before is None or after is None or test is None:
        return Section("tuning", "Tuning", missing=missing)
    left = f", {test.left_out:,} left out: failed or missing" if test.left_out else ""
    why = explain_chance(test, smallest_difference(report.config))
    reason = f"; {why}" if why else ""
    lead = (
        f"What tuning fixed and broke, from “{before.title}” to “{after.title}”: "
        f"{format_points(test)}, {format_p(test.p)}, on {test.n:,} examples{left}{reason}."
    )
    return Section("tuning", "Tuning", lead=lead, charts=lambda: _tuning_chart(numbers))


def _tuning_chart(numbers: Figures) -> list[Chart]:
    """The examples that both arms have a score for, by what tuning changed."""
    test = numbers.tuning
    if test is None or not test.n:
        return []
    rest = test.n - numbers.right_both - test.higher - test.lower
    counts = zip(_TUNING, (test.higher, numbers.right_both, max(rest, 0), test.lower), strict=True)
    label = (
        f"{test.higher} fixed, {numbers.right_both} right both times, {rest} no better and no "
        f"worse, {test.lower} broken"
    )
    drawing = charts.shares(
        [("before and after tuning", f"n {test.n:,}", [*counts])], label, _TUNING
    )
    return [Chart(drawing, legend=tuple(_TUNING.items()))]


def _rounds(report: RunReport) -> Section | None:
    if not report.rounds:
        return None
    rows = tuple(
        (
            f"round {row.number}",
            format_count(row.pairs),
            format_count(row.replayed),
            row.gain.span if row.gain else "-",
            format_count(row.gain.n if row.gain else 0),
            row.outcome,
        )
        for row in report.rounds
    )
    return Section(
        "rounds",
        "Rounds",
        (Table("Rounds", ("round", "pairs", "replayed", "gain, dev split", "n", "outcome"), rows),),
        tuple(f"Round {row.number} {row.outcome}: {row.reason}." for row in report.rounds),
        "Each round collects drafts of the weak model that the last one left, tunes it on their "
        "pairs, and is accepted only if the paired interval of the gain on the dev split lies "
        "where [rounds] asks for it.",
        lambda: _gains(
            "Gain of each round on the dev split",
            [(f"round {row.number}", row.gain, row.accepted) for row in report.rounds],
        ),
    )


def _cycle(report: RunReport) -> Section | None:
    if not report.steps:
        return None
    rows = tuple(
        (
            f"{row.number} {row.name}",
            "-" if row.score is None else f"{row.score:.3f}",
            format_count(row.n),
            format_count(row.failed),
            row.gain.span if row.gain else "-",
            "yes" if row.best else "",
        )
        for row in report.steps
    )
    heads = ("step", "score", "n", "failed", "gain over the start", "best so far")
    return Section(
        "cycle",
        "Cycle",
        (Table("Cycle, on the dev split", heads, rows),),
        lead="Every candidate on the same dev split; a step goes on from the best so far. The best "
        "was chosen on that split: what counts are the arms above, on questions that no step has "
        "seen.",
        charts=lambda: _gains(
            "Gain of each step over the start, on the dev split",
            [(f"{row.number} {row.name}", row.gain, row.best) for row in report.steps],
        ),
    )


def _gains(label: str, rows: Sequence[tuple[str, Gain | None, bool]]) -> list[Chart]:
    """A point with its interval for each round or step that has a measured gain; coloured, where it
    was taken."""
    drawn = [
        ChartRow(
            name,
            gain.mean,
            f"{name}: {gain.span}",
            gain.low,
            gain.high,
            "helped" if taken else "plain",
            gain.span,
        )
        for name, gain, taken in rows
        if gain and gain.mean is not None
    ]
    return [Chart(charts.differences(drawn, label, "gain in score"))] if drawn else []


def _influence(report: RunReport, numbers: Figures) -> Section:
    rounds = {f"round {number}": counts for number, counts in numbers.influence.items()}
    tables = []
    if rounds:
        tables.append(_influence_table("Influence of drafts on the strong model", "round", rounds))
    if numbers.by_draft:
        tables.append(_influence_table("Did right drafts help?", "draft", numbers.by_draft))
    return Section(
        "influence",
        "Influence",
        tuple(tables),
        tuple(influence_notes(report)) if rounds else (),
        "Score of the strong model's answer with the draft, less its score alone: from -1, the "
        "draft spoiled a right answer, to +1, it made a wrong one right. Intervals: bootstrap over "
        "examples.",
        lambda: _influence_charts(report, numbers, rounds),
        "No drafts have been measured yet: `cowest collect` does it.",
    )


def _influence_table(title: str, first: str, groups: Mapping[str, InfluenceCounts]) -> Table:
    heads = (first, "drafts", *_KINDS, "mean", "95 %", "harm rate")
    rows = tuple(
        (
            name,
            format_count(counts.n),
            *(format_count(getattr(counts, kind)) for kind in _KINDS),
            "-" if counts.mean is None else f"{counts.mean:+.3f}",
            "-"
            if counts.interval is None
            else f"{counts.interval.low:+.3f} to {counts.interval.high:+.3f}",
            format_share(counts.harm_rate),
        )
        for name, counts in groups.items()
    )
    return Table(title, heads, rows)


def _influence_charts(
    report: RunReport, numbers: Figures, rounds: Mapping[str, InfluenceCounts]
) -> list[Chart]:
    def groups(found: Mapping[str, InfluenceCounts]) -> list[Any]:
        return [
            (name, f"n {counts.n:,}", [(kind, getattr(counts, kind)) for kind in _KINDS])
            for name, counts in found.items()
        ]

    band = "noise floor: what a mean stays below when drafts do nothing"
    found = [
        Chart(
            charts.shares(
                groups(rounds), "Drafts that helped, changed nothing, hurt or failed, by round"
            ),
            "What drafts did, by round",
            _LEGEND,
        ),
        Chart(
            _means(rounds, numbers.mean_noise or 0.0),
            "Mean influence, by round",
            (("band", band),) if report.noise else (),
        ),
        Chart(
            charts.shares(
                groups(numbers.by_draft),
                "What drafts did, by how right they were themselves",
            ),
            "Did right drafts help?",
        ),
    ]
    for number, bins in numbers.distribution.items():
        if numbers.graded:
            columns = [(one.low, one.high, one.count) for one in bins]
            drawing = charts.histogram(columns, f"Influences in round {number}")
            found.append(Chart(drawing, f"Influences of the drafts of round {number}"))
    return [chart for chart in found if chart.drawing]


def _means(rounds: Mapping[str, InfluenceCounts], floor: float) -> Markup:
    """The mean influence of each round with its interval, on the band of what the strong model's
    own sampling may make."""
    rows = list[ChartRow]()
    for name, counts in rounds.items():
        if counts.mean is None:
            continue
        low, high = ends_of(counts.interval)
        text = f"{counts.mean:+.3f}" + (f" [{low:+.3f}, {high:+.3f}]" if counts.interval else "")
        kind = "accent" if low is not None and low > floor else "plain"
        rows.append(
            ChartRow(name, counts.mean, f"{name}: mean influence {text}", low, high, kind, text)
        )
    return charts.differences(rows, "Mean influence by round", "mean influence", floor=floor)


def _pairs(report: RunReport) -> Section:
    missing = "No pairs have been made yet: `cowest pairs` does it."
    pairs = report.pairs
    if pairs is None:
        return Section("pairs", "Pairs", missing=missing)
    dropped = sorted(pairs.dropped.items(), key=lambda item: (-item[1], item[0]))
    rows = (
        (f"kept, from {pairs.examples:,} examples", format_count(pairs.kept)),
        *((f"dropped: {reason}", format_count(count)) for reason, count in dropped),
    )
    table = Table("Preference pairs", ("what became of them", "count"), rows)
    return Section("pairs", "Pairs", (table,), tuple(pairs_notes(report)))


def _training(curves: Mapping[str, Curve], titles: Mapping[str, str]) -> Section:
    drawn = [
        (titles.get(stage, stage), curve)
        for stage, curve in curves.items()
        if _logged_names(curve, 2)
    ]
    return Section(
        "curves",
        "Training",
        tuple(_curve_table(stage, curve) for stage, curve in drawn),
        charts=lambda: [chart for stage, curve in drawn for chart in _curve_charts(stage, curve)],
        missing="No training curves: nothing has been trained yet (`cowest tune`), or too few "
        "steps were logged.",
    )


def _logged_names(curve: Curve, least: int = 1) -> dict[str, str]:
    """The numbers of a curve that were logged at least so often, by name, with their titles."""
    titles = {
        name: words
        for own, title in LOGGED.items()
        for name, words in ((own, title), (f"eval_{own}", f"{title}, held out"))
    }
    return {name: title for name, title in titles.items() if len(_points(curve, name)) >= least}


def _points(curve: Curve, name: str) -> list[charts.Point]:
    return [(row["step"], row[name]) for row in curve if name in row]


def _curve_charts(stage: str, curve: Curve) -> list[Chart]:
    """A chart per number, training and held out in one."""
    legend = (("accent", "training"), ("second", "held out, dashed"))
    found = list[Chart]()
    for name, title in LOGGED.items():
        training, held_out = _points(curve, name), _points(curve, f"eval_{name}")
        if drawing := charts.lines(training, held_out, "step", title):
            found.append(Chart(drawing, f"{stage}: {title}", legend if len(held_out) > 1 else ()))
    return found


def _curve_table(stage: str, curve: Curve) -> Table:
    used, shown = _logged_names(curve), sample_evenly(curve, MAX_POINTS)
    rows = tuple(
        (f"{row['step']:g}", *(f"{row[name]:.4g}" if name in row else "-" for name in used))
        for row in shown
    )
    few = f": {len(shown)} of {len(curve):,} points, evenly spaced"
    title = f"Numbers of {stage}{few if len(shown) < len(curve) else ''}"
    return Table(title, ("step", *used.values()), rows, folded=True)


def _stages(report: RunReport, numbers: Figures) -> Section:
    missing = "No stage has been finished yet."
    if not report.stages:
        return Section("stages", "Cost", missing=missing)

    def cells(name: str, one: Any) -> tuple[str, ...]:
        counts = (one.calls, one.cached_calls, one.tokens_in, one.tokens_out)
        peak = one.peak_memory_bytes
        return (
            name,
            f"{one.seconds:,.1f}",
            *map(format_count, counts),
            format_usd(one.usd),
            "-" if peak is None else f"{peak / 2**30:.2f} GiB",
        )

    heads = ("stage", "seconds", "calls", "from store", "tokens in", "tokens out", "USD", "memory")
    rows = (
        *(cells(stage.shown_name, stage) for stage in report.stages),
        cells("total", numbers.totals),
    )
    table = Table(
        "Cost of each stage",
        heads,
        rows,
        frozenset({len(rows) - 1}),
        notes=(*(stage.note for stage in report.stages), ""),
    )
    return Section(
        "stages",
        "Cost",
        (table,),
        lead="What each stage took. Calls that the run's store answered cost nothing.",
        charts=lambda: _stage_charts(report),
    )


def _stage_charts(report: RunReport) -> list[Chart]:
    """One chart per measure that some stage has: seconds, calls, dollars; stages that have none of
    it are left out."""
    measures = (
        ("seconds", lambda stage: stage.seconds, lambda value: f"{value:,.1f}"),
        ("calls made", lambda stage: stage.calls, lambda value: f"{value:,}"),
        ("US dollars", lambda stage: stage.usd, format_usd),
    )
    found = []
    for title, value_of, words in measures:
        known = [(stage.shown_name, value) for stage in report.stages if (value := value_of(stage))]
        if not known:
            continue
        axis = Axis(0.0, float(max(value for _, value in known)), (), "''")
        rows = [
            ChartRow(
                name, value, f"{name}: {words(value)} {title}", kind="accent", text=words(value)
            )
            for name, value in known
        ]
        drawing = charts.bars(rows, f"{title} of each stage", axis)
        found.append(Chart(drawing, f"{title[0].upper()}{title[1:]}"))
    return found
