"""The verb `cowest compare`."""

from __future__ import annotations

from typing import Annotated

import typer

from cowest_dspy.cli.live import console
from cowest_dspy.cli.verbs import Accelerate, Files, Log, LogAs, Run, Seed, running


def compare(
    files: Files,
    run: Run = None,
    seed: Seed = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(
            "--arm",
            help="Only this arm, and no sweep; may be given several times.",
            show_default=False,
        ),
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
        numbers_of,
        print_comparison,
        write_comparison,
    )

    with running(files, run, seed, accelerate, verb="compare", log=log) as experiment:
        made = Compared(experiment).run(arm)
        written = write_comparison(made, experiment.run / "comparison")
        numbers = numbers_of(made)
        experiment.store.journal.about(verdict=comparison_verdict(made, numbers).sentences[0])
        experiment.store.journal.result(comparison=str(written.json))
        print_comparison(made, console, numbers=numbers)
        console.print(f"\ncomparison: {written.html}", soft_wrap=True)
