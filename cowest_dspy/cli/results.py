"""The verbs about runs that are there: list, watch, report, bundle, verify, track; and ``new``."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from cowest_dspy.cli.console import console
from cowest_dspy.cli.verbs import Run, Schema, Seed, Set, argument, option, quiet_dspy, running
from cowest_dspy.errors import BundleError, ConfigError, ReportError, StoreError
from cowest_dspy.utils.files import write_whole
from cowest_dspy.utils.interrupts import announcing, signal_of
from cowest_dspy.utils.safe_text import printable, visible

if TYPE_CHECKING:
    from cowest_dspy.experiment.config import Config
    from cowest_dspy.report import RunReport, WrittenPage
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
    from cowest_dspy.report.runs import describe_run, run_folders

    found = [describe_run(one) for one in run_folders(folder)]
    if as_json:
        print(visible(json.dumps([asdict(one) for one in found], ensure_ascii=False, indent=2)))
        return
    if not found:
        what = "there is no run in it" if folder.is_dir() else "there is no such folder"
        start = "Name another folder, or start a run: cowest cycle TASK.toml BACKEND.toml"
        console.print_line(f"{folder}: {what}. {start}")
        return
    _print_runs(found, folder)


def watch(
    run: Annotated[Path, argument(help="The run's folder; it need not be there yet.")],
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
    from cowest_dspy.cli.progress import Progress, describe_end, follow, show_new, view
    from cowest_dspy.report.runs import describe_run, is_run, suggest_run
    from cowest_dspy.store.progress import is_alive, read_snapshot

    now = read_snapshot(run)
    if now is None and is_run(run):
        line = describe_run(run)
        console.print_line(f"{run}: {line.state}. {line.verdict or line.detail}")
        raise typer.Exit(0 if line.state == "finished" else 1)
    if now is None and once:
        known = "`cowest runs` lists those in runs/; without --once it is waited for."
        raise StoreError(f"There is no run in {run}.{suggest_run(run)} {known}")
    progress = Progress()
    if now is not None and once:
        show_new(now, progress, [], 0)
        if is_alive(now):
            console.print(view(now))
            console.print_line(f"running: process {now.pid} on {now.host}")
        else:
            console.print_line("\n".join(describe_end(now)))
        return
    try:
        with announcing(lambda text: None):
            last = follow(run, progress, hint=suggest_run(run) if now is None else "")
    except KeyboardInterrupt as stop:
        print("\nNo longer watched. The run itself is as it was.", file=sys.stderr)
        raise typer.Exit(128 + signal_of(stop)) from None
    console.print_line("\n".join(describe_end(last)))
    raise typer.Exit(0 if last.state == "finished" else 1)


def _print_runs(found: list[RunLine], folder: Path) -> None:
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


def report(
    what: Annotated[
        list[Path],
        argument(
            metavar="RUN", help="Folders of runs; or the TOML files of one, as for other verbs."
        ),
    ],
    run: Run = None,
    seed: Seed = None,
    changes: Set = None,
    out: Annotated[
        Path | None,
        option("--out", help="Where to write: a folder; for several runs also FILE.html."),
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
    _check_report(what, files, [given for given in (run, seed, changes) if given is not None], out)
    if not files and len(what) > 1:
        _print_side_by_side(what, out, as_json)
        return
    from cowest_dspy.experiment.summary import read_run
    from cowest_dspy.report import report_files, write_report

    if files:
        with running(files, run, seed, changes, verb="report") as experiment:
            made = experiment.report()  # It stands in the run's folder now.
            there = write_report(made, out) if out else report_files(experiment.run)
            _print_report(made, there, as_json)
        return
    folder = what[0] if what[0].is_dir() else what[0].parent
    made = read_run(what[0])
    _print_report(made, write_report(made, out or folder), as_json)


def _check_report(
    what: Sequence[Path], files: Sequence[Path], given: Sequence[object], out: Path | None
) -> None:
    if files and len(files) < len(what):
        raise ReportError(
            "Name either the folders of runs, or the TOML files of one run; both were given."
        )
    if not files and given:
        raise ReportError(
            "--run, --seed and --set go with TOML files; a run that is named by its folder has its "
            "own configuration."
        )
    if out is not None and out.suffix and (files or len(what) == 1):
        raise ReportError(
            f"--out {out}: the report of one run is report.json and report.html in a folder; give "
            "a folder."
        )


def show_report(made: RunReport, html: Path) -> None:
    """Print the tables of a report, one answer before and after tuning, and where the page is."""
    from cowest_dspy.report import print_change, print_report

    print_report(made, console)
    print_change(made, console)
    console.print_line(f"\nreport: {html}")


def _print_report(made: RunReport, written: WrittenPage, as_json: bool) -> None:
    if as_json:
        print(visible(written.json.read_text(encoding="utf-8")), end="")
    else:
        show_report(made, written.html)


def _print_side_by_side(runs: Sequence[Path], out: Path | None, as_json: bool) -> None:
    from cowest_dspy.experiment.summary import read_run
    from cowest_dspy.report import print_side_by_side, short_names, side_by_side, write_side_by_side

    view = side_by_side(dict(zip(short_names(runs), map(read_run, runs), strict=True)))
    written = write_side_by_side(view, out or _shared_folder(runs))
    if as_json:
        print(visible(written.json.read_text(encoding="utf-8")), end="")
        return
    print_side_by_side(view, console)
    console.print_line(f"\nside by side: {written.html}")


def _shared_folder(runs: Sequence[Path]) -> Path:
    """The folder in which all the runs are, as it was named; this one where they are in several."""
    parents = {path.resolve().parent: path.parent for path in runs}
    return next(iter(parents.values())) if len(parents) == 1 else Path()


def bundle(
    run: Annotated[Path, argument(help="A finished run's folder.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The bundle's folder. Default: bundle in the run's."),
    ] = None,
    merge: Annotated[
        Path | None, option("--merge", help="Also write base and adapter as one model here.")
    ] = None,
    gguf: Annotated[
        Path | None, option("--gguf", help="Also write the adapter for llama.cpp as this file.")
    ] = None,
    push: Annotated[
        str | None, option("--push", help="Upload it as this Hub model, OWNER/NAME; private.")
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="With --push: everybody may read it.")
    ] = False,
    licence: Annotated[
        str | None,
        option(
            "--license",
            help="For the model card, such as apache-2.0. Default: the base model's, where it is "
            "known.",
        ),
    ] = None,
) -> None:
    """Writes what a finished run ended with into one folder: prompts, adapter, configuration,
    pairs, numbers, model card, hashes.

    It holds no secret, no pickle and no path of this machine. Nothing is asked, and nothing is
    uploaded without `--push`.

    Example: `cowest bundle runs/handbook --out handbook-bundle --merge handbook-model`
    """
    from cowest_dspy.experiment import Experiment
    from cowest_dspy.experiment.bundle import (
        convert_to_gguf,
        merge_adapter,
        push_bundle,
        write_bundle,
    )
    from cowest_dspy.tuning import engine_of

    if public and not push:
        raise BundleError(
            "--public says how --push uploads: give the model's name too, --push OWNER/NAME."
        )
    quiet_dspy()
    try:
        config = _config_of(run)
    except ConfigError as error:
        raise BundleError(str(error)) from error
    with Experiment(config, run) as experiment:
        made = write_bundle(experiment, out or run / "bundle", licence=licence)
        base = engine_of(experiment.weak).base_folder
    console.print_line(f"bundle: {made}")
    if merge is not None:
        console.print_line(f"merged model: {merge_adapter(made, base, merge)}")
    if gguf is not None:
        console.print_line(f"adapter for llama.cpp: {convert_to_gguf(made, base, gguf)}")
    if push:
        console.print_line(f"uploaded: {push_bundle(made, push, private=not public)}")


def _config_of(run: Path) -> Config:
    """The configuration of a run's folder.

    Raises:
        ConfigError: it is no run's folder, or its configuration cannot be read.
    """
    from cowest_dspy.experiment.config import load_config

    file = run / "config.toml"
    if not file.is_file():
        raise ConfigError(
            f"{run} is no run's folder: there is no config.toml in it. `cowest cycle` makes one."
        )
    try:
        return load_config([file])
    except ConfigError as error:
        raise ConfigError(f"The run's configuration cannot be read: {error}") from error


def verify(path: Annotated[Path, argument(metavar="BUNDLE", help="A bundle's folder.")]) -> None:
    """Checks a bundle against its manifest, offline: every file's hash, and the adapter's. Executes
    nothing. Exit code 0: whole.

    Example: `cowest verify handbook-bundle`
    """
    from cowest_dspy.experiment.bundle import read_manifest, verify_bundle

    wrong, manifest = verify_bundle(path), read_manifest(path)
    for line in wrong:
        console.print_line(line)
    if wrong:
        raise typer.Exit(1)
    adapter = manifest.adapter or "none"
    about = printable(
        f"{manifest.name}, seed {manifest.seed}, base {manifest.base}@{manifest.base_hash}, "
        f"adapter {adapter}"
    )
    console.print_line(f"{path} is whole: {len(manifest.files)} files; {about}")


def track(
    run: Annotated[Path, argument(help="A run's folder.")],
    to: Annotated[
        list[str] | None,
        option(
            "--to",
            help="mlflow, trackio or wandb, instead of [tracking] to; may be given several times.",
        ),
    ] = None,
    uri: Annotated[str | None, option("--uri", help="Where MLflow is.")] = None,
    project: Annotated[str | None, option("--project", help="Experiment or project.")] = None,
    bundle: Annotated[
        bool,
        typer.Option(
            "--bundle", help="Write the bundle of a finished run first, and upload it too."
        ),
    ] = False,
) -> None:
    """Logs a run that is there to MLflow, trackio or W&B: one that had no [tracking], or whose
    tracker was down. Asks no model.

    Options come before what [tracking] says. What a tracker has already is not sent again. Exit
    code 0: every tracker has taken it.

    Example: `cowest track runs/handbook --to mlflow --uri http://127.0.0.1:5000`
    """
    from cowest_dspy.experiment.config import overridden
    from cowest_dspy.experiment.summary import run_report
    from cowest_dspy.experiment.trackers import check_installed
    from cowest_dspy.experiment.tracking import Tracking
    from cowest_dspy.store.store import Store

    config = _config_of(run)
    table = config.tracking.model_dump() if config.tracking else {}
    given = {"to": to, "uri": uri, "project": project}
    table |= {key: value for key, value in given.items() if value}
    if "to" not in table:
        raise ConfigError(
            "This run has no [tracking]: say where to, for instance --to mlflow --uri "
            "http://127.0.0.1:5000"
        )
    config = overridden(config, {"tracking": table})
    check_installed(config)
    if bundle:
        _write_bundle(run)
    with Store(run) as store:
        taken = Tracking(config, store, console.print_line).finish(run_report(config, store))
    if not taken:
        raise typer.Exit(1)


def _write_bundle(run: Path) -> None:
    from cowest_dspy.experiment import Experiment
    from cowest_dspy.experiment.bundle import write_bundle

    quiet_dspy()
    untracked = _config_of(run).model_copy(update={"tracking": None})
    before = (run / "config.toml").read_text(encoding="utf-8")
    with Experiment(untracked, run) as experiment:
        write_bundle(experiment, run / "bundle")
    write_whole({run / "config.toml": before})


def new(
    name: Annotated[
        str, argument(help="The domain's name: a-z, 0-9, _ and -, such as tool-loans.")
    ],
    folder: Annotated[
        Path | None, option("--folder", help="Where to write. Default: a new folder of that name.")
    ] = None,
) -> None:
    """Writes the files of a new domain, which run at once on scripted models: rows, recipe, metric,
    TOML, backends, a test.

    Put your own rows into its CSV first, then follow the comments. No file is overwritten, and no
    model is asked.

    Example: `cowest new tool-loans`
    """
    from cowest_dspy.cli.scaffold import FILES, new_domain

    written = new_domain(name, folder)
    width = max(len(str(path)) for path in written)
    for path, (_, about) in zip(written, FILES.values(), strict=True):
        console.print_line(f"{path!s:<{width}}  {about}")
    files = {key: shlex.quote(str(path)) for key, path in zip(FILES, written, strict=True)}
    task, rules, models = (files[f"{name}.toml.txt"] for name in ("task", "scripted", "models"))
    console.print_line(f"""
Next, at once, on two rules in the place of models:
  pytest {files["test.py.txt"]}
  cowest collect {task} {rules}
  cowest pairs {task} {rules}
  cowest evaluate {task} {rules} --arm strong --arm collaboration_sft --arm oracle
  cowest compare {task} {rules}

Then with your own rows, and with real models:
  cowest doctor {task} {models}
  cowest cycle {task} {models}""")
