"""The verbs that look before anything is run: doctor, quote, config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from cowest_dspy.cli.console import console
from cowest_dspy.cli.verbs import (
    Files,
    NoAsk,
    Run,
    Seed,
    Set,
    argument,
    option,
    quiet_dspy,
    read_config,
    running,
)
from cowest_dspy.errors import CowestError
from cowest_dspy.utils.files import write_whole
from cowest_dspy.utils.safe_text import visible

if TYPE_CHECKING:
    from cowest_dspy.experiment.doctor import Diagnosis

config_app = typer.Typer(
    name="config",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="What TOML files may say (`schema`), and what they say together (`show`). Neither loads "
    "nor asks a model.",
)


def doctor(
    files: Annotated[
        list[Path] | None,
        argument(metavar="TOML", help="Files, the task first and then the backend."),
    ] = None,
    seed: Seed = None,
    changes: Set = None,
    no_ask: NoAsk = False,
    repair: Annotated[
        Path | None,
        option("--repair", help="Save what can be read of this damaged run folder; no TOML."),
    ] = None,
) -> None:
    """Loads or reaches each model of the TOML files, checks that it can do its part, and says what
    a run would ask of it.

    One question is asked of each model, which an API charges for (`--no-ask` leaves it out). Exit
    code 0: no error was found.

    Example: `cowest doctor programs/handbook.toml programs/backends/openai.toml`

    `cowest doctor --repair runs/handbook` mends a run's damaged store: whole rows are kept, and the
    damaged file beside them.
    """
    if repair is not None:
        _repair(repair, files)
        return
    if not files:
        raise CowestError(
            "Name TOML files, the task first and then the backend; or --repair and a run's folder."
        )
    from cowest_dspy.experiment.doctor import examine

    quiet_dspy()
    diagnosis = examine(read_config(files, seed, changes), ask=not no_ask, say=console.print_line)
    _print_diagnosis(diagnosis)
    if not diagnosis.healthy:
        raise typer.Exit(1)


def quote(
    files: Files,
    run: Run = None,
    seed: Seed = None,
    changes: Set = None,
    examples: Annotated[
        int, typer.Option("--examples", min=1, help="Train examples that are asked as a run would.")
    ] = 3,
    no_ask: NoAsk = False,
) -> None:
    """Says what a cycle will cost before it is begun: calls, tokens, money and minutes, by stage
    and in all, against [budget].

    A few train examples are collected as a run would, which an API charges for (`--no-ask`: only
    calls are counted, nothing is asked); the answers are kept in the run's folder. Exit code 1:
    [budget] is expected to be exceeded.

    Example: `cowest quote programs/handbook.toml programs/backends/openai.toml --examples 3`
    """
    from cowest_dspy.experiment.quote import quote_by_counting, quote_by_probe

    if no_ask:
        made = quote_by_counting(read_config(files, seed, changes))
    else:
        with running(files, run, seed, changes, verb="quote") as experiment:
            made = quote_by_probe(experiment, examples)
    rows = made.table()
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    for name, *cells in rows:
        print(
            *map(visible, (name.ljust(widths[0]), *(map(str.rjust, cells, widths[1:])))), sep="  "
        )
    print("", *map(visible, made.text()), sep="\n")
    if made.exceeded:
        raise typer.Exit(1)


def _repair(run: Path, files: list[Path] | None) -> None:
    from cowest_dspy.store.repair import repair

    if files:
        raise CowestError("--repair takes the run's folder, and no TOML files.")
    console.print_line(str(repair(run)))


def _print_diagnosis(diagnosis: Diagnosis) -> None:
    """A table in a terminal; elsewhere lines, none of which is broken at some width."""
    rows = [(check.level, check.role, check.name, check.text) for check in diagnosis.checks]
    if console.is_terminal:
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for level, *cells in rows:
            table.add_row(
                Text(level, style={"ok": "green", "warning": "yellow"}.get(level, "bold red")),
                *map(Text, cells),
            )
        console.print("", table)
    else:
        print("", *(visible("{:<9}{:<8}{:<15}{}".format(*row)) for row in rows), sep="\n")
    print("", *map(visible, diagnosis.describe_answers()), sep="\n")


@config_app.command()
def schema(
    out: Annotated[Path | None, option("--out", help="Write it to this file.")] = None,
) -> None:
    """Prints the JSON schema of tasks and backends: an editor then completes keys, explains them,
    and marks what is misspelled.

    `cowest config schema --out cowest.schema.json`, and as the first line of a TOML its path from
    there: `#:schema ../cowest.schema.json`. That is how Taplo reads it, and with it Even Better
    TOML in VS Code and others.
    """
    from cowest_dspy.experiment.config_text import json_schema

    text = json.dumps(json_schema(), indent=2) + "\n"
    if out is None:
        print(text, end="")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole({out: text})
    print(f"{out}: name it in the first line of a TOML, as #:schema and the path from there.")


@config_app.command()
def show(files: Files, seed: Seed = None, changes: Set = None) -> None:
    """Prints the configuration that TOML files make together, with every default, as TOML; secrets
    are masked.

    Example: `cowest config show programs/handbook.toml programs/backends/in_process.toml`
    """
    from cowest_dspy.experiment.config_text import effective_toml

    # Not through Rich, which would break lines at the width of the terminal.
    print(visible(effective_toml(read_config(files, seed, changes))), end="")
