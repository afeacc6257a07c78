"""A run's router: fitted on its traces, the trade chosen on the dev split, and what it gives on the
test split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import dspy

from cowest_dspy.errors import RouterError
from cowest_dspy.influence.trace import Traces
from cowest_dspy.optimizers.router import DraftLikelihood, Router, scores_drafts
from cowest_dspy.optimizers.router_curve import Curve, router_curve
from cowest_dspy.optimizers.router_fitting import (
    Observed,
    fit_router,
    observe,
    observe_traces,
)
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.report.page import WrittenPage
from cowest_dspy.report.router_view import write_curve
from cowest_dspy.utils.extras import check_extra

if TYPE_CHECKING:
    from cowest_dspy.experiment.experiment import Experiment

MOST_SAMPLES = 3


@dataclass(frozen=True)
class FittedRouter:
    """A run's router (also in its folder, as router.json), and its curve on the held-out examples
    (router_curve.json, router.html)."""

    router: Router
    curve: Curve
    written: WrittenPage


def fit_run_router(
    experiment: Experiment,
    *,
    within: float = 0.01,
    samples: int | None = None,
    likelihood: bool | None = None,
) -> FittedRouter:
    """Fit the router of a run for the best weak model that it has; write it and its curve into the
    run's folder.

    The dev split is answered by the strong model with and without the draft, as are test examples
    that no arm has asked yet; what the store knows is not asked again.

    Args:
        within: how much mean score, in [0, 1], it may lose against always collaborating, on the dev
            split.
        samples: further drafts of each input, to see how far they agree; by default up to 3 where
            every train example has so many.
        likelihood: whether to use the likelihood of drafts; by default where it can be had.

    Raises:
        RouterError: no traces, or of too few examples; no dev or test examples; the extra "route"
            is not installed.
        ConfigError: ``likelihood``, and the weak model gives none.
    """
    check_extra("route", "Fitting a router", RouterError)
    traces = Traces.load(experiment.store)
    if not len(traces):
        raise RouterError(
            f"{experiment.run} has no traces, which a router learns from: run `cowest collect` on "
            "it first."
        )
    program, config = experiment.best, experiment.config
    splits = {name: experiment.splits[name] for name in ("dev", config.evaluate.split)}
    if empty := [name for name, examples in splits.items() if not examples]:
        raise RouterError(
            f"The {empty[0]} split has no examples, and a router is chosen and tested on examples "
            "that it has not seen."
        )
    if samples is None:
        samples = 0 if config.collect.adaptive else min(MOST_SAMPLES, config.collect.drafts - 1)
    likelihood = scores_drafts(program) if likelihood is None else likelihood
    scorer = DraftLikelihood(program) if likelihood else None
    with experiment.context.stage("router traces", "Looking at the run's traces"):
        learned = observe_traces(traces, samples=samples, likelihood=scorer, program=program)
    asked = {
        name: _observed(experiment, program, examples, name, samples, scorer)
        for name, examples in splits.items()
    }
    router = fit_router(
        learned,
        choose_on=asked["dev"],
        within=within,
        samples=samples,
        temperature=config.collect.temperature,
        seed=config.seed,
    )
    router.save(experiment.run)
    curve = router_curve(router, asked[config.evaluate.split])
    written = write_curve(curve, experiment.run, f"{config.name}: the router")
    experiment.evaluate(["routed"])
    return FittedRouter(router, curve, written)


def _observed(
    experiment: Experiment,
    program: Collaboration,
    examples: list[dspy.Example],
    split: str,
    samples: int,
    scorer: DraftLikelihood | None,
) -> list[Observed]:
    config = experiment.config
    with experiment.context.stage(
        f"router {split}", f"Answering the {split} split in all three ways"
    ) as progress:
        return observe(
            program,
            examples,
            experiment.metric,
            samples=samples,
            temperature=config.collect.temperature,
            seed=config.seed,
            likelihood=scorer,
            store=experiment.store,
            threads=config.at_once("strong"),
            on_progress=progress,
        )
