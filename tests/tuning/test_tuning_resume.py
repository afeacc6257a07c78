"""Resuming a training: killed or stopped anywhere, it ends with the bits of one that nobody has
disturbed."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from tiny import make_tiny_model
from tuning_fixtures import modules_are_no_garbage  # noqa: F401 - fixtures
from tuning_rows import HARD, left, same, sft_rows, train

from cowest_dspy.errors import TuningError
from cowest_dspy.tuning import SFT, train_adapter, trainers
from cowest_dspy.tuning import train as training
from cowest_dspy.utils import interrupts


def test_writing_checkpoints_changes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    without, _ = train("sft", tiny_model, tmp_path / "without", save_steps=0)
    every, _ = train("sft", tiny_model, tmp_path / "every", save_steps=1)
    assert same(without, every)


def test_a_checkpoint_is_written_about_every_minute(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train("sft", tiny_model, tmp_path / "out", stop=4)
    assert left(tmp_path / "out") == [], "no minute has passed"
    monkeypatch.setattr(trainers, "SAVE_SECONDS", 0.0)
    train("sft", tiny_model, tmp_path / "out", stop=4)
    _, told = train("sft", tiny_model, tmp_path / "out")
    assert told[0] == 3


@pytest.mark.parametrize("change", [{"seed": 4}, {"learning_rate": 1e-3}, {"num_train_epochs": 4}])
def test_the_checkpoint_of_another_training_is_not_taken(
    change: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    train("sft", tiny_model, tmp_path / "out", stop=4, save_steps=1)
    _, told = train("sft", tiny_model, tmp_path / "out", save_steps=1, **change)
    assert told[0] == 0
    assert left(tmp_path / "out") == [], "that of the other was for this output, too"


def test_other_rows_another_base_and_another_start_are_other_trainings(
    first_sft: Any, tiny_model: Path, tmp_path: Path
) -> None:
    bases = tiny_model, make_tiny_model(tmp_path / "other", seed=1)

    def folder(base: Path, adapter: Path | None, rows: int, **settings: Any) -> str:
        made = SFT(**settings)
        plan = training.plan_training(made, sft_rows(rows), str(base), adapter, 0)
        return training._checkpoint_folder(made, plan, tmp_path / "out").name

    made = {
        folder(base, adapter, rows)
        for rows in (2, 3)
        for base, adapter in ((bases[0], None), (bases[1], None), (bases[0], first_sft.path))
    }
    assert len(made) == 6
    assert folder(bases[0], None, 2, save_steps=7) in made, "how often it is saved decides nothing"


def test_a_checkpoint_that_was_not_written_whole_is_not_taken(
    tiny_model: Path, tmp_path: Path
) -> None:
    train("sft", tiny_model, tmp_path / "out", stop=4, save_steps=1)
    (folder,) = tmp_path.iterdir()
    (checkpoint,) = folder.glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-3", "the one before it is gone"
    state = checkpoint / "trainer_state.json"
    state.write_text(state.read_text()[:-20])
    _, told = train("sft", tiny_model, tmp_path / "out", save_steps=1)
    assert told[0] == 0


def test_a_training_that_must_not_go_on_leaves_no_checkpoint(
    tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(TuningError, match="diverged"):
        train("sft", tiny_model, tmp_path / "out", learning_rate=1e30, warmup_steps=0, save_steps=1)
    assert list(tmp_path.iterdir()) == []


def test_nothing_in_a_checkpoint_is_unpickled(tiny_model: Path, tmp_path: Path) -> None:
    # The optimiser's state is a file of torch.save, read with weights_only: code in it is refused.
    import torch

    train("sft", tiny_model, tmp_path / "out", stop=4, save_steps=1)
    (optimizer,) = tmp_path.glob(".out.*/checkpoint-3/optimizer.pt")
    touched = tmp_path / "touched"

    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (touched,)

    torch.save({"state": Code()}, optimizer)
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        train("sft", tiny_model, tmp_path / "out", save_steps=1)
    assert not touched.exists()


def test_a_signal_stops_after_a_step_and_the_training_resumes_with_the_same_bits(
    tiny_model: Path, tmp_path: Path
) -> None:
    whole, _ = train("sft", tiny_model, tmp_path / "whole")
    steps: list[int] = []

    def on_step(step: int, total: int, logs: dict[str, float]) -> None:
        steps.append(step)
        if step == 4 and len(steps) == 5:
            signal.raise_signal(signal.SIGTERM)

    def run() -> Any:
        return train_adapter(
            SFT(**HARD),
            sft_rows(8),
            base=str(tiny_model),
            output=tmp_path / "out",
            seed=3,
            on_step=on_step,
        )

    with (
        pytest.raises(interrupts.Interrupted),
        interrupts.handle_signals(),
        interrupts.postponing(),
    ):
        run()
    (state,) = tmp_path.glob(".out.*/checkpoint-*/trainer_state.json")
    assert json.loads(state.read_text())["global_step"] == steps[-1] == 5
    assert same(run(), whole)
    assert steps == [0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10]


def test_a_resumed_training_needs_no_other_machine_state(tiny_model: Path, tmp_path: Path) -> None:
    # The settings say how often, not what: a checkpoint of the one is that of the other.
    train("sft", tiny_model, tmp_path / "out", stop=6, save_steps=2)
    _, told = train("sft", tiny_model, tmp_path / "out")
    assert told[0] == 4
