"""The verb `cowest report`: of one run, or of several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cowest_dspy.cli.live import console
from cowest_dspy.cli.verbs import Run, Schema, Seed, quiet_dspy, running
from cowest_dspy.errors import ReportError
from cowest_dspy.utils.safe_text import visible

if TYPE_CHECKING:
    from cowest_dspy.report import RunReport, WrittenReport


def report(
    what: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN",
            help="Folders of runs; or the TOML files of one, as for other verbs.",
            show_default=False,
        ),
    ],
    run: Run = None,
    seed: Seed = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Where to write: a folder; for several runs also FILE.html.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the JSON instead of tables.")
    ] = False,
    schema: Schema = False,
) -> None:
    """Writes report.json and report.html from what a run has so far, and prints the table. Asks no
    model.

    The run is named by its folder, or by the TOML files that it was started with. Several runs are
    shown side by side: verdicts, arms, costs, models, where their configurations differ; and those
    of the same test examples are tested against each other. No run is changed by that. By default
    side_by_side.html and .json are written into the folder that the runs share.

    Example: `cowest report runs/handbook`, `cowest report runs/one runs/two --out both.html`
    """
    quiet_dspy()
    files = [path for path in what if path.suffix == ".toml" and not path.is_dir()]
    if files and len(files) < len(what):
        raise ReportError(
            "Name either the folders of runs, or the TOML files of one run; both were given."
        )
    if not files and (run is not None or seed is not None):
        raise ReportError(
            "--run and --seed go with TOML files; a run that is named by its folder has its own "
            "configuration."
        )
    if not files and len(what) > 1:
        _several(what, out, as_json)
        return
    if out is not None and out.suffix:
        raise ReportError(
            f"--out {out}: the report of one run is report.json and report.html in a folder; give "
            "a folder."
        )
    from cowest_dspy.report import WrittenReport, write_report

    if files:
        with running(files, run, seed, verb="report") as experiment:
            made = experiment.report()  # It stands in the run's folder now.
            _one(
                made,
                write_report(made, out) if out else WrittenReport.within(experiment.run),
                as_json,
            )
        return
    from cowest_dspy.experiment.summary import read_run

    folder = what[0] if what[0].is_dir() else what[0].parent
    made = read_run(what[0])
    _one(made, write_report(made, out or folder), as_json)


def _one(made: RunReport, written: WrittenReport, as_json: bool) -> None:
    from cowest_dspy.report import print_report

    if as_json:
        print(visible(written.json.read_text(encoding="utf-8")), end="")
        return
    print_report(made, console)
    console.print(f"\nreport: {written.html}", soft_wrap=True)


def _several(runs: Sequence[Path], out: Path | None, as_json: bool) -> None:
    from cowest_dspy.experiment.summary import read_run
    from cowest_dspy.report import (
        print_side_by_side,
        short_names,
        side_by_side,
        write_side_by_side,
    )

    view = side_by_side(dict(zip(short_names(runs), map(read_run, runs), strict=True)))
    written = write_side_by_side(view, out or _shared_folder(runs))
    if as_json:
        print(visible(written.json.read_text(encoding="utf-8")), end="")
        return
    print_side_by_side(view, console)
    console.print(f"\nside by side: {written.html}", markup=False, soft_wrap=True)


def _shared_folder(runs: Sequence[Path]) -> Path:
    """The folder in which all the runs are, as it was named; this one where they are in several."""
    parents = {path.resolve().parent: path.parent for path in runs}
    return next(iter(parents.values())) if len(parents) == 1 else Path()
