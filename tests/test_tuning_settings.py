"""What tuning may be told, and what its rows look like: found out before anything is loaded."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from tuning_rows import LORA, QUICK, pair_rows, says, sft_rows

from cowest_dspy.errors import ModelError, TuningError
from cowest_dspy.tuning import (
    DPO,
    LOSS_TYPES,
    SFT,
    rows,
    schedule,
    train_dpo,
    train_sft,
)

# Settings


def test_trl_knows_every_loss_type_that_is_offered(tiny_model: Path, tmp_path: Path) -> None:
    # All of them added up: one that TRL does not know, or that gives no number, would stop the training.
    settings = DPO(loss_type=LOSS_TYPES, loss_weights=(0.1,) * len(LOSS_TYPES), label_smoothing=1e-3, **QUICK, lora=LORA)
    tuned = train_dpo(settings, pair_rows(4), base=str(tiny_model), output=tmp_path / "out")
    assert len(tuned.history) == 1


def test_losses_are_weighted_and_added(tiny_model: Path, tmp_path: Path) -> None:
    def first_loss(name: str, **options: Any) -> float:
        tuned = train_dpo(DPO(**QUICK, **options, lora=LORA), pair_rows(4), base=str(tiny_model), output=tmp_path / name)
        return tuned.history[0]["loss"]

    sft = first_loss("sft", loss_type="sft")
    both = first_loss("both", loss_type=("sigmoid", "sft"), loss_weights=(1.0, 0.5))
    assert sft > 1
    assert both == pytest.approx(0.693147 + 0.5 * sft, abs=1e-4)


def test_offered_loss_types_are_those_that_trl_documents() -> None:
    from trl.trainer.dpo_config import DPOConfig

    documented = DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    assert [name for name in LOSS_TYPES if f"'{name}'" in documented] == list(LOSS_TYPES)
    assert documented.count("`'") == len(LOSS_TYPES)


def test_a_wrong_loss_type_is_found_when_the_settings_are_made() -> None:
    with pytest.raises(ValidationError, match=r'TRL has no DPO loss "sigmod"\. Did you mean "sigmoid"'):
        DPO(loss_type="sigmod")
    with pytest.raises(ValidationError, match="give one for each"):
        DPO(loss_type=("sigmoid", "sft"), loss_weights=(1.0,))
    with pytest.raises(ValidationError, match="label_smoothing"):
        DPO(loss_type="exo_pair")


def test_settings_are_frozen_and_closed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        SFT().epochs = 5  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValidationError, match=r'learning_rat: there is no such key. Did you mean "learning_rate"'):
        SFT(learning_rat=1e-4)  # pyright: ignore[reportCallIssue]
    with pytest.raises(ValidationError, match="micro_batch_size must divide batch_size"):
        SFT(batch_size=8, micro_batch_size=3)


def test_a_micro_batch_is_a_divisor_of_the_batch() -> None:
    assert [SFT(batch_size=size).micro_batch for size in (1, 6, 8, 12, 16, 22)] == [1, 3, 4, 4, 4, 2]


def test_steps_are_whole_batches() -> None:
    settings = SFT(batch_size=4, epochs=2)
    assert [settings.steps(count) for count in (1, 2, 4, 5, 9)] == [1, 1, 2, 3, 5]
    assert SFT(batch_size=4, epochs=2, max_steps=3).steps(9) == 3
    assert SFT(batch_size=4, epochs=0.5).steps(16) == 2


# Rows and their order


def test_every_pass_holds_every_row_once() -> None:
    order = schedule.order([3, 1, 4, 1, 5], steps=5, batch_size=3, seed=1)
    assert len(order) == 15
    assert sorted(order) == sorted([*range(5)] * 3)


def test_the_order_depends_on_the_seed_only() -> None:
    lengths = [random.Random(0).randrange(5, 50) for _ in range(40)]
    first, again, other = (schedule.order(lengths, 5, 8, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert [lengths[index] for index in first[:8]] == sorted((lengths[index] for index in first[:8]), reverse=True)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": [says("user", "a")]}, '"completion" must be a list of messages'),
        ({"prompt": "a", "completion": [says("assistant", "b")]}, '"prompt" must be a list of messages'),
        ({"prompt": [says("user", "a")], "completion": [says("user", "b")]}, "must end in an assistant message"),
        ({"prompt": [says("user", "a")], "completion": [says("assistant", " \n")]}, "is empty text"),
        ({"prompt": [], "completion": [says("assistant", "b")]}, '"prompt" must be a list of messages'),
    ],
)
def test_a_malformed_row_is_named_before_a_model_is_loaded(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        train_sft(SFT(), sft_rows(2), base=str(tmp_path / "no model"), output=tmp_path / "out")
    with pytest.raises(TuningError, match=f"Row 1: .*{message}"):
        rows.sft_rows([*sft_rows(1), row])


def test_nothing_to_train_on_is_said(tmp_path: Path) -> None:
    with pytest.raises(TuningError, match="no SFT rows"):
        rows.sft_rows([])
    with pytest.raises(TuningError, match="no preference rows"):
        rows.preference_rows([])
    same = pair_rows(2)
    same[1]["rejected"] = same[1]["chosen"]
    with pytest.raises(TuningError, match=r"1 row \(1\): chosen and rejected are the same text"):
        rows.preference_rows(same)
