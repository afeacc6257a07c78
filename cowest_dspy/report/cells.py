"""A report in a notebook: verdict, arms, influence, rounds, pairs and costs. It shows no input and
no answer."""

from __future__ import annotations

from cowest_dspy.influence.report import format_kinds
from cowest_dspy.report.model import RunReport
from cowest_dspy.report.numbers import ArmLine, arm_table, influence_by_round
from cowest_dspy.report.verdict import bare_p, format_interval, format_share, format_usd, verdict
from cowest_dspy.store.usage import total_usd
from cowest_dspy.utils import notebook
from cowest_dspy.utils.notebook import Markup, html_of

MOST = 12


@html_of.register
def report_view(report: RunReport) -> str:
    """The report as a fragment of HTML, small enough for a cell."""
    return notebook.view(
        report.title,
        *verdict(report).sentences,
        *(f"Warning: {warning}" for warning in report.warnings),
        _arms(report),
        *_influence(report),
        *(notebook.line(str(row)) for row in report.rounds[:MOST]),
        _pairs(report),
        _costs(report),
        notebook.line(f"{report.created}, seed {report.seed}", soft=True),
    )


def _arms(report: RunReport) -> Markup | None:
    lines = arm_table(report)
    if not lines:
        return None
    heads = ("arm", "", "n", "failed", "accuracy", "95 %", "+/-", "p")
    return notebook.table(heads, [_arm(line) for line in lines], texts=2, most=MOST)


def _arm(line: ArmLine) -> tuple[object, ...]:
    low, high = (line.interval.low, line.interval.high) if line.interval else (None, None)
    test = line.test
    title = notebook.tag("strong", line.title) if line.is_reference else line.title
    numbers = (
        f"{line.answered:,}",
        f"{line.failed:,}",
        format_share(line.accuracy),
        format_interval(line.interval),
    )
    tested = (f"+{test.fixed} -{test.broken}", bare_p(test.p)) if test else ("", "")
    return title, notebook.interval_bar(line.accuracy, low, high), *numbers, *tested


def _influence(report: RunReport) -> list[Markup]:
    parts = list[Markup]()
    for number, counts in influence_by_round(report.influence).items():
        mean = (
            "no draft has an influence"
            if counts.mean is None
            else f"mean influence {counts.mean:+.3f}"
        )
        span = (
            f", 95 % {counts.interval.low:+.3f} to {counts.interval.high:+.3f}"
            if counts.interval
            else ""
        )
        named = {
            "helped": counts.helped,
            "same": counts.same,
            "hurt": counts.hurt,
            "failed": counts.failed,
        }
        failed = f"; failed: {format_kinds(counts.failures)}" if counts.failures else ""
        parts += [
            notebook.line(f"Drafts of round {number}: {counts.n:,}, {mean}{span}{failed}"),
            notebook.shares(named),
        ]
    return parts[: 2 * MOST]


def _pairs(report: RunReport) -> str | None:
    pairs = report.pairs
    if pairs is None:
        return None
    dropped, examples = notebook.counted(pairs.dropped), notebook.several(pairs.examples, "example")
    return f"{notebook.several(pairs.kept, 'preference pair')} of {examples}" + (
        f"; {dropped}" if dropped else ""
    )


def _costs(report: RunReport) -> str | None:
    if not report.stages:
        return None
    calls = sum(stage.calls or 0 for stage in report.stages)
    tokens = sum((stage.tokens_in or 0) + (stage.tokens_out or 0) for stage in report.stages)
    usd = format_usd(total_usd(stage.usd for stage in report.stages if stage.calls))
    seconds = sum(stage.seconds for stage in report.stages)
    return (
        f"{notebook.several(len(report.stages), 'stage')}: {calls:,} calls, {tokens:,} tokens, "
        f"{usd} USD, {seconds:,.0f} s"
    )
