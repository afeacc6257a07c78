"""BetterTogether with GEPA and with MIPROv2 around CoWest, on a real small model in this process.
Slow tier.

SmolLM2 drafts and refines, and for GEPA it proposes instructions; MIPROv2 asks for an answer in
fields, which takes a larger model. Neither proposes good ones: what is tested is that everything
runs for real, and that weights are tuned on the sampled drafts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dspy
import pytest
from scripted import miprov2

from cowest_dspy import DPO, Collaboration, CoWest, LineAdapter
from cowest_dspy.lms import LocalEngine
from cowest_dspy.optimizers.config import RoundRules
from cowest_dspy.pairs.config import PairRules
from cowest_dspy.tuning import tunable

pytestmark = pytest.mark.slow

CITIES = ["France", "Italy", "Japan", "Spain", "Kenya", "Chile", "Norway", "Egypt", "India", "Cuba"]


def short(
    example: dspy.Example,
    prediction: Any,
    trace: Any = None,
    pred_name: Any = None,
    pred_trace: Any = None,
) -> Any:
    """The fewer letters the better, down to none: graded, so that drafts differ in influence."""
    score = 1 / (1 + len(str(prediction.answer)) / 20)
    return (
        score
        if pred_name is None
        else dspy.Prediction(score=score, feedback="Answer in fewer words.")
    )


def optimizer(name: str, lm: dspy.LM) -> Any:
    if name == "gepa":
        return dspy.GEPA(
            metric=short,
            max_metric_calls=8,
            reflection_lm=lm,
            reflection_minibatch_size=2,
            num_threads=4,
        )
    return miprov2(short, lm, candidates=2, threads=4)


@pytest.mark.parametrize("prompts", ["gepa", "miprov2"])
def test_better_together_runs_for_real(prompts: str, real_models: Path, tmp_path: Path) -> None:
    engine = LocalEngine(real_models / "SmolLM2-135M-Instruct")
    weak, strong = (
        tunable(engine.lm(temperature=0.0, max_tokens=64)),
        engine.lm(temperature=0.0, max_tokens=64),
    )
    student = Collaboration("question -> answer", adapter=LineAdapter()).bind(
        weak=weak, strong=strong
    )
    rows = [
        dspy.Example(question=f"What is the capital of {name}?", answer="?").with_inputs("question")
        for name in CITIES
    ]
    weights = CoWest(
        short,
        DPO(
            max_steps=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=1,
            learning_rate=1e-3,
        ),
        3,
        RoundRules.model_validate({"least_gain": -1.0, "more_failures": 1.0}),
        pairs=PairRules.model_validate({"least": 1, "margin": 0.01}),
        max_errors=1.0,
        log_dir=tmp_path / "run",
    )
    larger = LocalEngine(real_models / "Qwen2.5-Coder-1.5B-Instruct", dtype="int8")
    proposing = (engine if prompts == "gepa" else larger).lm(temperature=1.0, max_tokens=200)
    both = dspy.BetterTogether(metric=short, p=optimizer(prompts, proposing), w=weights)
    more = {
        "num_trials": 2,
        "minibatch": False,
        "program_aware_proposer": False,
        "data_aware_proposer": False,
    }
    best: Any = both.compile(
        student,
        trainset=rows[:6],
        valset=rows[6:],
        strategy="p -> w",
        optimizer_compile_args={"p": more} if prompts == "miprov2" else {},
    )
    assert not best.flag_compilation_error_occurred
    tuned = {one["strategy"]: one["program"].weak.model for one in best.candidate_programs}
    assert len(tuned) == 3 and tuned["p"] == tuned[""] == student.weak.model != tuned["p -> w"]
    engine.close()
    larger.close()
