"""The verbs `cowest runs` and `cowest watch`: what has become of runs, and what one of them is
doing. They only read."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from cowest_dspy.cli.live import console
from cowest_dspy.errors import StoreError
from cowest_dspy.utils.interrupts import signal_of, telling
from cowest_dspy.utils.safe_text import visible

if TYPE_CHECKING:
    from cowest_dspy.report.runs import RunLine

STYLES = {"running": "green", "failed": "bold red", "damaged": "bold red", "stopped": "yellow"}


def runs(
    folder: Annotated[
        Path, typer.Argument(help="Where runs are looked for; or one run's folder.")
    ] = Path("runs"),
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON list instead of a table.")
    ] = False,
) -> None:
    """Lists runs: state, task, stage, calls, what they cost, when they last changed, and the
    verdict in short.

    States: running (with the process that works on it), finished, stopped (by Ctrl-C, [budget] or a
        kill: the same command goes on), failed (with the error), empty, damaged (`cowest doctor
        --repair RUN` saves what can be read), unknown (earlier version). Nothing is locked or
        written, so that it can be typed while runs work. What runs a TOML file: `cowest cycle
        --help`.

    Example: `cowest runs`, then `cowest watch runs/handbook`
    """
    from cowest_dspy.report.runs import look, run_folders

    found = [look(one) for one in run_folders(folder)]
    if as_json:
        print(visible(json.dumps([asdict(one) for one in found], ensure_ascii=False, indent=2)))
        return
    if not found:
        what = "there is no run in it" if folder.is_dir() else "there is no such folder"
        start = "Name another folder, or start a run: cowest cycle TASK.toml BACKEND.toml"
        console.print(f"{folder}: {what}. {start}", markup=False, soft_wrap=True)
        return
    _show(found, folder)


def watch(
    run: Annotated[
        Path, typer.Argument(help="The run's folder; it need not be there yet.", show_default=False)
    ],
    once: Annotated[bool, typer.Option("--once", help="Show its state now, and end.")] = False,
) -> None:
    """Follows a run that another process works on: stages, bar, time left, calls per second, spend,
    failures, the best score.

    Start it before the run, or at any time. It ends when the run ends, with the verdict, or says
    that the run was stopped or killed and which command goes on. It only reads: Ctrl-C ends the
    watching and never the run. Exit code 0: the run has finished;
    1: it has failed, or was stopped. A run is started from TOML files, by `cowest cycle` and
        others.

    Example: `cowest watch runs/handbook`, in another terminal than `cowest cycle`
    """
    from cowest_dspy.cli.live.following import Following
    from cowest_dspy.report.runs import is_run, look, meant
    from cowest_dspy.store.progress import read_snapshot

    following, now = Following(run, console), read_snapshot(run)
    if now is None and is_run(run):
        line = look(run)
        console.print(
            f"{run}: {line.state}. {line.verdict or line.detail}", markup=False, soft_wrap=True
        )
        raise typer.Exit(0 if line.state == "finished" else 1)
    if once:
        if now is None:
            known = "`cowest runs` lists those in runs/; without --once it is waited for."
            raise StoreError(f"There is no run in {run}.{meant(run)} {known}")
        following.once(now)
        return
    try:
        with telling(lambda text: None):
            last = following.until_the_end()
    except KeyboardInterrupt as stop:
        print("\nNo longer watched. The run itself is as it was.", file=sys.stderr)
        raise typer.Exit(128 + signal_of(stop)) from None
    raise typer.Exit(0 if last.state == "finished" else 1)


def _show(found: list[RunLine], folder: Path) -> None:
    """A table in a terminal; elsewhere lines with tabs between the cells, none of them cut."""
    heads = ("run", "state", "task", "stage", "calls", "USD", "changed", "verdict or what is wrong")
    rows = [_cells(one, folder) for one in found]
    if not console.is_terminal:
        print(*(visible("\t".join(row)) for row in (heads, *rows)), sep="\n")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, head in enumerate(heads):
        justify = "right" if head in ("calls", "USD") else "left"
        table.add_column(Text(head), justify=justify, overflow="fold", no_wrap=4 <= number < 7)
    for one, row in zip(found, rows, strict=True):
        cells = [Text(cell) for cell in row]
        cells[1].stylize(STYLES.get(one.state, ""))
        table.add_row(*cells)
    console.print(table)


def _cells(one: RunLine, folder: Path) -> tuple[str, ...]:
    from cowest_dspy.store.usage import format_usd

    path = Path(one.run)
    name = str(path.relative_to(folder)) if path != folder else one.run
    far = f" {one.done:,}/{one.total:,}" if one.total else ""
    calls, usd = ("", "") if one.calls is None else (f"{one.calls:,}", format_usd(one.usd))
    said = one.verdict if one.verdict and one.state in ("finished", "running") else one.detail
    if one.state == "running" and one.verdict:
        said = f"{one.detail}. {one.verdict}"
    changed = one.changed.replace("T", " ").removesuffix("+00:00")[:16] if one.changed else ""
    return (
        name,
        one.state,
        one.task or "",
        f"{one.stage or ''}{far}",
        calls,
        usd,
        changed,
        said or "",
    )
