"""The report in a terminal: the verdict first, then Rich tables; plain text without colour where it
is piped."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cowest_dspy.report.model import PairsSummary, RoundRow, RunReport, Stage, StepRow
from cowest_dspy.report.numbers import ArmLine, InfluenceCounts, arm_table, influence_by_round
from cowest_dspy.report.verdict import (
    Verdict,
    arm_notes,
    bare_p,
    format_share,
    format_usd,
    influence_notes,
    pairs_notes,
    verdict,
)
from cowest_dspy.utils.safe_text import visible_text


def print_report(report: RunReport, console: Console | None = None) -> None:
    """Prints verdict, warnings, arms, influence, pairs and stages; parts that are not there yet are
    left out."""
    console = console or Console()
    found = verdict(report)
    for sentence in found.sentences:
        console.print(visible_text(sentence, style=_verdict_style(found)))
    for warning in report.warnings:
        console.print(visible_text(f"Warning: {warning}", style="yellow"))
    if report.arms:
        console.print(_arms(report))
        _print_notes(console, arm_notes(report))
    if report.influence:
        console.print(_influence(influence_by_round(report.influence)))
        _print_notes(console, influence_notes(report))
    if report.pairs is not None:
        console.print(_pairs(report.pairs))
        _print_notes(console, pairs_notes(report))
    if report.rounds:
        console.print(_rounds(report.rounds))
        for row in report.rounds:
            console.print(visible_text(str(row)))
    if report.steps:
        console.print(_steps(report.steps))
    if report.stages:
        console.print(_stages(report.stages))


def _print_notes(console: Console, notes: list[str]) -> None:
    for note in notes:
        console.print(visible_text(note))


def _verdict_style(found: Verdict) -> str:
    return {True: "bold green", False: "bold yellow", None: "bold"}[found.good]


def _table(title: str, *columns: str) -> Table:
    """The first column is text, the others are numbers."""
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
    )
    table.add_column(visible_text(columns[0]), overflow="fold")
    for column in columns[1:]:
        table.add_column(visible_text(column), justify="right", no_wrap=True)
    return table


def _arms(report: RunReport) -> Table:
    lines = arm_table(report)
    reference = next((line.title for line in lines if line.is_reference), None)
    columns = ["arm", "n", "failed", "correct", "accuracy", "95 %"]
    if reference:
        columns += ["+/-", "p"]
    table = _table("Arms", *columns)
    table.columns[
        0
    ].min_width = 14  # titles wrap at words, where Rich would squeeze them to a letter
    for line in lines:
        table.add_row(
            *_arm_cells(line, tested=reference is not None),
            style="bold" if line.is_reference else "",
        )
    if reference:
        table.caption = visible_text(
            f"accuracy over answered; +/-: what only this arm / only {reference} gets right; p: "
            "paired exact test"
        )
        table.caption_justify = "left"
    return table


def _arm_cells(line: ArmLine, *, tested: bool) -> list[Text]:
    correct = "-" if line.correct is None else str(line.correct)
    cells = [line.title, str(line.answered), str(line.failed), correct, format_share(line.accuracy)]
    cells.append(
        "-"
        if line.interval is None
        else f"{100 * line.interval.low:.0f}-{100 * line.interval.high:.0f}"
    )
    if tested:
        test = line.test
        cells += [f"+{test.fixed} -{test.broken}", bare_p(test.p)] if test else ["", ""]
    return [visible_text(cell) for cell in cells]


def _influence(rounds: dict[int, InfluenceCounts]) -> Table:
    columns = ("round", "drafts", "helped", "same", "hurt", "failed", "mean", "95 %", "harm")
    table = _table("Influence of drafts on the strong model", *columns)
    table.columns[0].min_width = len(columns[0])
    for number, counts in rounds.items():
        mean = "-" if counts.mean is None else f"{counts.mean:+.2f}"
        span = (
            "-"
            if counts.interval is None
            else f"{counts.interval.low:+.2f} to {counts.interval.high:+.2f}"
        )
        numbers = (counts.n, counts.helped, counts.same, counts.hurt, counts.failed)
        harm = "-" if counts.harm_rate is None else f"{100 * counts.harm_rate:.0f} %"
        table.add_row(str(number), *map(str, numbers), mean, span, harm)
    return table


def _pairs(pairs: PairsSummary) -> Table:
    table = _table("Preference pairs", "what became of them", "count")
    table.add_row(visible_text(f"kept, from {pairs.examples} examples"), str(pairs.kept))
    for reason, count in sorted(pairs.dropped.items(), key=lambda item: (-item[1], item[0])):
        table.add_row(visible_text(f"dropped: {reason}"), str(count))
    return table


def _rounds(rounds: tuple[RoundRow, ...]) -> Table:
    table = _table("Rounds", "round", "pairs", "replayed", "gain on the dev split", "n", "outcome")
    for row in rounds:
        table.add_row(
            str(row.number), str(row.pairs), str(row.replayed), row.gain, str(row.n), row.outcome
        )
    return table


def _steps(steps: tuple[StepRow, ...]) -> Table:
    table = _table(
        "Cycle, on the dev split",
        "step",
        "score",
        "n",
        "failed",
        "gain over the start",
        "best so far",
    )
    for row in steps:
        score = "-" if row.score is None else f"{row.score:.3f}"
        name = f"{row.number} {row.name}"
        table.add_row(
            visible_text(name),
            score,
            str(row.n),
            str(row.failed),
            row.gain,
            "yes" if row.best else "",
        )
    return table


def _stages(stages: tuple[Stage, ...]) -> Table:
    table = _table(
        "Stages",
        "stage",
        "seconds",
        "calls",
        "cached",
        "tokens\nin",
        "tokens\nout",
        "USD",
        "peak\nmemory",
    )
    for stage in stages:
        numbers = (stage.calls, stage.cached_calls, stage.tokens_in, stage.tokens_out)
        peak = (
            "-" if stage.peak_memory_bytes is None else f"{stage.peak_memory_bytes / 2**30:.2f} GiB"
        )
        counts = ["-" if number is None else f"{number:,}" for number in numbers]
        table.add_row(
            visible_text(stage.name), f"{stage.seconds:,.1f}", *counts, format_usd(stage.usd), peak
        )
    return table
