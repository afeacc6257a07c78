"""Law 12: what is compared is compared on the same examples, by a paired test."""

from __future__ import annotations

from pathlib import Path

from toy_experiment import (
    task,  # noqa: F401 - fixtures
)

from cowest_dspy import Experiment, load_config


def test_law_12_all_arms_answer_the_same_held_out_questions(
    task: list[Path], tmp_path: Path
) -> None:
    with Experiment(load_config(task), tmp_path / "run") as experiment:
        arms = experiment.evaluate(["strong", "oracle"])
        train = {example.id for example in experiment.splits["train"]}
    asked = [[answer.example_id for answer in arm.answers] for arm in arms]
    assert asked[0] == asked[1] and not train & set(asked[0])
