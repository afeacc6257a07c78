"""A run's gate: fitted on its traces, the trade chosen on the dev split, and what it gives on the
test split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import dspy

from cowest_dspy.errors import GateError
from cowest_dspy.experiment.summary import kept_traces
from cowest_dspy.optimizers.router import (
    Curve,
    DraftLikelihood,
    Gate,
    Observed,
    fit_gate,
    gate_curve,
    observe,
    observed_in,
)
from cowest_dspy.optimizers.router.likelihood import scores_drafts
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.report.router_page import WrittenCurve, write_curve

if TYPE_CHECKING:
    from cowest_dspy.experiment.experiment import Experiment

MOST_SAMPLES = 3


@dataclass(frozen=True)
class FittedGate:
    """A run's gate (also in its folder, as gate.json), and its curve on the held-out examples
    (gate_curve.json, gate.html)."""

    gate: Gate
    curve: Curve
    written: WrittenCurve


def run_gate(
    experiment: Experiment,
    *,
    within: float = 0.01,
    samples: int | None = None,
    likelihood: bool | None = None,
) -> FittedGate:
    """Fits the gate of a run, for the best weak model that it has; writes it and its curve into the
    run's folder.

    The dev split is answered by the strong model with and without the draft, as are test examples
    that no arm has asked yet; what the store knows is not asked again.

    Args:
        within: how much mean score, in [0, 1], it may lose against always collaborating, on the dev
            split.
        samples: further drafts of each input, to see how far they agree; by default up to 3 where
            every train example has so many.
        likelihood: whether to see how likely the weak model finds its draft; by default where it
            can be had.

    Raises:
        GateError: no traces, or of too few examples; no dev or test examples.
        ConfigError: ``likelihood``, and the weak model's backend gives none.
    """
    traces = kept_traces(experiment.store)
    if not len(traces):
        raise GateError(
            f"{experiment.run} has no traces, which a gate learns from: run `cowest collect` on "
            "it first."
        )
    program, config = experiment.best, experiment.config
    splits = {name: experiment.splits[name] for name in ("dev", config.evaluate.split)}
    for name, examples in splits.items():
        if not examples:
            raise GateError(
                f"The {name} split has no examples, and a gate is chosen and tested on examples "
                "that it has not seen."
            )
    if samples is None:
        samples = 0 if config.collect.adaptive else min(MOST_SAMPLES, config.collect.drafts - 1)
    wanted = scores_drafts(program) if likelihood is None else likelihood
    scorer = DraftLikelihood(program) if wanted else None
    with experiment.context.stage("gate traces", "Looking at the run's traces"):
        learned = observed_in(traces, samples=samples, likelihood=scorer)
    asked = {
        name: _observed(experiment, program, examples, name, samples, scorer)
        for name, examples in splits.items()
    }
    gate = fit_gate(
        learned,
        choose_on=asked["dev"],
        within=within,
        samples=samples,
        temperature=config.collect.temperature,
        seed=config.seed,
    )
    gate.save(experiment.run)
    curve = gate_curve(gate, asked[config.evaluate.split])
    written = write_curve(curve, experiment.run, f"{config.name}: the gate")
    experiment.evaluate(["gated"])
    return FittedGate(gate, curve, written)


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
        f"gate {split}", f"Answering the {split} split in all three ways"
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
