"""Common arguments of the verbs, and a run that is open while a verb works."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cowest_dspy.cli.console import console
from cowest_dspy.errors import CowestError, ModelError, masked
from cowest_dspy.utils.interrupts import signal_of
from cowest_dspy.utils.safe_text import visible

if TYPE_CHECKING:
    from cowest_dspy.experiment import Experiment
    from cowest_dspy.experiment.config import Config
    from cowest_dspy.store.journal import Journal

STOPPED = "\nStopped. Everything that was answered is kept: the same command goes on from here."


BEGINNING = ("cycle", "collect", "compare")
"""Verbs that begin runs: of others, a new run may be a name that was mistyped."""


class Log(StrEnum):
    """Forms of what a verb prints while it works."""

    auto = "auto"
    plain = "plain"
    json = "json"


option = partial(typer.Option, show_default=False)
argument = partial(typer.Argument, show_default=False)
"""Options and arguments whose help says what happens without them."""

Files = Annotated[
    list[Path],
    argument(
        metavar="TOML",
        help="TOML files, the task first and then the backend; a later file replaces whole tables.",
    ),
]
Run = Annotated[
    Path | None, option("--run", help="The run's folder. Default: runs/ and the task's name.")
]
NoAsk = Annotated[bool, typer.Option("--no-ask", help="Ask no question, so that nothing is paid.")]
Accelerate = Annotated[
    str,
    typer.Option(
        "--accelerate",
        metavar="N|FILE",
        help="Processes that train together: as many as GPUs; without a GPU they share the CPU. "
        "Or a configuration file of Accelerate's, such as those in programs/accelerate.",
    ),
]
Seed = Annotated[int | None, option("--seed", help="Overrides the seed in the files.")]
Set = Annotated[
    list[str] | None,
    option(
        "--set",
        metavar="KEY=VALUE",
        help="Overrides one key of the files, such as dpo.beta=0.2: a value of TOML, or a bare "
        "word. A path is of this folder. May be given several times.",
    ),
]
LogAs = Annotated[
    Log,
    typer.Option(
        "--log",
        help="auto: bars in a terminal, else lines; plain: lines; json: one object a line, and "
        "nothing else.",
    ),
]


def _schema(asked: bool) -> None:
    if asked:
        from cowest_dspy.report.figures import schema_text

        print(schema_text(), end="")
        raise typer.Exit()


Schema = Annotated[
    bool,
    typer.Option(
        "--schema",
        callback=_schema,
        is_eager=True,
        help="Print the JSON Schema of report.json, and nothing else.",
    ),
]


def read_config(files: Sequence[Path], seed: int | None, changes: list[str] | None) -> Config:
    """The configuration of TOML files, ``--seed`` and ``--set``."""
    from cowest_dspy.experiment.config import load_config, parse_override

    return load_config(files, seed=seed, overrides=dict(map(parse_override, changes or ())))


@contextmanager
def running(
    files: list[Path],
    run: Path | None,
    seed: int | None,
    changes: list[str] | None,
    accelerate: str = "1",
    *,
    verb: str | None = None,
    log: Log = Log.auto,
) -> Iterator[Experiment]:
    """A context with the run of these files, while a verb works on it; its progress is shown.

    Afterwards what its budget has spent is printed. Ctrl-C, SIGTERM and SIGHUP are exit code 128 +
    their number, with what was done and the command that goes on. With ``log`` "json" the last line
    is an ``end``, whatever happens.
    """
    from cowest_dspy.cli.progress import Progress, format_stop

    progress = Progress(log.value, run=str(run or ""))
    journal: Journal | None = None
    around = ExitStack()
    quiet, console.quiet = console.quiet, log is Log.json or console.quiet
    code, failed = 0, None
    try:
        if log is Log.json:  # What libraries print belongs to no event.
            around.enter_context(redirect_stdout(sys.stderr))
        from cowest_dspy.experiment import Experiment

        quiet_dspy()
        config = read_config(files, seed, changes)
        folder = run or Path("runs") / config.name
        processes = _processes(accelerate)
        new = _describe_new(run, verb)
        with Experiment(config, folder, progress=progress, processes=processes) as experiment:
            journal = experiment.store.journal
            around.enter_context(journal.listening(progress.update))
            journal.about(verb=verb, command=masked(command()))
            progress.begin(journal.snapshot())
            if new:
                console.print_line(new)
            yield experiment
            if experiment.store.guard is not None:
                console.print(f"budget: {experiment.store.guard.spent()}")
    except KeyboardInterrupt as stop:
        code, failed = 128 + signal_of(stop), stop
        last = journal.close(stop) if journal else None
        if last is None or last.state != "finished":
            print("", visible(format_stop(last, code - 128, command())), sep="\n", file=sys.stderr)
        raise typer.Exit(code) from None
    except BaseException as error:
        code, failed = 1, error
        if (unanswered := _describe_failed_call(error)) is not None:
            raise unanswered from error
        raise
    finally:
        console.quiet = quiet
        around.close()
        if log is Log.json:
            last = journal.close(failed) if journal else None
            progress.end(last, code, failed, masked(command()))


def _describe_new(run: Path | None, verb: str | None) -> str:
    """A line about a folder that is no run yet; empty where it is one."""
    from cowest_dspy.report.runs import is_run, suggest_run

    if run is None or is_run(run):
        return ""
    return f"{run}: a new run.{'' if verb in BEGINNING else suggest_run(run)}"


def _describe_failed_call(error: BaseException) -> ModelError | None:
    """A message about the failed call of a model that ended the work, None where something else
    did; a verb that only asks one question has no table to count it in."""
    if "dspy" not in sys.modules:
        return None
    from cowest_dspy.store.record import EXPECTED_FAILURES, failure

    if not isinstance(error, EXPECTED_FAILURES):
        return None
    model = getattr(error, "model", None)
    return ModelError(
        f"{f'The model {model}' if model else 'A model'} gave no answer: {failure(error)}. What "
        "was answered before is kept. "
        "Try again; `cowest doctor` with the same files says whether each model can be reached."
    )


def quiet_dspy() -> None:
    """Have DSPy log errors only, and without secrets: what it warns of, a run counts and reports.
    It sets its logger up when it is
    imported: call this afterwards."""
    logger = logging.getLogger("dspy")
    logger.setLevel(logging.ERROR)
    for handler in logger.handlers:
        handler.setFormatter(VisibleFormatter())


class VisibleFormatter(logging.Formatter):
    """Log lines without secrets, in which control characters are shown."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record, with the exception that it carries."""
        return visible(masked(super().format(record)))


def _processes(accelerate: str) -> int | Path:
    """The value of --accelerate, checked before anything is begun."""
    if accelerate.isdecimal() and int(accelerate):
        return int(accelerate)
    if accelerate.lstrip("-").isdecimal():
        raise CowestError(
            f"--accelerate {accelerate}: it takes 1 process or more, or a configuration file of "
            "Accelerate's."
        )
    from cowest_dspy.tuning import plan_processes

    plan_processes(Path(accelerate))
    return Path(accelerate)


def command() -> str:
    """The command that started this process, as a shell takes it: the same goes on from where it
    stopped."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    name = Path(sys.argv[0]).name
    if not name.endswith(".py"):
        program = [name]
    elif module is not None:  # python -m
        program = [Path(sys.executable).name, "-m", module.name]
    else:
        program = [Path(sys.executable).name, sys.argv[0]]
    return shlex.join([*program, *sys.argv[1:]])
