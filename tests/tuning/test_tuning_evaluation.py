"""Evaluation inside a training, on a real tiny model: the split, what is measured, the early stop,
the best adapter."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from tuning_rows import (
    LORA,
    QUICK,
    completion_logprob,
    held_of,
    kinds,
    pair_rows,
    pairs_with_one_turned_round,
    quick,
    read,
    says,
    sft_rows,
)

from cowest_dspy.errors import TuningError
from cowest_dspy.tuning import DPO, SFT, train_adapter
from cowest_dspy.tuning.data import Split, split_rows

# The split


def test_no_example_and_no_prompt_is_on_both_sides() -> None:
    chance = random.Random(0)
    for seed in range(50):
        rows = [{"prompt": [says("user", str(chance.randrange(30)))]} for _ in range(60)]
        ids = [chance.choice([None, *range(25)]) for _ in rows]
        for examples in (None, ids):
            try:
                made = split_rows(rows, 0.25, seed, examples)
            except TuningError:
                continue
            assert (
                sorted(made.train + made.held_out) == list(range(60))
                and made.train
                and made.held_out
            )
            sides = [
                {rows[index]["prompt"][0]["content"] for index in side}
                for side in (made.train, made.held_out)
            ]
            assert not sides[0] & sides[1]
            if examples:
                sides = [
                    {ids[index] for index in side} - {None} for side in (made.train, made.held_out)
                ]
                assert not sides[0] & sides[1]
            else:
                assert 5 <= len(made.held_out) <= 15


def test_a_split_is_that_of_its_seed() -> None:
    rows = [{"prompt": str(index)} for index in range(40)]
    splits = [split_rows(rows, 0.2, seed) for seed in (1, 1, 2)]
    assert splits[0] == splits[1] != splits[2]
    assert [len(made.held_out) for made in splits] == [8, 8, 8]
    assert split_rows(rows, 0.0, 1) == Split(tuple(range(40)), ())


def test_rows_of_one_prompt_cannot_be_held_out() -> None:
    with pytest.raises(TuningError, match="all of one example or prompt"):
        split_rows([{"prompt": "a"}] * 4, 0.25, 0)
    # A chain: the first two share a prompt, the last two an example.
    with pytest.raises(TuningError, match="the 3 rows are all of one"):
        split_rows([{"prompt": "a"}, {"prompt": "a"}, {"prompt": "b"}], 0.5, 0, [None, 1, 1])
    # Where every group is larger than the part, the smallest one is held out.
    assert split_rows([{"prompt": text} for text in "aaaabbb"], 0.1, 0).held_out == (4, 5, 6)


def test_settings_of_an_evaluation_without_rows_are_refused() -> None:
    with pytest.raises(
        ValidationError, match="early_stopping_patience needs rows to evaluate on: set held_out"
    ):
        DPO(early_stopping_patience=2)
    with pytest.raises(ValidationError, match=r"less than or equal to 0.5"):
        SFT(held_out=0.6)
    assert SFT(report_to=("wandb",)).decisive() == SFT().decisive() != SFT(held_out=0.1).decisive()
    assert not {"held_out", "report_to", "load_best_model_at_end"} & SFT().decisive().keys()


# What is measured


def held(tuned: Any) -> list[dict[str, float]]:
    return [record for record in tuned.history if "eval_loss" in record]


def steps(tuned: Any) -> list[dict[str, float]]:
    return [record for record in tuned.history if "loss" in record]


def logprobs(
    folder: Path, rows: list[Any], key: str, adapter: Path | None = None
) -> tuple[list[float], int]:
    found = [completion_logprob(folder, row["prompt"], row[key], adapter) for row in rows]
    return [total for total, _ in found], sum(count for _, count in found)


def test_the_held_out_sft_loss_is_the_mean_over_completion_tokens(
    tiny_model: Path, tmp_path: Path
) -> None:
    data = sft_rows(10)
    settings = SFT(
        **quick(num_train_epochs=3),
        lora=LORA,
        held_out=0.3,
        load_best_model_at_end=False,
    )
    tuned = train_adapter(settings, data, base=str(tiny_model), output=tmp_path / "out")
    rows = [data[index] for index in split_rows(data, 0.3, 0).held_out]
    assert len(rows) == 3
    (before, tokens), (after, _) = (
        logprobs(tiny_model, rows, "completion", adapter) for adapter in (None, tuned.path)
    )
    first, last = held(tuned)[0], held(tuned)[-1]
    assert first["step"] == 0 and first["epoch"] == 0.0
    assert first["eval_loss"] == pytest.approx(-sum(before) / tokens, abs=1e-5)
    assert last["eval_loss"] == pytest.approx(-sum(after) / tokens, abs=1e-5)


@pytest.mark.parametrize("continued", [False, True])
def test_held_out_pairs_have_loss_margin_accuracy_and_kl(
    continued: bool, tiny_model: Path, tmp_path: Path
) -> None:
    import torch

    start = (
        train_adapter(
            SFT(**QUICK, lora=LORA), sft_rows(4), base=str(tiny_model), output=tmp_path / "sft"
        ).path
        if continued
        else None
    )
    data = pair_rows(10)
    settings = DPO(
        **quick(num_train_epochs=3, per_device_train_batch_size=2, gradient_accumulation_steps=2),
        lora=LORA,
        held_out=0.3,
        load_best_model_at_end=False,
        per_device_eval_batch_size=3,  # pyright: ignore[reportCallIssue] - TRL averages over batches
        beta=0.3,
    )
    tuned = train_adapter(
        settings, data, base=str(tiny_model), adapter=start, output=tmp_path / "out"
    )
    rows = [
        data[index]
        for index in split_rows(data, 0.3, 0, [row["example_id"] for row in data]).held_out
    ]
    ratios, moved = {}, 0.0
    for side in ("chosen", "rejected"):
        (before, _), (after, _) = (
            logprobs(tiny_model, rows, side, adapter) for adapter in (start, tuned.path)
        )
        ratios[side] = torch.tensor(after) - torch.tensor(before)
        moved += float(ratios[side].mean()) / 2
    margins = 0.3 * (ratios["chosen"] - ratios["rejected"])
    first, last = held(tuned)[0], held(tuned)[-1]
    assert first["eval_loss"] == pytest.approx(0.693147, abs=1e-4)
    assert first["eval_rewards/margins"] == pytest.approx(0, abs=1e-4) == first["eval_kl"]
    assert last["eval_loss"] == pytest.approx(
        -torch.nn.functional.logsigmoid(margins).mean().item(), abs=1e-3
    )
    assert last["eval_rewards/margins"] == pytest.approx(margins.mean().item(), abs=1e-3)
    assert last["eval_rewards/accuracies"] == (margins > 0).float().mean().item()
    assert last["eval_kl"] == pytest.approx(moved, abs=5e-3)
    assert abs(moved) > 1e-2


def test_the_kl_of_a_step_is_that_of_its_batch(tiny_model: Path, tmp_path: Path) -> None:
    # One batch is all the data, so that the last record is of the weights before the last step,
    # those of a shorter training.
    data = pair_rows(4)
    shorter, longer = (
        train_adapter(
            DPO(
                **quick(
                    num_train_epochs=epochs,
                    per_device_train_batch_size=2,
                    gradient_accumulation_steps=2,
                    lr_scheduler_type="constant_with_warmup",
                ),
                lora=LORA,
            ),
            data,
            base=str(tiny_model),
            output=tmp_path / str(epochs),
        )
        for epochs in (2, 3)
    )
    moved = 0.0
    for side in ("chosen", "rejected"):
        (before, _), (after, _) = (
            logprobs(tiny_model, data, side, adapter) for adapter in (None, shorter.path)
        )
        moved += (sum(after) - sum(before)) / len(data) / 2
    assert longer.history[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert longer.history[-1]["kl"] == pytest.approx(moved, abs=5e-3)
    assert abs(moved) > 1e-2


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_evaluating_changes_no_weight(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    train, settings, data = kinds(12)[kind]
    # Without dropout: Trainer draws a random number for the loader of each evaluation, so that the
    # steps after it would drop out others.
    options = {**quick(num_train_epochs=3), "lora": LORA}
    kept = [data[index] for index in split_rows(data, 0.3, 0).train]
    alone = train(settings(**options), kept, base=str(tiny_model), output=tmp_path / "alone")
    made = {
        every: train(
            settings(**options, held_out=0.3, eval_steps=every, load_best_model_at_end=False),
            data,
            base=str(tiny_model),
            output=tmp_path / str(every),
        )
        for every in (1, 1000)
    }
    assert len(steps(alone)) == len(held(made[1])) - 1 == 6
    assert [record["step"] for record in held(made[1000])] == [0, 6]
    assert steps(alone) == steps(made[1]) == steps(made[1000])
    assert alone.adapter_hash == made[1].adapter_hash == made[1000].adapter_hash
    assert alone.tokens == made[1].tokens and alone.trained_rows == made[1].trained_rows == 24


def test_global_random_numbers_are_untouched_by_an_evaluation(
    tiny_model: Path, tmp_path: Path
) -> None:
    import torch

    torch.manual_seed(1)
    expected = torch.rand(())
    torch.manual_seed(1)
    train_adapter(
        SFT(**QUICK, lora=LORA, held_out=0.5),
        sft_rows(4),
        base=str(tiny_model),
        output=tmp_path / "out",
    )
    assert torch.rand(()) == expected


# The early stop and the best adapter


def overfitting(**changes: Any) -> DPO:
    return DPO(
        **quick(num_train_epochs=15, learning_rate=5e-3, lr_scheduler_type="constant_with_warmup"),
        lora=LORA,
        held_out=0.4,
        **changes,
    )


def test_the_best_adapter_is_what_is_given(tiny_model: Path, tmp_path: Path) -> None:
    data = pairs_with_one_turned_round()
    given: dict[str, Any] = {"base": str(tiny_model), "seed": 1}
    last, best = (
        train_adapter(
            overfitting(eval_steps=2, load_best_model_at_end=keep, max_steps=20),
            data,
            output=tmp_path / str(keep),
            **given,
        )
        for keep in (False, True)
    )
    assert held(last) == held(best)
    losses = {record["step"]: record["eval_loss"] for record in held(best) if record["step"]}
    assert best.best_step == min(losses, key=lambda step: losses[step])
    assert best.best_step and 2 < best.best_step < 20 and losses[best.best_step] < losses[20]
    assert best.adapter_hash != last.adapter_hash
    # The adapter on disk has the loss that was the best: it is evaluated by other means.
    rows = held_of(data)
    for tuned, loss in ((best, losses[best.best_step]), (last, losses[20])):
        assert dpo_loss(tiny_model, rows, tuned.path) == pytest.approx(loss, abs=5e-3)


def dpo_loss(folder: Path, rows: list[Any], adapter: Path) -> float:
    import torch

    ratios = []
    for side in ("chosen", "rejected"):
        (before, _), (after, _) = (logprobs(folder, rows, side, place) for place in (None, adapter))
        ratios.append(torch.tensor(after) - torch.tensor(before))
    return -torch.nn.functional.logsigmoid(0.1 * (ratios[0] - ratios[1])).mean().item()


def test_training_stops_when_patience_is_over(tiny_model: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    tuned = train_adapter(
        overfitting(eval_steps=1, early_stopping_patience=3),
        pairs_with_one_turned_round(),
        base=str(tiny_model),
        output=tmp_path / "out",
        seed=1,
        on_step=lambda step, total, _: told.append((step, total)),
    )
    assert tuned.stopped_early and tuned.best_step is not None
    done, total = told[-1]
    assert done == tuned.best_step + 3 < total == 23
    assert steps(tuned)[-1]["step"] == held(tuned)[-1]["step"] == done
    assert tuned.trained_rows == done * 4
    assert tuned.tokens == steps(tuned)[-1]["num_tokens"] > 0


def test_without_patience_all_steps_are_made(tiny_model: Path, tmp_path: Path) -> None:
    tuned = train_adapter(
        overfitting(max_steps=12),
        pairs_with_one_turned_round(),
        base=str(tiny_model),
        output=tmp_path / "out",
        seed=1,
    )
    assert not tuned.stopped_early
    assert [record["step"] for record in held(tuned)] == list(range(0, 13, 2))
    plain = train_adapter(
        SFT(**QUICK, lora=LORA), sft_rows(4), base=str(tiny_model), output=tmp_path / "plain"
    )
    assert plain.best_step is None and not plain.stopped_early and not held(plain)


def test_a_held_out_loss_that_is_no_number_stops_the_training(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from trl.trainer.sft_trainer import SFTTrainer

    monkeypatch.setattr(
        SFTTrainer,
        "prediction_step",
        lambda self, *_, **__: (torch.tensor(float("nan")), None, None),
    )
    with pytest.raises(TuningError, match="at step 0: eval_loss is nan"):
        train_adapter(
            SFT(**QUICK, lora=LORA, held_out=0.5),
            sft_rows(4),
            base=str(tiny_model),
            output=tmp_path / "out",
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_held_out_rows_do_not_train(
    kind: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Trainer

    seen: list[Any] = []
    run, column = Trainer.train, "completion" if kind == "sft" else "chosen"

    def watched(trainer: Any, **options: Any) -> Any:
        seen.extend(row[column][0]["content"] for row in trainer.train_dataset)
        return run(trainer, **options)

    monkeypatch.setattr(Trainer, "train", watched)
    train, settings, data = kinds(8)[kind]
    train(
        settings(**QUICK, lora=LORA, held_out=0.25),
        data,
        base=str(tiny_model),
        output=tmp_path / "out",
    )
    wanted = split_rows(data, 0.25, 0).train
    assert set(seen) == {data[index][column][0]["content"] for index in wanted} and len(seen) == 8
    assert read(tmp_path / "out")
