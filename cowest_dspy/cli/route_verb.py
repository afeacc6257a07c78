"""The verb `cowest route`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cowest_dspy.cli.console import console
from cowest_dspy.cli.verbs import Log, LogAs, running
from cowest_dspy.errors import RouterError


def route(
    run: Annotated[Path, typer.Argument(help="A run's folder, with traces.", show_default=False)],
    within: Annotated[
        float,
        typer.Option(
            "--within",
            min=0,
            max=1,
            help="Mean score that it may lose on the dev split: 0.01 is one point.",
        ),
    ] = 0.01,
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples",
            min=0,
            help="Further drafts of each input, to see how far they agree. Default: up to 3.",
            show_default=False,
        ),
    ] = None,
    likelihood: Annotated[
        bool | None,
        typer.Option(
            "--likelihood/--no-likelihood",
            help="Look at how likely the weak model finds its draft. Default: if it can be had.",
            show_default=False,
        ),
    ] = None,
    log: LogAs = Log.auto,
) -> None:
    """Learns from a run where a draft pays: when to take it as the answer, when to ask the strong
    model alone, when to have it refined.

    Fitted on the run's traces, the trade between score and cost chosen on the dev split (answered
    with and without drafts), shown on the test split beside going always one way and at random. It
    is written to the run as router.json, plain numbers, which `cowest bundle` takes along and `cowest
    serve` uses; the curve as router.html. The run has one more arm then, "routed".

    Example: `cowest route runs/handbook`
    """
    from cowest_dspy.experiment.routing import fit_run_router
    from cowest_dspy.report.router_view import print_curve

    settings = run / "config.toml"
    if not settings.is_file():
        from cowest_dspy.report.runs import meant

        raise RouterError(
            f"{run} is no run's folder: there is no config.toml in it.{meant(run)} `cowest cycle` "
            "makes one."
        )
    with running([settings], run, None, verb="route", log=log) as experiment:
        made = fit_run_router(experiment, within=within, samples=samples, likelihood=likelihood)
        point = made.curve.point("router")
        cost = point.cost if point else None
        experiment.store.journal.result(
            router=str(experiment.run / "router.json"),
            score=point.score if point else None,
            cost=cost,
        )
        print_curve(made.curve, console)
        console.print(
            f"\nrouter: {experiment.run / 'router.json'}, its curve: {made.written.html}",
            markup=False,
            soft_wrap=True,
        )
        experiment.report()
