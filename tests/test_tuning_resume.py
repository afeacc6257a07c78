"""Resuming a training: killed or stopped anywhere, it ends with the bits of one that nobody has disturbed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import killed_training
import pytest
from forked import child
from tuning_rows import kinds, labelled, pairs_with_one_turned_round, quick, sft_rows

from cowest_dspy.errors import TuningError
from cowest_dspy.tuning import DPO, KTO, SFT, Lora, checkpoints, train_dpo, train_kto, train_sft
from cowest_dspy.tuning.kept import keep, kept

# Dropout draws random numbers in every forward pass; two micro-batches make a step; 8 rows in 5 passes make 10 of them.
HARD: dict[str, Any] = quick(epochs=5, micro_batch_size=2, warmup=0.3, lora=Lora(rank=4, alpha=8, dropout=0.3))


class Stopped(Exception):
    """What the tests stop a training with."""


def train(kind: str, base: Path, output: Path, seed: int = 3, stop: int | None = None, **changes: Any) -> tuple[Any, list[int]]:
    """The result and the steps that were told; stopped after that many optimiser steps, the result is None."""
    told: list[int] = []

    def on_step(step: int, total: int, logs: dict[str, float]) -> None:
        told.append(step)
        if step == stop:
            raise Stopped

    run, settings, data = kinds(8)[kind]
    try:
        return run(settings(**HARD | changes), data, base=str(base), output=output, seed=seed, on_step=on_step), told
    except Stopped:
        return None, told


def left(output: Path) -> list[str]:
    return sorted(path.name for path in output.parent.iterdir() if path.name != output.name)


def same(one: Any, other: Any) -> bool:
    files = ("adapter_model.safetensors", "adapter_config.json")
    return one.history == other.history and all((one.path / f).read_bytes() == (other.path / f).read_bytes() for f in files)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_law_8_a_training_that_was_stopped_goes_on_to_the_same_bits(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    whole, told = train(kind, tiny_model, tmp_path / "whole")
    assert told == list(range(11))
    output = tmp_path / "twice" / "out"
    first, told = train(kind, tiny_model, output, stop=4, checkpoint_steps=1)
    assert first is None and told == [0, 1, 2, 3, 4]
    assert len(left(output)) == 1
    # What was drawn in between does not matter.
    random.random()
    second, told = train(kind, tiny_model, output, stop=8, checkpoint_steps=3)
    assert second is None and told == [3, 4, 5, 6, 7, 8]
    third, told = train(kind, tiny_model, output, checkpoint_steps=3)
    assert told == [6, 7, 8, 9, 10]
    assert same(third, whole)
    assert (third.tokens, third.trained_rows) == (whole.tokens, whole.trained_rows)
    assert left(output) == [], "the checkpoint goes when the adapter is there"


def evaluated(kind: str, base: Path, output: Path, stop: int | None = None, **changes: Any) -> Any:
    """A training with held-out rows, stopped after so many steps (None then); 12 steps if patience does not end it."""

    def on_step(step: int, total: int, logs: dict[str, float]) -> None:
        if step == stop:
            raise Stopped

    hard = quick(epochs=50, max_steps=12, micro_batch_size=2, learning_rate=5e-3, lr_scheduler="constant")
    hard |= {"lora": Lora(rank=4, alpha=8, dropout=0.2), "held_out": 0.4, "evaluate_every": 2} | changes
    pairs = pairs_with_one_turned_round()
    run, settings, data = {
        "sft": (train_sft, SFT, sft_rows(10)),
        "dpo": (train_dpo, DPO, pairs),
        "kto": (train_kto, KTO, labelled(pairs)),
    }[kind]
    try:
        return run(settings(**hard), data, base=str(base), output=output, seed=1, on_step=on_step)
    except Stopped:
        return None


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto"])
def test_law_8_evaluations_go_on_where_they_were(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    whole = evaluated(kind, tiny_model, tmp_path / "whole", checkpoint_steps=0)
    output = tmp_path / "twice" / "out"
    # After an evaluation, in the middle between two, and before the first.
    for stop in (2, 6, 9, 10):
        assert evaluated(kind, tiny_model, output, stop=stop, checkpoint_steps=1) is None
    again = evaluated(kind, tiny_model, output, checkpoint_steps=3)
    assert same(again, whole) and (again.best_step, again.stopped_early) == (whole.best_step, False)
    assert [record["step"] for record in again.history if "eval_loss" in record] == list(range(0, 13, 2))
    assert left(output) == []


def test_law_8_patience_and_the_best_adapter_outlive_a_process(tiny_model: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"patience": 3, "evaluate_every": 1, "max_steps": 30}
    whole = evaluated("dpo", tiny_model, tmp_path / "whole", **options)
    last = whole.history[-1]["step"]
    assert whole.stopped_early and last == whole.best_step + 3
    for back in (3, 2, 1):
        output = tmp_path / str(back) / "out"
        assert evaluated("dpo", tiny_model, output, stop=last - back + 1, checkpoint_steps=1, **options) is None
        again = evaluated("dpo", tiny_model, output, **options)
        assert same(again, whole) and (again.best_step, again.stopped_early) == (whole.best_step, True)
    # Without the best there is the last: it was another one.
    plain = evaluated("dpo", tiny_model, tmp_path / "last", keep_best=False, **options)
    assert plain.adapter_hash != whole.adapter_hash


def test_writing_checkpoints_changes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    without, _ = train("sft", tiny_model, tmp_path / "without", checkpoint_steps=0)
    every, _ = train("sft", tiny_model, tmp_path / "every", checkpoint_steps=1)
    assert same(without, every)


def test_a_checkpoint_is_written_about_every_minute(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, told = train("sft", tiny_model, tmp_path / "out", stop=4)
    assert left(tmp_path / "out") == [], "no minute has passed"
    monkeypatch.setattr(checkpoints, "SECONDS", 0.0)
    train("sft", tiny_model, tmp_path / "out", stop=4)
    _, told = train("sft", tiny_model, tmp_path / "out")
    assert told[0] == 3


@pytest.mark.parametrize("change", [{"seed": 4}, {"learning_rate": 1e-3}, {"epochs": 4}])
def test_the_checkpoint_of_another_training_is_not_taken(change: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    train("sft", tiny_model, tmp_path / "out", stop=4, checkpoint_steps=1)
    _, told = train("sft", tiny_model, tmp_path / "out", checkpoint_steps=1, **change)
    assert told[0] == 0
    assert left(tmp_path / "out") == [], "that of the other was for this output, too"


def test_other_rows_another_base_and_another_start_are_other_trainings(tiny_model: Path, tmp_path: Path) -> None:
    made = {
        checkpoints.Checkpoint(tmp_path / "out", {"rows": rows, "start": start}, None).path.name
        for rows in (sft_rows(2), sft_rows(3))
        for start in ("aaaaaaaaaaaa-new", "bbbbbbbbbbbb-new", "aaaaaaaaaaaa-cccccccccccc")
    }
    assert len(made) == 6


def test_a_damaged_checkpoint_is_not_taken(tiny_model: Path, tmp_path: Path) -> None:
    train("sft", tiny_model, tmp_path / "out", stop=4, checkpoint_steps=1)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    _, told = train("sft", tiny_model, tmp_path / "out", checkpoint_steps=1)
    assert told[0] == 0


def test_a_training_that_must_not_go_on_leaves_no_checkpoint(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(TuningError, match="diverged"):
        train("sft", tiny_model, tmp_path / "out", learning_rate=1e30, warmup=0, checkpoint_steps=1)
    assert list(tmp_path.iterdir()) == []


def test_only_the_checkpoints_of_this_output_are_deleted(tmp_path: Path) -> None:
    mine = checkpoints.Checkpoint(tmp_path / "out", {}, 1)
    names = [mine.path.name, f"{mine.path.name}.77.partial", ".out.x.0123456789ab.checkpoint", ".out.0123456789ab.tmp", "out"]
    for name in names:
        (tmp_path / name).write_text("")
    mine.delete()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[2:])


def test_nothing_in_a_checkpoint_is_pickled(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    train("sft", tiny_model, tmp_path / "out", stop=4, checkpoint_steps=1)
    (path,) = tmp_path.iterdir()
    tensors, facts = kept(path) or ({}, {})
    assert set(tensors) == set(load_file(path))
    assert {name.split(".")[0] for name in tensors} == {"weight", "optimizer", "chance"}
    assert facts["step"] == 3 and [record["step"] for record in facts["history"]] == [1, 2, 3]
    assert facts["seconds"] > 0


def test_what_is_kept_comes_back_with_the_same_bits_or_not_at_all(tmp_path: Path) -> None:
    import torch

    path, numbers = tmp_path / "deep" / "kept", [0.1, 1 / 3, 5e-324, 1.7976931348623157e308]
    tensors = {"a": torch.rand(3, 2), "b": torch.tensor(7, dtype=torch.int64), "c": torch.rand(4).bfloat16()}
    assert kept(path) is None
    keep(path, tensors, {"numbers": numbers})
    found, facts = kept(path) or ({}, {})
    assert facts == {"numbers": numbers}
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items())
    assert [one.name for one in path.parent.iterdir()] == ["kept"]
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert kept(path) is None, f"byte {place} was changed"
    path.write_bytes(content[:-3])
    assert kept(path) is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
def test_of_a_process_that_is_killed_while_it_writes_nothing_stays(tmp_path: Path) -> None:
    """safetensors (0.8) writes into a file with a name of its own choice, which it renames in the end."""
    import resource

    import torch

    mine = checkpoints.Checkpoint(tmp_path / "out", {}, 1)
    keep(mine.path, {"a": torch.zeros(9)}, {})

    def killed() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        keep(mine.path, {"a": torch.zeros(100_000)}, {})

    for _ in range(2):
        _, status = os.waitpid(child(killed), 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXFSZ
        assert len(list(tmp_path.iterdir())) == 2, "what was kept, and what was begun last"
    tensors, _ = kept(mine.path) or ({}, {})
    assert tensors["a"].shape == (9,), "that of before is whole"
    mine.delete()
    assert list(tmp_path.iterdir()) == []
    os.waitpid(child(killed), 0)
    keep(mine.path, {"a": torch.zeros(9)}, {})
    assert list(tmp_path.iterdir()) == [mine.path], "the next one to write takes away what was left"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
@pytest.mark.parametrize("kind", ["sft", "dpo", "held"])
def test_law_8_a_training_killed_again_and_again_gives_the_same_bits(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    script = [sys.executable, killed_training.__file__, str(tmp_path), str(tiny_model), kind, "5"]
    done = subprocess.run(script, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["same"], "weights, settings and history are those of a training that nobody has killed"
    assert found["kills"] == killed_training.KILLS
    # Each life began at the last checkpoint of the one before it, so hardly anything was done twice.
    assert found["began"][0] == 0 and all(later > 0 for later in found["began"][1:])
    assert found["began"] == sorted(found["began"])
    assert found["left"] == []
    if kind == "held":
        assert 0 < found["best"] < max(found["began"]) < found["steps"], "the best was found in an earlier life"


def test_a_resumed_training_needs_no_other_machine_state(tiny_model: Path, tmp_path: Path) -> None:
    # The settings say how often, not what: a checkpoint of the one is that of the other.
    train("sft", tiny_model, tmp_path / "out", stop=6, checkpoint_steps=2)
    run, data = train_sft, sft_rows(8)
    told: list[int] = []
    settings = SFT(**HARD)
    run(settings, data, base=str(tiny_model), output=tmp_path / "out", seed=3, on_step=lambda step, *_: told.append(step))
    assert told[0] == 4
