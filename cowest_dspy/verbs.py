"""What the verbs of the command line share: their common arguments, and a run that is open while a verb works."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cowest_dspy.live import Live, console

if TYPE_CHECKING:
    from cowest_dspy.experiment import Experiment

STOPPED = "\nStopped. Everything that was answered is kept: the same command goes on from here."

Files = Annotated[
    list[Path],
    typer.Argument(
        metavar="TOML",
        help="TOML files, the task first and then the backend; a later file replaces whole tables.",
        show_default=False,
    ),
]
Run = Annotated[
    Path | None, typer.Option("--run", help="The run's folder. Default: runs/ and the task's name.", show_default=False)
]
NoAsk = Annotated[bool, typer.Option("--no-ask", help="Ask no question, so that nothing is paid.")]
Accelerate = Annotated[
    int,
    typer.Option("--accelerate", min=1, help="Processes that train together: as many as GPUs; without a GPU they share the CPU."),
]
Seed = Annotated[int | None, typer.Option("--seed", help="Overrides the seed in the files.", show_default=False)]


def _schema(asked: bool) -> None:
    if asked:
        from cowest_dspy.report.schema import schema_text

        print(schema_text(), end="")
        raise typer.Exit()


Schema = Annotated[
    bool, typer.Option("--schema", callback=_schema, is_eager=True, help="Print the JSON Schema of report.json, and nothing else.")
]


@contextmanager
def running(files: list[Path], run: Path | None, seed: int | None, processes: int = 1) -> Iterator[Experiment]:
    """The run of these files while a verb works on it; afterwards what its budget has spent is said. Ctrl-C is exit code 130."""
    from cowest_dspy.config import load_config
    from cowest_dspy.experiment import Experiment

    # Only now: DSPy sets the level of its logger when it is imported. What it warns of, the run counts and reports.
    logging.getLogger("dspy").setLevel(logging.ERROR)
    config = load_config(files, seed=seed)
    try:
        with Experiment(config, run or Path("runs") / config.name, watch=Live(), processes=processes) as experiment:
            yield experiment
            if experiment.store.guard is not None:
                console.print(f"budget: {experiment.store.guard.spent()}")
    except KeyboardInterrupt:
        print(STOPPED, file=sys.stderr)
        raise typer.Exit(130) from None
