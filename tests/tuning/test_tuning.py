"""Tuning, on a real tiny model with the real TRL: what is trained, what is not, and what a failure
says."""

from __future__ import annotations

import importlib
import json
import logging
import random
import shutil
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tuning_fixtures import modules_are_no_garbage  # noqa: F401 - fixtures
from tuning_rows import (
    LORA,
    QUICK,
    assert_close,
    completion_logprob,
    kinds,
    load,
    pair_rows,
    quick,
    read,
    sft_rows,
)

from cowest_dspy import compat
from cowest_dspy.errors import ModelError, TuningError
from cowest_dspy.lms.local.weights import adapter_hash
from cowest_dspy.tuning import (
    DPO,
    SFT,
    Lora,
    train_adapter,
    trainers,
)

# What is trained


def test_dpo_starts_from_the_adapter_and_holds_it_as_the_reference(
    first_sft: Any, tiny_model: Path, tmp_path: Path
) -> None:
    data = pair_rows(4)
    settings = DPO(**quick(num_train_epochs=6))
    tuned = train_adapter(
        settings, data, base=str(tiny_model), adapter=first_sft.path, output=tmp_path / "out"
    )
    assert tuned.history[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert tuned.history[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert tuned.history[-1]["rewards/margins"] > 0.1
    chosen = [
        completion_logprob(tiny_model, row["prompt"], row["chosen"], first_sft.path)[0]
        for row in data
    ]
    assert tuned.history[0]["logps/chosen"] == pytest.approx(sum(chosen) / len(chosen), abs=1e-3)


def test_dpo_makes_chosen_more_and_rejected_less_likely_than_the_reference(
    tiny_model: Path, tmp_path: Path
) -> None:
    data = pair_rows(4)
    tuned = train_adapter(
        DPO(**quick(num_train_epochs=8), lora=LORA),
        data,
        base=str(tiny_model),
        output=tmp_path / "out",
    )
    for row in data:
        gap = [
            completion_logprob(tiny_model, row["prompt"], row["chosen"], adapter)[0]
            - completion_logprob(tiny_model, row["prompt"], row["rejected"], adapter)[0]
            for adapter in (None, tuned.path)
        ]
        assert gap[1] > gap[0]


def test_reference_log_probabilities_computed_once_are_those_of_every_pass(
    first_sft: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = DPO(**quick(num_train_epochs=3))
    once = train_adapter(
        settings,
        pair_rows(),
        base=str(tiny_model),
        adapter=first_sft.path,
        output=tmp_path / "once",
    )
    monkeypatch.setattr(trainers, "add_references", lambda *_: None)
    always = train_adapter(
        settings,
        pair_rows(),
        base=str(tiny_model),
        adapter=first_sft.path,
        output=tmp_path / "always",
    )
    assert_close(once.path, always.path, 1e-5)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_batch_1_accumulated_8_times_equals_batch_8(
    kind: str, tiny_model: Path, tmp_path: Path
) -> None:
    train, settings, data = kinds(20)[kind]
    made = [
        train(
            settings(
                **quick(per_device_train_batch_size=micro, gradient_accumulation_steps=8 // micro),
                lora=LORA,
            ),
            data,
            base=str(tiny_model),
            output=tmp_path / str(micro),
        )
        for micro in (1, 8, 4)
    ]
    assert [len(tuned.history) for tuned in made] == [3, 3, 3]
    for step in zip(*(tuned.history for tuned in made), strict=True):
        assert (
            step[0]["loss"]
            == pytest.approx(step[1]["loss"], abs=2e-5)
            == pytest.approx(step[2]["loss"], abs=2e-5)
        )
    # Adam divides by the gradient's size, so that a rounding error in a tiny gradient can grow to a
    # part of a step.
    assert_close(made[0].path, made[1].path, 3e-4)
    assert_close(made[0].path, made[2].path, 3e-4)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_scoring_completions_only_changes_nothing(
    kind: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    utils: Any = importlib.import_module("trl.trainer.utils")
    train, settings, data = kinds(8)[kind]
    original = utils._use_triton
    compact = train(
        settings(**QUICK, lora=LORA), data, base=str(tiny_model), output=tmp_path / "compact"
    )
    assert utils._use_triton is original
    monkeypatch.setattr(compat, "compact_lm_head", nullcontext)
    stock = train(
        settings(**QUICK, lora=LORA), data, base=str(tiny_model), output=tmp_path / "stock"
    )
    assert [step["loss"] for step in compact.history] == pytest.approx(
        [step["loss"] for step in stock.history], abs=1e-6
    )
    assert_close(compact.path, stock.path, 1e-5)


def test_what_has_no_loss_of_precision_trains_in_bfloat16_too(
    tiny_model: Path, tmp_path: Path
) -> None:
    settings = SFT(**quick(num_train_epochs=6, bf16=True), lora=LORA)
    tuned = train_adapter(settings, sft_rows(), base=str(tiny_model), output=tmp_path / "out")
    assert tuned.history[-1]["loss"] < tuned.history[0]["loss"] - 0.1
    assert {str(tensor.dtype) for tensor in read(tuned.path).values()} == {"torch.float32"}


# What is written and said


def test_the_output_is_three_files_and_nothing_else_is_written(
    first_sft: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train_adapter(
        DPO(**QUICK),
        pair_rows(),
        base=str(tiny_model),
        adapter=first_sft.path,
        output=tmp_path / "deep" / "out",
    )
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "deep",
        "deep/out",
        "deep/out/adapter_config.json",
        "deep/out/adapter_model.safetensors",
        "deep/out/training.json",
    ]


def test_peft_finds_the_base_of_an_adapter_by_itself(
    first_sft: Any, tiny_model: Path, tmp_path: Path
) -> None:
    import torch
    from peft import AutoPeftModelForCausalLM

    ids = torch.arange(3, 40).unsqueeze(0)
    found: Any = AutoPeftModelForCausalLM.from_pretrained(first_sft.path)
    with torch.no_grad():
        by_hand = load(tiny_model, first_sft.path)[0](ids).logits
        assert torch.equal(found(ids).logits, by_hand)
        assert not torch.equal(by_hand, load(tiny_model)[0](ids).logits)
    # A base of the Hub's cache is named by its id.
    snapshot = tmp_path / "hub" / "models--owner--tiny-model" / "snapshots" / "0123abc"
    shutil.copytree(tiny_model, snapshot)
    tuned = train_adapter(
        SFT(**QUICK, lora=LORA), sft_rows(2), base=str(snapshot), output=tmp_path / "out"
    )
    config = json.loads((tuned.path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "owner/tiny-model"
    assert tuned.base_id.partition("@")[0] == "owner/tiny-model"


def test_a_failed_training_leaves_no_rubbish(tiny_model: Path, tmp_path: Path) -> None:
    def stop(step: int, total: int, logs: dict[str, float]) -> None:
        if step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_adapter(
            SFT(**QUICK, lora=LORA),
            sft_rows(),
            base=str(tiny_model),
            output=tmp_path / "out",
            on_step=stop,
        )
    assert list(tmp_path.iterdir()) == []


# A training that is done


def test_a_training_that_is_done_is_found_and_not_repeated(
    first_sft: Any, tiny_model: Path, tmp_path: Path
) -> None:
    def train(settings: DPO, where: Path = tmp_path / "out") -> tuple[Any, list[int]]:
        steps: list[int] = []
        tuned = train_adapter(
            settings,
            pair_rows(),
            base=str(tiny_model),
            adapter=first_sft.path,
            output=where,
            on_step=lambda step, *_: steps.append(step),
        )
        return tuned, steps

    first, steps = train(DPO(**QUICK))
    assert steps == [0, 1, 2] and first.adapter_hash == adapter_hash(first.path)
    again, steps = train(DPO(**QUICK, save_steps=1))
    assert again == first and steps == [], "what decides nothing is no other training"
    # Elsewhere, too: an adapter may be moved with its record.
    moved = Path(shutil.move(first.path, tmp_path / "moved"))
    (tmp_path / f".{moved.name}.abc.checkpoints").mkdir()  # of a process that was killed
    there, steps = train(DPO(**QUICK), moved)
    assert there == replace(first, path=moved) and steps == []
    assert [path.name for path in tmp_path.iterdir()] == ["moved"]


def test_another_training_is_not_put_in_the_place_of_one_that_is_done(
    first_sft: Any, tiny_model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    same: dict[str, Any] = {
        "settings": DPO(**QUICK, lora=LORA),
        "rows": pair_rows(),
        "base": str(tiny_model),
    }
    before = train_adapter(**same, output=output)
    others: list[tuple[dict[str, Any], str]] = [
        ({"settings": DPO(**QUICK, lora=LORA, beta=0.2)}, r"other settings \(beta\)"),
        ({"rows": pair_rows(7)}, "other rows"),
        ({"seed": 1}, "other seed"),
        ({"adapter": first_sft.path}, "other starting weights"),
        (
            {"settings": SFT(**QUICK, lora=LORA), "rows": sft_rows()},
            r"other tuner, other settings \(beta, .*\), other rows",
        ),
    ]
    for change, says in others:
        with pytest.raises(
            TuningError, match=rf"holds another training: {says}\. It is not overwritten: give"
        ):
            train_adapter(**same | change, output=output)
    assert train_adapter(**same, output=output) == before
    (output / "training.json").write_text("{")
    with pytest.raises(TuningError, match=r"no training\.json that says how it was trained"):
        train_adapter(**same, output=output)
    (output / "training.json").unlink()
    with pytest.raises(TuningError, match=r"no training\.json that says how it was trained"):
        train_adapter(**same, output=output)
    assert adapter_hash(output) == before.adapter_hash


def test_an_adapter_that_was_changed_is_not_given_as_the_result(
    tiny_model: Path, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    same: dict[str, Any] = {
        "settings": SFT(**QUICK, lora=LORA),
        "rows": sft_rows(),
        "base": str(tiny_model),
        "output": tmp_path / "out",
    }
    tuned = train_adapter(**same)
    tensors = {name: tensor * 2 for name, tensor in read(tuned.path).items()}
    save_file(tensors, tuned.path / "adapter_model.safetensors")
    with pytest.raises(TuningError, match="changed since it was trained"):
        train_adapter(**same)


def test_a_folder_that_holds_something_else_is_not_overwritten(
    tmp_path: Path, tiny_model: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(TuningError, match="is not overwritten"):
        train_adapter(SFT(**QUICK), sft_rows(), base=str(tiny_model), output=tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_training_says_nothing_by_itself(
    tiny_model: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with (
        warnings.catch_warnings(record=True) as caught,
        caplog.at_level(logging.INFO, logger="cowest_dspy"),
    ):
        warnings.simplefilter("always")
        first = train_adapter(
            SFT(**QUICK, lora=LORA), sft_rows(), base=str(tiny_model), output=tmp_path / "sft"
        )
        train_adapter(
            DPO(**QUICK),
            pair_rows(),
            base=str(tiny_model),
            adapter=first.path,
            output=tmp_path / "dpo",
        )
    assert [str(warning.message) for warning in caught] == []
    assert capfd.readouterr() == ("", "")


def test_a_training_tells_its_steps_and_its_cost(tiny_model: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int, dict[str, float]]] = []
    settings = SFT(**quick(num_train_epochs=2), lora=LORA)
    tuned = train_adapter(
        settings,
        sft_rows(),
        base=str(tiny_model),
        output=tmp_path / "out",
        on_step=lambda *step: told.append(step),
    )
    assert [(step, total) for step, total, _ in told] == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    assert [logs for _, _, logs in told[1:]] == tuned.history
    assert [step["epoch"] for step in tuned.history] == [0.5, 1.0, 1.5, 2.0]
    assert tuned.trained_rows == 16
    assert tuned.tokens > 16 * 20
    assert tuned.peak_memory_bytes > 100e6
    assert tuned.seconds > 0
    assert SFT(**tuned.settings) == settings
    assert tuned.base_id.startswith("tiny@")


def test_global_random_numbers_are_as_if_nothing_had_been_trained(
    tiny_model: Path, tmp_path: Path
) -> None:
    import numpy
    import torch

    def draw() -> tuple[float, ...]:
        return random.random(), float(numpy.random.rand()), float(torch.rand(()))

    def seed() -> None:
        random.seed(1)
        numpy.random.seed(1)
        torch.manual_seed(1)

    seed()
    expected = draw()
    seed()
    train_adapter(
        SFT(**QUICK, lora=LORA), sft_rows(4), base=str(tiny_model), output=tmp_path / "out"
    )
    assert draw() == expected


# What must not go on


def test_rows_that_are_too_long_are_named_and_never_dropped(
    tiny_model: Path, tmp_path: Path
) -> None:
    data = sft_rows(6)
    data[2]["prompt"][1]["content"] += " please" * 40
    data[4]["completion"][0]["content"] += " please" * 40
    with pytest.raises(
        TuningError,
        match=r"2 of 6 rows are longer than max_length, 100 tokens: row 2 has \d+, row 4 has \d+. "
        r"Raise max_length",
    ):
        train_adapter(
            SFT(**QUICK, max_length=100), data, base=str(tiny_model), output=tmp_path / "out"
        )
    pairs = pair_rows(4)
    pairs[3]["rejected"][0]["content"] += " please" * 600
    with pytest.raises(
        TuningError, match="1 of 4 rows are longer than the model's context, 512 tokens: row 3 has"
    ):
        train_adapter(DPO(**QUICK), pairs, base=str(tiny_model), output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_no_token_of_a_long_row_is_cut_by_default(tiny_model: Path, tmp_path: Path) -> None:
    # TRL cuts at 1024 by default and the rows here are shorter, so the trainer's own setting is
    # looked at, too.
    seen: list[Any] = []
    data = sft_rows(4)
    data[1]["completion"][0]["content"] += " degrees" * 200
    tuned = train_adapter(
        SFT(**QUICK),
        data,
        base=str(tiny_model),
        output=tmp_path / "out",
        on_step=lambda *step: seen.append(step),
    )
    tokens = [
        load(tiny_model)[1].apply_chat_template(
            row["prompt"] + row["completion"], return_dict=False
        )
        for row in data
    ]
    assert tuned.tokens == sum(map(len, tokens))
    assert trainers.trainer_arguments(SFT(), data, False, tmp_path, 0, False)["max_length"] is None


def test_the_only_step_of_a_short_training_has_a_learning_rate(
    tiny_model: Path, tmp_path: Path
) -> None:
    settings = SFT(**{**quick(), "warmup_steps": 0.1, "max_steps": 1})
    tuned = train_adapter(settings, sft_rows(), base=str(tiny_model), output=tmp_path / "out")
    assert [step["learning_rate"] > 0 for step in tuned.history if "loss" in step] == [True]


def test_a_diverging_training_is_stopped(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(TuningError, match=r"diverged at step \d+: .* Lower learning_rate"):
        train_adapter(
            SFT(**quick(learning_rate=1e30, num_train_epochs=5)),
            sft_rows(),
            base=str(tiny_model),
            output=tmp_path / "out",
        )
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_anything_to_train_is_refused(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainers, "restore_dropout", lambda model: model.requires_grad_(False))
    with pytest.raises(TuningError, match="Nothing in this model can be trained"):
        train_adapter(SFT(**QUICK), sft_rows(), base=str(tiny_model), output=tmp_path / "out")


def test_an_adapter_of_another_size_is_refused(
    first_sft: Any, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        TuningError, match=r"r = 16, lora_alpha = 32, but .* which has r = 4, lora_alpha = 8"
    ):
        train_adapter(
            DPO(**QUICK, lora=Lora()),
            pair_rows(),
            base=str(tiny_model),
            adapter=first_sft.path,
            output=tmp_path / "out",
        )
    with pytest.raises(ModelError, match="holds no adapter"):
        train_adapter(
            DPO(**QUICK),
            pair_rows(),
            base=str(tiny_model),
            adapter=tmp_path,
            output=tmp_path / "out",
        )


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_dropout_of_an_adapter_has_an_effect(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    run, settings, data = kinds(4)[kind]
    loras = [Lora(r=4, lora_alpha=8, lora_dropout=dropout) for dropout in (0.0, 0.5)]
    made = [
        run(
            settings(**quick(lora=lora)),
            data,
            base=str(tiny_model),
            output=tmp_path / f"{lora.lora_dropout}",
        )
        for lora in loras
    ]
    assert made[0].adapter_hash != made[1].adapter_hash
    assert all(one.history[-1]["loss"] < 20 for one in made)
