"""A training whose loss does not move is stopped, and no other is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tuning_rows import LORA, pair_rows, quick, sft_rows, unpaired_rows

from cowest_dspy.errors import TuningError
from cowest_dspy.lms.local.weights import adapter_hash
from cowest_dspy.tuning import DPO, KTO, SFT, stalling, train_dpo, train_kto, train_sft

KINDS: dict[str, tuple[Any, Any, Any]] = {
    "sft": (train_sft, SFT, sft_rows(8)),
    "dpo": (train_dpo, DPO, pair_rows(8)),
    "kto": (train_kto, KTO, unpaired_rows(6)),
}


def train(kind: str, base: Path, output: Path, rows: Any = None, **changes: Any) -> Any:
    function, settings, data = KINDS[kind]
    wanted = quick(
        num_train_epochs=40,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        warmup_steps=0.1,
        max_steps=24,
        lora=LORA,
        **changes,
    )
    return function(settings(**wanted), rows or data, base=str(base), output=output)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_does_not_move_ends_the_training(
    kind: str, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        TuningError,
        match=r"The loss does not move: .* after 22 steps .* Raise learning_rate \(1e-09",
    ):
        train(kind, tiny_model, tmp_path / "out", learning_rate=1e-9)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_with_a_small_but_honest_learning_rate_goes_on(
    kind: str, tiny_model: Path, tmp_path: Path
) -> None:
    assert train(kind, tiny_model, tmp_path / "out", learning_rate=1e-5).history[-1]["step"] == 24


def test_a_short_training_is_not_judged(tiny_model: Path, tmp_path: Path) -> None:
    tuned = train_dpo(
        DPO(
            **quick(learning_rate=1e-9, max_steps=stalling.AFTER - 1, num_train_epochs=40),
            lora=LORA,
        ),
        pair_rows(8),
        base=str(tiny_model),
        output=tmp_path / "out",
    )
    assert len(tuned.history) == stalling.AFTER - 1


def test_what_is_known_already_is_not_stuck(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stalling, "LEARNT", 1.0)  # DPO begins at log 2, which now counts as low.
    assert train("dpo", tiny_model, tmp_path / "out", learning_rate=1e-9).history[-1]["step"] == 24


@pytest.mark.parametrize("kind", ["sft", "kto"])
def test_looking_changes_nothing(
    kind: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = train(kind, tiny_model, tmp_path / "looked", learning_rate=1e-3)
    monkeypatch.setattr(stalling, "AFTER", 1000)
    assert (
        adapter_hash(train(kind, tiny_model, tmp_path / "not", learning_rate=1e-3).path)
        == looked.adapter_hash
    )
