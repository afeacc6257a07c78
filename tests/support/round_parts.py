"""A student of scripted and tiny models, and its examples, for tests of rounds and cycles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import dspy
import pytest

from cowest_dspy import DPO, SFT, Collaboration, CoWest, LineAdapter, tune
from cowest_dspy.lms import LocalEngine
from cowest_dspy.optimizers.config import RoundRules
from cowest_dspy.pairs.config import PairRules
from cowest_dspy.testing import ScriptedEngine
from cowest_dspy.tuning import tunable

VOWELS = 3


def strong_that_counts(request: dict[str, Any]) -> str:
    """Says yes to a background with enough different vowels in it; alone it says no."""
    text = request["messages"][-1]["content"]
    return "yes" if len(set("aeiou") & set(text.partition("Background: ")[2])) >= VOWELS else "no"


def examples(name: str, count: int) -> list[dspy.Example]:
    return [
        dspy.Example(question=f"{name} {i}?", answer="yes").with_inputs("question")
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def taught(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dspy.LM:
    """A tiny weak model that has learned to write a few letters, some with more vowels than
    others."""
    texts = ["a e i", "b c d", "o u a", "x"]
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Question: {i}?"}],
            "completion": [{"role": "assistant", "content": text}],
        }
        for i in range(4)
        for text in texts
    ]
    settings = SFT(max_steps=80, num_train_epochs=80, learning_rate=2e-2, bf16=False)
    weak = tunable(LocalEngine(tiny_model).lm(temperature=0.0, max_tokens=12))
    return tune(weak, rows, settings, tmp_path_factory.mktemp("taught") / "adapter").lm


@pytest.fixture
def student(taught: dspy.LM) -> Collaboration:
    strong = ScriptedEngine(strong_that_counts, model="scripted/strong").lm()
    return Collaboration("question -> answer", adapter=LineAdapter()).bind(
        weak=taught, strong=strong
    )


def match(example: dspy.Example, prediction: Any, trace: Any = None) -> float:
    return float(prediction.answer == example.answer)


def rules(**values: Any) -> RoundRules:
    return RoundRules.model_validate(values)


ALWAYS: dict[str, Any] = {"least_gain": -1.0}
NEVER: dict[str, Any] = {"least_gain": 1.0}


QUICK_DPO = DPO(
    max_steps=2, bf16=False, per_device_train_batch_size=2, gradient_accumulation_steps=1
)


def quick_cowest(
    log_dir: Path | None = None,
    tuner: Any = QUICK_DPO,
    *,
    least: int = 2,
    processes: int = 1,
    trainer_callbacks: Sequence[Any] = (),
    **values: Any,
) -> CoWest:
    """Rounds that take two optimiser steps each; ``values`` are those of [rounds]."""
    return CoWest(
        match,
        tuner,
        6,
        rules(**values),
        pairs=PairRules.model_validate({"least": least}),
        max_errors=1.0,
        processes=processes,
        trainer_callbacks=trainer_callbacks,
        log_dir=log_dir,
    )


@pytest.fixture
def optimizer(tmp_path: Path) -> Callable[..., CoWest]:
    def make(folder: str = "run", **values: Any) -> CoWest:
        return quick_cowest(tmp_path / folder, **values)

    return make
