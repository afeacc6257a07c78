"""KTO's estimate of the KL divergence: of whole steps, against a reference that is computed
once."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from tuning_fixtures import modules_are_no_garbage  # noqa: F401 - fixtures
from tuning_rows import LORA, assert_close, completion_logprob, load, quick, unpaired_rows

from cowest_dspy.tuning import KTO, evaluation, train_kto, trainers, unpaired


def settings(**changes: Any) -> KTO:
    return KTO(
        **{
            **quick(
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
                num_train_epochs=2,
                learning_rate=1e-2,
            ),
            "lora": LORA,
            **changes,
        }
    )


def test_a_partner_is_of_the_same_step_and_of_another_prompt_where_that_can_be() -> None:
    generator = random.Random(0)
    for _ in range(200):
        size, length = generator.randint(1, 9), generator.randint(1, 40)
        prompts = [generator.randrange(4) for _ in range(length)]
        found = unpaired.partners(prompts, size)
        for start in range(0, length, size):
            step = list(range(start, min(start + size, length)))
            assert sorted(found[start : start + size]) == step
            if len(step) > 1:
                assert all(found[place] != place for place in step)
    assert unpaired.partners(["a", "a", "a", "b", "b", "b"], 6) == [3, 4, 5, 0, 1, 2]
    assert unpaired.partners(["a", "b", "c"], 3) == [1, 2, 0]


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_batch_1_accumulated_8_times_equals_batch_8(
    loss: str, tiny_model: Path, tmp_path: Path
) -> None:
    made = [
        train_kto(
            settings(micro_batch_size=micro, loss_type=loss),
            unpaired_rows(8),
            base=str(tiny_model),
            output=tmp_path / f"{loss}{micro}",
        )
        for micro in (8, 1, 4)
    ]
    for step in zip(*(tuned.history for tuned in made), strict=True):
        for key in ("loss", *(["kl"] if loss == "kto" else [])):
            assert [one[key] for one in step[1:]] == pytest.approx([step[0][key]] * 2, abs=3e-5)
    assert_close(made[0].path, made[1].path, 5e-4)
    assert_close(made[0].path, made[2].path, 5e-4)
    if loss == "kto":
        assert made[0].history[0]["kl"] == 0
        assert max(step["kl"] for step in made[0].history) > 0.1, (
            "an estimate that stays 0 would show nothing"
        )


def test_a_step_in_one_forward_pass_is_what_trl_makes_of_it(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl.trainer.kto_trainer import KTOTrainer

    whole = settings(per_device_train_batch_size=8, gradient_accumulation_steps=1)
    ours = train_kto(whole, unpaired_rows(8), base=str(tiny_model), output=tmp_path / "ours")
    monkeypatch.setattr(unpaired, "kto_trainer_class", lambda: KTOTrainer)
    theirs = train_kto(whole, unpaired_rows(8), base=str(tiny_model), output=tmp_path / "theirs")
    assert [step["kl"] for step in ours.history] == pytest.approx(
        [step["kl"] for step in theirs.history], abs=1e-4
    )
    assert [step["loss"] for step in ours.history] == pytest.approx(
        [step["loss"] for step in theirs.history], abs=1e-5
    )
    assert_close(ours.path, theirs.path, 5e-4)


def test_the_reference_is_that_of_each_row_and_of_its_partner(
    tiny_model: Path, tmp_path: Path
) -> None:
    data = unpaired_rows(4)
    order = [3, 0, 5, 8, 1, 7, 9, 2]
    trainer = trainers.kto_trainer(
        settings(per_device_train_batch_size=4, gradient_accumulation_steps=1),
        data,
        tiny_model,
        None,
        tmp_path,
        0,
    )
    with trainers.scoring_completions_only():
        unpaired.prepare(trainer, order)
    made = trainer.train_dataset
    others = unpaired.partners([str(data[row]["prompt"]) for row in order], 8)
    _, tokenizer = load(tiny_model)
    for place, row in enumerate(order):
        prompt, partner = data[row]["prompt"], data[order[others[place]]]["completion"]
        assert made[place]["label"] == data[row]["label"]
        assert made[place]["ref_logps"] == pytest.approx(
            completion_logprob(tiny_model, prompt, data[row]["completion"])[0], abs=1e-3
        )
        assert tokenizer.decode(made[place]["KL_completion_ids"]).startswith(
            partner[0]["content"][:6]
        )
        if len(made[place]["KL_completion_ids"]) == len(made[others[place]]["completion_ids"]):
            assert made[place]["ref_KL_logps"] == pytest.approx(
                completion_logprob(tiny_model, prompt, partner)[0], abs=1e-3
            )


def test_a_single_row_has_no_partner() -> None:
    with pytest.raises(ValidationError, match="batch_size is 1: give 2 or more"):
        KTO(per_device_train_batch_size=1, gradient_accumulation_steps=1)
    assert (
        KTO(
            per_device_train_batch_size=1,
            gradient_accumulation_steps=1,
            loss_type="apo_zero_unpaired",
        ).micro_batch
        == KTO(per_device_train_batch_size=1, gradient_accumulation_steps=7).micro_batch
        == 1
    )


def test_held_out_rows_are_measured_with_their_own_estimate(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Against the definition, written out: log-probabilities of rows and of mixed rows, before and
    after."""
    data = unpaired_rows(8)
    wanted = settings(
        held_out=0.25,
        eval_steps=100,
        load_best_model_at_end=False,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    tuned = train_kto(wanted, data, base=str(tiny_model), output=tmp_path / "out", seed=4)
    first, last = (record for record in tuned.history if "eval_loss" in record)
    held = evaluation.split(data, 0.25, 4).held
    assert len({str(data[row]["prompt"]) for row in held}) > 1
    good, bad = wanted.weights(
        sum(row["label"] for row in data), sum(not row["label"] for row in data)
    )
    assert first["eval_loss"] == pytest.approx(
        sum(0.5 * (good if data[row]["label"] else bad) for row in held) / len(held), abs=1e-5
    )
    assert first["eval_kl"] == pytest.approx(0, abs=1e-5)

    sizes = {
        row: completion_logprob(tiny_model, data[row]["prompt"], data[row]["completion"])
        for row in held
    }
    ratios = {
        row: completion_logprob(
            tiny_model, data[row]["prompt"], data[row]["completion"], tuned.path
        )[0]
        - sizes[row][0]
        for row in held
    }
    tokens = sum(count for _, count in sizes.values())
    assert last["eval_kl"] == pytest.approx(sum(ratios.values()) / tokens, abs=1e-4)
    rewards = {
        label: [wanted.beta * ratios[row] for row in held if data[row]["label"] is label]
        for label in (True, False)
    }
    margin = sum(rewards[True]) / len(rewards[True]) - sum(rewards[False]) / len(rewards[False])
    assert last["eval_rewards/margins"] == pytest.approx(margin, abs=1e-3)
    assert margin > 0.01


def test_a_held_out_estimate_does_not_depend_on_the_micro_batch(
    tiny_model: Path, tmp_path: Path
) -> None:
    made = [
        train_kto(
            settings(held_out=0.3, micro_batch_size=micro),
            unpaired_rows(8),
            base=str(tiny_model),
            output=tmp_path / str(micro),
        ).history
        for micro in (1, 8)
    ]
    for one, other in zip(*made, strict=True):
        # A step's rewards are TRL's: means over forward passes, which lack a margin where a pass
        # has one label only.
        keys = {"eval_loss", "eval_rewards/margins", "eval_kl", "kl", "loss"}
        assert keys & one.keys() == keys & other.keys()
        for key in keys & one.keys():
            assert one[key] == pytest.approx(other[key], abs=1e-4)
