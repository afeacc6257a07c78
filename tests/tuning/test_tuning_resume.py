"""Resuming a training: killed or stopped anywhere, it ends with the bits of one that nobody has
disturbed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from forked import child
from tuning_rows import HARD, left, same, sft_rows, train

from cowest_dspy.errors import TuningError
from cowest_dspy.tuning import SFT, checkpoints, train_sft
from cowest_dspy.tuning.kept import keep, kept


def test_writing_checkpoints_changes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    without, _ = train("sft", tiny_model, tmp_path / "without", save_steps=0)
    every, _ = train("sft", tiny_model, tmp_path / "every", save_steps=1)
    assert same(without, every)


def test_a_checkpoint_is_written_about_every_minute(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, told = train("sft", tiny_model, tmp_path / "out", stop=4)
    assert left(tmp_path / "out") == [], "no minute has passed"
    monkeypatch.setattr(checkpoints, "SECONDS", 0.0)
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
    tiny_model: Path, tmp_path: Path
) -> None:
    made = {
        checkpoints.Checkpoint(tmp_path / "out", {"rows": rows, "start": start}, None).path.name
        for rows in (sft_rows(2), sft_rows(3))
        for start in ("aaaaaaaaaaaa-new", "bbbbbbbbbbbb-new", "aaaaaaaaaaaa-cccccccccccc")
    }
    assert len(made) == 6


def test_a_damaged_checkpoint_is_not_taken(tiny_model: Path, tmp_path: Path) -> None:
    train("sft", tiny_model, tmp_path / "out", stop=4, save_steps=1)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    _, told = train("sft", tiny_model, tmp_path / "out", save_steps=1)
    assert told[0] == 0


def test_a_training_that_must_not_go_on_leaves_no_checkpoint(
    tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(TuningError, match="diverged"):
        train("sft", tiny_model, tmp_path / "out", learning_rate=1e30, warmup_steps=0, save_steps=1)
    assert list(tmp_path.iterdir()) == []


def test_only_the_checkpoints_of_this_output_are_deleted(tmp_path: Path) -> None:
    mine = checkpoints.Checkpoint(tmp_path / "out", {}, 1)
    names = [
        mine.path.name,
        f"{mine.path.name}.77.partial",
        ".out.x.0123456789ab.checkpoint",
        ".out.0123456789ab.tmp",
        "out",
    ]
    for name in names:
        (tmp_path / name).write_text("")
    mine.delete()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[2:])


def test_nothing_in_a_checkpoint_is_pickled(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    train("sft", tiny_model, tmp_path / "out", stop=4, save_steps=1)
    (path,) = tmp_path.iterdir()
    tensors, facts = kept(path) or ({}, {})
    assert set(tensors) == set(load_file(path))
    assert {name.split(".")[0] for name in tensors} == {"weight", "optimizer", "chance"}
    assert facts["step"] == 3 and [record["step"] for record in facts["history"]] == [1, 2, 3]
    assert facts["seconds"] > 0


def test_what_is_kept_comes_back_with_the_same_bits_or_not_at_all(tmp_path: Path) -> None:
    import torch

    path, numbers = tmp_path / "deep" / "kept", [0.1, 1 / 3, 5e-324, 1.7976931348623157e308]
    tensors = {
        "a": torch.rand(3, 2),
        "b": torch.tensor(7, dtype=torch.int64),
        "c": torch.rand(4).bfloat16(),
    }
    assert kept(path) is None
    keep(path, tensors, {"numbers": numbers})
    found, facts = kept(path) or ({}, {})
    assert facts == {"numbers": numbers}
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
        for name, tensor in tensors.items()
    )
    assert [one.name for one in path.parent.iterdir()] == ["kept"]
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert kept(path) is None, f"byte {place} was changed"
    path.write_bytes(content[:-3])
    assert kept(path) is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
def test_of_a_process_that_is_killed_while_it_writes_nothing_stays(tmp_path: Path) -> None:
    """safetensors (0.8) writes into a file with a name of its own choice, which it renames in the
    end."""
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


def test_a_resumed_training_needs_no_other_machine_state(tiny_model: Path, tmp_path: Path) -> None:
    # The settings say how often, not what: a checkpoint of the one is that of the other.
    train("sft", tiny_model, tmp_path / "out", stop=6, save_steps=2)
    run, data = train_sft, sft_rows(8)
    told: list[int] = []
    settings = SFT(**HARD)
    run(
        settings,
        data,
        base=str(tiny_model),
        output=tmp_path / "out",
        seed=3,
        on_step=lambda step, *_: told.append(step),
    )
    assert told[0] == 4
