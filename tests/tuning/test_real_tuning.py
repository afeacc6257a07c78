"""Tuning of the demo's weak model through DSPy's own optimiser. Slow tier; `make models` fetches
the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dspy
import pytest

from cowest_dspy.lms import LocalEngine
from cowest_dspy.lms.local.weights import adapter_hash
from cowest_dspy.program.adapters import LineAdapter
from cowest_dspy.testing import ScriptedEngine
from cowest_dspy.tuning import SFT, Lora, tunable

pytestmark = pytest.mark.slow

# Of an invented plant: the model cannot know it.
LIMITS = {"Arbel": "31 bar", "Morva": "18 bar", "Tessin": "24 bar", "Quiro": "42 bar"}


def test_bootstrap_finetune_of_dspy_teaches_the_real_weak_model(
    real_models: Path, tmp_path: Path
) -> None:
    """What a teacher knows, and what its metric lets through: a wrong answer of the teacher is not
    learnt."""
    engine = LocalEngine(real_models / "SmolLM2-135M-Instruct")
    student = dspy.Predict(dspy.make_signature("question -> answer", "Answer from the handbook."))
    student.set_lm(tunable(engine.lm(temperature=0.0, max_tokens=12)))
    knows = LIMITS | {"Quiro": "7 bar"}
    teacher = student.deepcopy()

    def said(ask: dict) -> str:
        content = ask["messages"][-1]["content"]
        return next(limit for name, limit in knows.items() if name in content)

    teacher.set_lm(ScriptedEngine(said, model="scripted/teacher").lm())
    train = [
        dspy.Example(
            question=f"What is the pressure limit of the {name}?", answer=limit
        ).with_inputs("question")
        for name, limit in LIMITS.items()
    ]

    def right(example: Any, made: Any, trace: Any = None) -> bool:
        return made.answer == example.answer

    settings = SFT(
        num_train_epochs=16,
        learning_rate=1e-3,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=1,
        lora=Lora(r=16),
    )
    options = {"settings": settings, "output": tmp_path / "student"}
    with dspy.context(adapter=LineAdapter()):
        before = [right(example, student(**example.inputs())) for example in train]
        optimizer = dspy.BootstrapFinetune(metric=right, train_kwargs=options, num_threads=1)
        tuned: Any = optimizer.compile(student, trainset=train, teacher=teacher)
        answers = {
            name: tuned(**example.inputs()).answer
            for name, example in zip(LIMITS, train, strict=True)
        }
    engine.close()
    assert sum(before) == 0
    assert [name for name in LIMITS if answers[name] == LIMITS[name]] == [
        "Arbel",
        "Morva",
        "Tessin",
    ]
    assert answers["Quiro"] != "7 bar"
    assert tuned.lm.model.endswith(f"+{adapter_hash(tmp_path / 'student')}")
