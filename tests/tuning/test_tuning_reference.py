"""The reference's log-probabilities of pairs: computed once, and never those of other pairs,
weights or settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tuning_rows import pair_rows, quick

from cowest_dspy.tuning import DPO, Tuned, train_adapter, trainers


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """For each time that they were computed, of how many pairs."""
    counts: list[int] = []
    original = trainers.compute_reference

    def counted(trainer: Any, rows: Any, columns: int) -> Any:
        counts.append(len(rows))
        return original(trainer, rows, columns)

    monkeypatch.setattr(trainers, "compute_reference", counted)
    return counts


def train(
    base: Path, folder: Path, name: str, rows: int = 4, adapter: Path | None = None, **changes: Any
) -> Tuned:
    settings = DPO(**quick(**changes))
    return train_adapter(
        settings,
        pair_rows(rows),
        base=str(base),
        adapter=adapter,
        output=folder / name,
        cache=folder / "cache",
    )


def test_they_are_computed_once_and_give_the_same_bits(
    tiny_model: Path, tmp_path: Path, computed: list[int]
) -> None:
    first = train(tiny_model, tmp_path, "first")
    again = train(tiny_model, tmp_path, "again")
    assert (
        computed == [4]
        and again.adapter_hash == first.adapter_hash
        and again.history == first.history
    )
    other = train(tiny_model, tmp_path, "other", beta=0.3, learning_rate=1e-3)
    assert computed == [4] and other.adapter_hash != first.adapter_hash
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 1


def test_other_pairs_and_other_weights_have_their_own(
    tiny_model: Path, tmp_path: Path, computed: list[int]
) -> None:
    first = train(tiny_model, tmp_path, "first")
    train(tiny_model, tmp_path, "more", rows=5)
    train(tiny_model, tmp_path, "further", adapter=first.path)
    assert computed == [4, 5, 4]
    assert len({path.parent.name for path in (tmp_path / "cache").rglob("*.safetensors")}) == 2


def test_a_damaged_file_is_computed_and_written_anew(
    tiny_model: Path, tmp_path: Path, computed: list[int]
) -> None:
    first = train(tiny_model, tmp_path, "first")
    (file,) = (tmp_path / "cache").rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-4])
    again = train(tiny_model, tmp_path, "again")
    assert computed == [4, 4] and again.adapter_hash == first.adapter_hash
    train(tiny_model, tmp_path, "third")
    assert computed == [4, 4]
