"""cowest: one verb per stage of a weak-strong collaboration, all on one run folder.

Everything but Typer and Rich is imported when a verb needs it, so that ``cowest --help`` is there
at once.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from cowest_dspy import __version__
from cowest_dspy.cli import checks, results
from cowest_dspy.cli.console import console
from cowest_dspy.cli.serving import route, serve
from cowest_dspy.cli.verbs import (
    STOPPED,
    Accelerate,
    Files,
    Log,
    LogAs,
    Run,
    Seed,
    Set,
    VisibleFormatter,
    option,
    running,
)
from cowest_dspy.errors import CowestError, masked
from cowest_dspy.utils.interrupts import first_signal, handle_signals, signal_of
from cowest_dspy.utils.reading import DISK_FAULTS, describe_os_error, read_json_text
from cowest_dspy.utils.safe_text import visible

if TYPE_CHECKING:
    from cowest_dspy.experiment import Experiment
    from cowest_dspy.pairs import PreferencePairs

app = typer.Typer(
    name="cowest",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="""**Weak-strong collaboration**: a small model that knows a domain drafts, a large one
refines.

`cowest cycle TASK.toml BACKEND.toml` runs everything: it fine-tunes the weak model on the domain,
samples drafts, measures how much each of them changed the strong model's answer (its *influence*),
turns that into preference pairs, tunes the weak model on them, and compares all of it on held-out
questions. The other verbs run one stage each, on the same run folder.

Example: `cowest cycle programs/handbook.toml programs/backends/in_process.toml --run runs/handbook`

Killed half-way? The same command goes on where it stood; no answered call is made twice.""",
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"cowest_dspy {__version__}")
        raise typer.Exit()


@app.callback()
def _take_common_options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Take what stands before any verb; the help is the application's own."""


_OLD_VERBS = {"gate": "route"}


def _refuse_old_verb(context: typer.Context) -> None:
    """Raise an error that names the verb that took this one's place."""
    old = context.info_name or ""
    raise CowestError(f"`cowest {old}` is now `cowest {_OLD_VERBS[old]}`.")


def cycle(
    files: Files,
    run: Run = None,
    seed: Seed = None,
    changes: Set = None,
    accelerate: Accelerate = "1",
    log: LogAs = Log.auto,
) -> None:
    """Runs every stage: fine-tune, collect, pair, tune, evaluate, report.

    What an earlier call with the same run folder has done is not done again. At the end: the table,
    and where the report is.
    """
    with running(files, run, seed, changes, accelerate, verb="cycle", log=log) as experiment:
        _print_report(experiment, experiment.cycle())


def ask(
    files: Files,
    question: Annotated[
        str,
        typer.Option(
            "--question",
            "-q",
            help='The input; or JSON for several: \'{"question": ..., "options": ...}\'.',
        ),
    ],
    run: Run = None,
    seed: Seed = None,
    changes: Set = None,
) -> None:
    """Asks the collaboration one question, with the best weak model that the run has.

    Example: `cowest ask programs/handbook.toml programs/backends/in_process.toml -q "May the Arbel
        run at 25 bar?"`
    """
    with running(files, run, seed, changes, verb="ask") as experiment:
        prediction = experiment.ask(**_inputs(question, experiment.config.data.inputs))
        for name, value in prediction.items():
            console.print(Text.assemble((name, "bold"), ": ", masked(str(value))), soft_wrap=True)


def evaluate(
    files: Files,
    run: Run = None,
    seed: Seed = None,
    changes: Set = None,
    arm: Annotated[
        list[str] | None, option("--arm", help="Only this arm; may be given several times.")
    ] = None,
    log: LogAs = Log.auto,
) -> None:
    """Asks the held-out questions of every arm, or of some, and prints the table."""
    with running(files, run, seed, changes, verb="evaluate", log=log) as experiment:
        known = experiment.arm_names()
        for name in arm or []:
            if name not in known:
                raise CowestError(
                    f'There is no arm "{name}" in this configuration: it has {", ".join(known)}.'
                )
        experiment.evaluate(arm)
        _print_report(experiment, experiment.report())


def compare(
    files: Files,
    run: Run = None,
    seed: Seed = None,
    changes: Set = None,
    arm: Annotated[
        list[str] | None,
        option("--arm", help="Only this arm, and no sweep; may be given several times."),
    ] = None,
    accelerate: Accelerate = "1",
    log: LogAs = Log.auto,
) -> None:
    """Answers the same examples with every arm of [compare], and says which is better, with
    intervals and corrected tests.

    Arms are the models alone, other ways to combine them, controls, and the collaboration before
    and after tuning; whatever has to be trained is. A run that `cowest cycle` has begun is used.
    The tables are written to the run's folder as JSON, CSV, Markdown and HTML.

    Example: `cowest compare programs/medmcqa.toml programs/backends/in_process.toml`
    """
    from cowest_dspy.experiment import Compared
    from cowest_dspy.report import (
        comparison_verdict,
        compute_numbers,
        print_comparison,
        write_comparison,
    )

    with running(files, run, seed, changes, accelerate, verb="compare", log=log) as experiment:
        made = Compared(experiment).run(arm)
        written = write_comparison(made, experiment.run / "comparison")
        numbers = compute_numbers(made)
        experiment.store.journal.about(verdict=comparison_verdict(made, numbers).sentences[0])
        experiment.store.journal.result(comparison=str(written.json))
        print_comparison(made, console, numbers=numbers)
        console.print_line(f"\ncomparison: {written.html}")


def collect(
    files: Files,
    run: Run = None,
    seed: Seed = None,
    changes: Set = None,
    log: LogAs = Log.auto,
) -> None:
    """Samples drafts for the train questions and measures the influence of each."""
    from cowest_dspy.influence.report import InfluenceReport

    with running(files, run, seed, changes, verb="collect", log=log) as experiment:
        traces = experiment.collect()
        found = InfluenceReport.from_traces(traces)
        counts = {name: getattr(found, name) for name in ("helped", "hurt", "same", "failed")}
        mean = found.mean if found.scored else None
        experiment.store.journal.result(
            drafts=len(traces), mean_influence=mean, **counts, saved=traces.saved
        )
        console.print(str(found))
        if any(traces.saved.values()):
            console.print(
                f"saved: {traces.saved['weak_calls']} drafts, {traces.saved['strong_calls']} "
                "answers of the strong model"
            )


def pairs(
    files: Files,
    run: Run = None,
    seed: Seed = None,
    changes: Set = None,
    push: Annotated[
        str | None, option("--push", help="Upload them as this Hub dataset, OWNER/NAME; private.")
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="With --push: everybody may read it.")
    ] = False,
    log: LogAs = Log.auto,
) -> None:
    """Turns the run's traces into preference pairs (pairs.jsonl in the run folder), and says what
    was dropped and why.

    The traces are those of `cowest collect` or `cowest cycle`; without any, nothing is asked, and
    exit code 1 says so. Beside the pairs, drafts.jsonl says of each draft whether it helped or
    hurt, as KTO learns. Nothing is uploaded without `--push`.
    """
    if public and not push:
        raise CowestError(
            "--public says how --push uploads: give the dataset's name too, --push OWNER/NAME."
        )
    with running(files, run, seed, changes, verb="pairs", log=log) as experiment:
        experiment.check_collected(_collect_command(files, run, seed, changes))
        made = experiment.pairs()
        experiment.store.journal.result(
            pairs=len(made), dropped=made.dropped, file=str(experiment.run / "pairs.jsonl")
        )
        for line in _describe_pairs(made, experiment.run):
            console.print_line(line)
        if not experiment.config.pairs.source:
            drafts = experiment.labelled()
            file = experiment.run / "drafts.jsonl"
            console.print_line(
                f"{drafts.helped} drafts that helped and {len(drafts) - drafts.helped} that hurt "
                f"in {file}"
            )
        if push:
            console.print_line(f"uploaded: {made.push_to_hub(push, private=not public)}")


def tune(
    files: Files,
    run: Run = None,
    seed: Seed = None,
    changes: Set = None,
    accelerate: Accelerate = "1",
    log: LogAs = Log.auto,
) -> None:
    """Tunes the weak model on the run's preference pairs, from its fine-tuned adapter.

    The drafts that pairs are made of must be there: `cowest collect` or `cowest cycle` collects
    them.

    `--accelerate 4` trains on four GPUs, by `accelerate launch`, from the same TOML files and to
    the same result but for rounding; `--accelerate FILE` as a configuration file of Accelerate's
    says: one GPU, several, FSDP, several machines.
    """
    with running(files, run, seed, changes, accelerate, verb="tune", log=log) as experiment:
        experiment.check_collected(_collect_command(files, run, seed, changes))
        model = experiment.tune().model
        experiment.store.journal.result(model=model)
        console.print(f"tuned: {model}")


VERBS = {
    "Start": (results.new, checks.doctor, checks.quote, checks.config_app),
    "Run": (cycle, collect, pairs, tune, evaluate, compare, route),
    "Look": (ask, results.report, results.runs, results.watch, results.track),
    "Ship": (results.bundle, results.verify, serve),
}
"""The verbs in the groups and in the order in which `cowest --help` lists them."""

for _group, _verbs in VERBS.items():
    for _verb in _verbs:
        if isinstance(_verb, typer.Typer):
            app.add_typer(_verb, rich_help_panel=_group)
        else:
            app.command(rich_help_panel=_group)(_verb)
for _old in _OLD_VERBS:
    app.command(
        _old,
        hidden=True,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )(_refuse_old_verb)


def main() -> None:
    """The console script."""
    report_errors(app)


def report_errors(run: Callable[[], None]) -> None:
    """Runs a command: an error that the user can mend becomes one clear message and exit code 1, as
    does a file or disk that the system refuses. Ctrl-C is exit code 130, SIGTERM 143: the first
    ends it cleanly, the second at once."""
    handler = logging.StreamHandler()
    handler.setFormatter(VisibleFormatter())
    logging.basicConfig(level=logging.ERROR, handlers=[handler])
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with handle_signals():
        try:
            run()
        except CowestError as error:
            print(visible(masked(f"{type(error).__name__}: {error}")), file=sys.stderr)
            sys.exit(1)
        except Exception as error:
            # A file, a folder or a disk, whichever verb came upon it, is for the user to mend.
            # Anything else is a fault of ours or of a library: its traceback, too, may repeat a key
            # or an answer.
            if isinstance(error, OSError) and (
                error.errno in DISK_FAULTS or error.filename is not None
            ):
                text = f"{type(error).__name__}: {describe_os_error(error)}\n"
            else:
                text = "".join(traceback.format_exception(error))
            print(visible(masked(text)), file=sys.stderr, end="")
            sys.exit(1)
        except KeyboardInterrupt as stop:
            print(STOPPED, file=sys.stderr)
            sys.exit(128 + signal_of(stop))
        except SystemExit as end:
            # Typer makes exit code 1 of an interruption that no verb has taken.
            stop = first_signal()
            sys.exit(128 + stop if stop and end.code == 1 else end.code)


def _describe_pairs(made: PreferencePairs, run: Path) -> Iterator[str]:
    yield f"{len(made)} pairs in {run / 'pairs.jsonl'}"
    if made.rules:
        yield "  " + ", ".join(
            f"{name} {value}" for name, value in made.rules.items() if value is not None
        )
    yield from (f"  dropped: {count} {reason}" for reason, count in made.dropped.items())
    lengths = made.lengths
    if lengths:
        yield f"  lengths: {lengths}"
        if lengths.warning:
            yield f"Warning: {lengths.warning}"


def _collect_command(
    files: list[Path], run: Path | None, seed: int | None, changes: list[str] | None
) -> str:
    """The command that collects drafts for what was typed."""
    options = [
        *(("--run", str(run)) if run else ()),
        *(("--seed", str(seed)) if seed is not None else ()),
        *(part for change in changes or () for part in ("--set", change)),
    ]
    return shlex.join(["cowest", "collect", *map(str, files), *options])


def _inputs(question: str, names: tuple[str, ...]) -> dict[str, Any]:
    given = (
        read_json_text(question, "--question")
        if question.lstrip().startswith("{")
        else {names[0]: question}
    )
    if sorted(given) != sorted(names):
        raise CowestError(f"The program takes {list(names)}; --question gave {sorted(given)}.")
    return given


def _print_report(experiment: Experiment, made: Any) -> None:
    from cowest_dspy.report import arm_table

    facts = ("name", "answered", "failed", "score")
    arms = [{fact: getattr(line, fact) for fact in facts} for line in arm_table(made)]
    experiment.store.journal.result(report=str(experiment.run / "report.json"), arms=arms)
    results.show_report(made, experiment.run / "report.html")


if __name__ == "__main__":
    main()
