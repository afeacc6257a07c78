"""How often the prompt optimisers of [cycle] run the program, reckoned from their settings before
any of them is begun.

    asked(StepRules(optimizer="GEPA", settings={"max_metric_calls": 300}), train=200, dev=40)
    # Asked(runs=300, most_runs=346, proposals=44, most_proposals=88, judged=True)

What the settings leave open has DSPy's own defaults. That the draft and the refinement are one call
each is assumed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import dspy

from cowest_dspy.optimizers.config import StepRules

Settings = Callable[[str], Any]
# GEPA looks at its limit between two tries: a try runs a merged program on so many examples, and on
# all of dev
OVERSHOOT = 5


@dataclass(frozen=True)
class Asked:
    """Runs of the program (a draft and its refinement), and calls of the strong model that writes
    prompts: as many as are expected, and at most. ``judged``: the step's metric is the influence,
    so that each example is answered alone, too."""

    runs: int
    most_runs: int
    proposals: int = 0
    most_proposals: int = 0
    judged: bool = False


def asked(rules: StepRules, train: int, dev: int) -> Asked | None:
    """What a step asks when the splits have these sizes; None for an optimiser of one's own, of
    which nobody knows.

    GEPA's runs are its budget, and what one more try may take. What bootstraps demonstrations is
    expected to find every second answer right, and at most to try every train example. SIMBA's and
    MIPROv2's trials are counted; how many prompts they have written is estimated.
    """
    known = {
        "GEPA": _gepa,
        "MIPROv2": _miprov2,
        "SIMBA": _simba,
        "BootstrapFewShot": _few_shot,
        "BootstrapFewShotWithRandomSearch": _random_search,
        "LabeledFewShot": lambda *_: Asked(0, 0),
    }.get(rules.optimizer)
    if known is None:
        return None
    made, compiled = (
        _defaults(getattr(dspy, rules.optimizer), name) for name in ("__init__", "compile")
    )

    def setting(name: str) -> Any:
        for given in (rules.compile, rules.settings, compiled, made):
            if given.get(name) is not None:
                return given[name]
        return None

    return known(setting, 1 if rules.target != "both" else 2, train, dev)


def _defaults(kind: type, method: str) -> Mapping[str, Any]:
    parameters = inspect.signature(getattr(kind, method)).parameters.values()
    return {
        one.name: one.default for one in parameters if one.default is not inspect.Parameter.empty
    }


def _gepa(setting: Settings, predictors: int, train: int, dev: int) -> Asked:
    if setting("auto"):
        candidates = {"light": 6, "medium": 12, "heavy": 18}[setting("auto")]
        budget = cast("Any", dspy.GEPA).auto_budget(None, predictors, candidates, dev)
    else:
        budget = setting("max_metric_calls") or (setting("max_full_evals") or 0) * (train + dev)
    batch = setting("reflection_minibatch_size")
    budget = max(budget, dev)
    most = budget + max(2 * batch, OVERSHOOT) + dev
    # A try runs the program on a minibatch, has new prompts written, and runs it on the minibatch
    # again.
    parts = predictors if setting("component_selector") == "all" else 1
    tries, most_tries = -(-(budget - dev) // (2 * batch)), -(-(budget - dev) // batch)
    return Asked(budget, most, parts * tries, parts * most_tries, judged=True)


def _miprov2(setting: Settings, predictors: int, train: int, dev: int) -> Asked:
    shots = max(setting("max_bootstrapped_demos"), setting("max_labeled_demos"))
    candidates = setting("num_candidates")
    minibatch, trials = setting("minibatch"), setting("num_trials")
    if candidates is None:
        candidates, size = {"light": (6, 100), "medium": (12, 300), "heavy": (18, 1000)}[
            setting("auto")
        ]
        dev = min(dev, size)
        minibatch = dev > 50
        finder = cast("Any", dspy.MIPROv2._set_num_trials_from_num_candidates)
        trials = finder(None, _Predictors(predictors), not shots, candidates)
        instructions = candidates if not shots else candidates // 2
    else:
        instructions = candidates
    every = setting("minibatch_full_eval_steps")
    # The program as it was; then trials, and between them the best so far on all of dev.
    full = trials // every + 1 + (trials % every != 0) if minibatch else 0
    evaluated = dev + trials * (setting("minibatch_size") if minibatch else dev) + full * dev
    demos = setting("max_bootstrapped_demos") if shots else 3
    expected, most = _bootstrapped(demos, 1, train)
    sets = max(0, candidates - 2)
    proposals = (
        10
        + instructions * predictors
        + (predictors + 1 if setting("program_aware_proposer") else 0)
    )
    return Asked(
        evaluated + sets * expected,
        evaluated + sets * most,
        proposals,
        12 + 3 * max(instructions, candidates) * predictors,
    )


@dataclass(frozen=True)
class _Predictors:
    """As much of a program as MIPROv2 looks at for the number of its trials."""

    count: int

    def predictors(self) -> range:
        return range(self.count)


def _simba(setting: Settings, predictors: int, train: int, dev: int) -> Asked:
    steps, batch, candidates = setting("max_steps"), setting("bsize"), setting("num_candidates")
    runs = steps * batch * (2 * candidates + 1) + min(candidates + 1, steps + 1) * train
    # Each candidate gets a demonstration or a rule; only a rule is written by a model.
    rules = steps * (candidates + 1)
    return Asked(runs, runs, rules // 2 if setting("max_demos") else rules, steps * batch)


def _few_shot(setting: Settings, predictors: int, train: int, dev: int) -> Asked:
    return Asked(*_bootstrapped(setting("max_bootstrapped_demos"), setting("max_rounds"), train))


def _random_search(setting: Settings, predictors: int, train: int, dev: int) -> Asked:
    programs = setting("num_candidate_programs")
    expected, most = _bootstrapped(setting("max_bootstrapped_demos"), setting("max_rounds"), train)
    evaluated = (programs + 3) * dev
    return Asked(evaluated + (programs + 1) * expected, evaluated + (programs + 1) * most)


def _bootstrapped(demos: int, rounds: int, train: int) -> tuple[int, int]:
    """Runs that it takes to find so many demonstrations: when every second answer is right, and at
    most."""
    return min(train, 2 * demos), train * rounds
