"""What prompt optimisers ask, reckoned from their settings: held against what each of them really
asks of scripted models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dspy
import pytest
from scripted import grading, proposer, questions, strong_that_reads, together, weak_that_obeys

from cowest_dspy import Cycle, Influence
from cowest_dspy.experiment.quote import NONE, StepCalls, count_step, up_to
from cowest_dspy.optimizers.config import StepRules
from cowest_dspy.program.collaboration import Collaboration

TRAIN, DEV = 12, 5
FEW = {"max_bootstrapped_demos": 2, "max_labeled_demos": 0}
MIPRO = {"num_trials": 4, "program_aware_proposer": False, "data_aware_proposer": False}
STEPS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("GEPA", {"max_metric_calls": 40, "reflection_minibatch_size": 2}, {}),
    (
        "GEPA",
        {"max_metric_calls": 40, "reflection_minibatch_size": 3, "component_selector": "all"},
        {},
    ),
    ("GEPA", {"max_full_evals": 2}, {}),
    ("MIPROv2", {"auto": None, "num_candidates": 4, **FEW}, {**MIPRO, "minibatch": False}),
    (
        "MIPROv2",
        {"auto": None, "num_candidates": 3, **FEW},
        {**MIPRO, "minibatch_size": 2, "minibatch_full_eval_steps": 3},
    ),
    ("MIPROv2", {"auto": "light", "max_bootstrapped_demos": 0, "max_labeled_demos": 0}, {}),
    ("SIMBA", {"bsize": 6, "num_candidates": 2, "max_steps": 2, "max_demos": 1}, {}),
    ("BootstrapFewShot", FEW, {}),
    ("BootstrapFewShotWithRandomSearch", {**FEW, "num_candidate_programs": 2}, {}),
    ("LabeledFewShot", {"k": 2}, {}),
]


def rules(**values: Any) -> StepRules:
    return StepRules.model_validate(values)


def really_asked(
    optimizer: str, settings: dict[str, Any], compiled: dict[str, Any], target: Any, run: Path
) -> tuple[int, int]:
    """Runs of the program and prompts asked for, by a step of a cycle; each question counts,
    whether a store knows it or not."""
    runs: list[Any] = []
    prompts: list[str] = []
    lm = proposer(prompts)
    questioned: list[Any] = []

    class Counted(Collaboration):
        def forward(self, **inputs: Any) -> dspy.Prediction:
            runs.append(inputs)
            return super().forward(**inputs)

    program = together(weak_that_obeys(every=5), strong_that_reads())
    program.__class__ = Counted

    def match(example: dspy.Example, prediction: Any, trace: Any = None) -> float:
        return float(prediction.answer == example.answer)

    def make(now: Collaboration) -> Any:
        questioned.append(len(runs))
        given = {
            "GEPA": {"metric": Influence(match, now), "reflection_lm": lm, "num_threads": 1},
            "MIPROv2": {"metric": match, "prompt_model": lm, "task_model": lm, "num_threads": 1},
            "SIMBA": {"metric": match, "prompt_model": lm, "num_threads": 1},
            "LabeledFewShot": {},
        }.get(optimizer, {"metric": match})
        return getattr(dspy, optimizer)(**given, **settings)

    split = questions(TRAIN + DEV)
    cycle = Cycle(
        match,
        "step",
        {"step": make},
        targets={"step": target},
        compile_args={"step": compiled},
        log_dir=run,
    )
    cycle.compile(program, trainset=split[:TRAIN], valset=split[TRAIN:])
    # The cycle's own evaluations, before and after, are not the optimiser's.
    return len(runs) - questioned[0] - DEV, len(prompts)


@pytest.mark.parametrize("target", ["draft", "both"])
@pytest.mark.parametrize(("optimizer", "settings", "compiled"), STEPS)
def test_an_optimiser_asks_at_most_what_was_reckoned(
    optimizer: str, settings: dict[str, Any], compiled: dict[str, Any], target: Any, tmp_path: Path
) -> None:
    found = count_step(
        rules(optimizer=optimizer, settings=settings, compile=compiled, target=target), TRAIN, DEV
    )
    assert found is not None
    runs, prompts = really_asked(optimizer, settings, compiled, target, tmp_path / "run")
    assert runs <= found.runs.most and found.runs.expected <= found.runs.most
    assert prompts <= found.prompts.most and found.prompts.expected <= found.prompts.most
    # It is no bound that is kept by being far away.
    assert runs >= found.runs.most / 3 and (runs > 0) == (found.runs.most > 0)


def test_what_is_given_counts_more_than_the_defaults_of_dspy() -> None:
    assert count_step(rules(optimizer="LabeledFewShot"), 100, 10) == StepCalls(NONE)
    few_shot = count_step(rules(optimizer="BootstrapFewShot"), 100, 10)
    assert few_shot == StepCalls(up_to(8, 100))
    # Two demonstrations each for an unshuffled set and 3 others; 6 programs on dev.
    small = {"max_bootstrapped_demos": 2, "num_candidate_programs": 3}
    made = count_step(rules(optimizer="BootstrapFewShotWithRandomSearch", settings=small), 100, 10)
    assert made == StepCalls(up_to(60 + 16, 60 + 400))
    assert count_step(rules(optimizer="recipe.py:make"), 100, 10) is None
    # Of 300 runs 40 are the first look at dev; a try takes two minibatches of 3, and asks for one
    # prompt.
    made = count_step(rules(optimizer="GEPA", settings={"max_metric_calls": 300}), 100, 40)
    assert made == StepCalls(up_to(300, 300 + 6 + 40), up_to(44, 87), judged=True)
    modes: list[tuple[Any, int]] = [("light", 1), ("medium", 2), ("heavy", 3)]
    for auto, more in modes:
        made = count_step(rules(optimizer="GEPA", settings={"auto": auto}, target="draft"), 100, 40)
        budget: Any = dspy.GEPA(metric=grading, auto=auto, reflection_lm=proposer([]))
        assert made and made.runs.expected == budget.auto_budget(1, 6 * more, 40)
