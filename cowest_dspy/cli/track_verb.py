"""The verb `cowest track`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cowest_dspy.cli.live import Live
from cowest_dspy.cli.verbs import quiet_dspy
from cowest_dspy.errors import ConfigError
from cowest_dspy.utils.files import write_whole


def track(
    run: Annotated[Path, typer.Argument(help="A run's folder.", show_default=False)],
    to: Annotated[
        list[str] | None,
        typer.Option(
            "--to",
            help="mlflow, trackio or wandb, instead of [tracking] to; may be given several times.",
            show_default=False,
        ),
    ] = None,
    uri: Annotated[
        str | None, typer.Option("--uri", help="Where MLflow is.", show_default=False)
    ] = None,
    project: Annotated[
        str | None, typer.Option("--project", help="Experiment or project.", show_default=False)
    ] = None,
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
    from cowest_dspy.experiment.config import load_config, overridden
    from cowest_dspy.experiment.summary import run_report
    from cowest_dspy.experiment.tracking import Tracking, check_installed
    from cowest_dspy.store.store import Store

    if not (run / "config.toml").is_file():
        raise ConfigError(
            f"{run} is no run's folder: there is no config.toml in it. `cowest cycle` makes one."
        )
    config = load_config([run / "config.toml"])
    given = {
        "to": to or (config.tracking.to if config.tracking else None),
        "uri": uri,
        "project": project,
    }
    if not given["to"]:
        raise ConfigError(
            "This run has no [tracking]: say where to, for instance --to mlflow --uri "
            "http://127.0.0.1:5000"
        )
    kept = config.tracking.model_dump() if config.tracking else {}
    config = overridden(
        config, {"tracking": {**kept, **{key: value for key, value in given.items() if value}}}
    )
    check_installed(config)
    if bundle:
        _bundle(run)
    with Store(run) as store:
        taken = Tracking(config, store, Live()).finish(run_report(config, store))
    if not taken:
        raise typer.Exit(1)


def _bundle(run: Path) -> None:
    from cowest_dspy.experiment import Experiment
    from cowest_dspy.experiment.bundle import write_bundle
    from cowest_dspy.experiment.config import load_config

    quiet_dspy()
    untracked = load_config([run / "config.toml"]).model_copy(update={"tracking": None})
    before = (run / "config.toml").read_text(encoding="utf-8")
    with Experiment(untracked, run) as experiment:
        write_bundle(experiment, run / "bundle")
    write_whole({run / "config.toml": before})
