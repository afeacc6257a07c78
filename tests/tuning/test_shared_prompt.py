"""Laws of what rows share: computed once or for each, log-probabilities, gradients and trainings are
the same."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from tiny import make_adapter
from tuning_rows import LORA, assert_close, pair_rows, quick

from cowest_dspy import compat
from cowest_dspy.tuning import DPO, SFT, shared_prompt, train_adapter, trainers

LOGGER = "cowest_dspy.tuning.shared_prompt"


def trainer_on(base: Path, work: Path, adapter: Path | None = None, **changes: Any) -> Any:
    """A trainer of ours on 6 pairs, all of them in one micro-batch."""
    settings = DPO(**quick(per_device_train_batch_size=6, gradient_accumulation_steps=1) | changes)
    trainer = trainers.make_trainer(settings, pair_rows(6), [], base, adapter, work / ".w.x.y", 0)
    if settings.share_prompt:
        with compat.compact_lm_head():
            shared_prompt.share_if_equal(trainer, trainers.row_lengths(trainer.train_dataset))
    return trainer


def batch_of(trainer: Any) -> Any:
    return trainer.data_collator(list(trainer.train_dataset))


def is_shared(trainer: Any) -> bool:
    return "forward" in vars(trainer.model.get_base_model().base_model)


def make_windowed_model(tiny_model: Path, folder: Path, window: int) -> Path:
    """A tiny Mistral whose layers look back ``window`` tokens only."""
    import torch
    from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    tokens = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = MistralConfig(
        **sizes, **tokens, num_key_value_heads=2, sliding_window=window, initializer_range=0.1
    )
    MistralForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_pair_is_one_row_and_what_begins_alike_stands_there_once() -> None:
    import torch

    ids = torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0], [5, 6, 3, 4], [8, 1, 2, 0]])
    real = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]])
    pairs = shared_prompt.pack(ids, real)
    assert pairs.input_ids.tolist() == [[5, 6, 7, 3, 4], [8, 9, 1, 2, 0]]
    assert pairs.position_ids.tolist() == [[0, 1, 2, 2, 3], [0, 1, 1, 2, 0]]
    assert pairs.places.tolist() == [[0, 1, 2, 0], [0, 1, 0, 0], [0, 1, 3, 4], [0, 2, 3, 0]]
    looks = (pairs.attention_mask[0, 0] == 0).int().tolist()
    assert looks == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1],
    ]


def test_one_side_that_is_the_beginning_of_the_other_adds_nothing() -> None:
    import torch

    ids, real = torch.tensor([[5, 6, 0], [5, 6, 7]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert shared_prompt.pack(ids, real).input_ids.tolist() == [[5, 6, 7]]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("continued", [False, True], ids=["a new adapter", "a further one"])
def test_log_probabilities_and_gradients_are_those_of_the_stock_trainer(
    attention: str, continued: bool, tiny_model: Path, tmp_path: Path
) -> None:
    import torch

    adapter = make_adapter(tiny_model, tmp_path / "adapter", seed=1) if continued else None
    found: dict[bool, tuple[Any, Any, dict[str, Any]]] = {}
    for shared in (False, True):
        trainer = trainer_on(tiny_model, tmp_path / "work", adapter, share_prompt=shared)
        assert is_shared(trainer) == shared
        trainer.model.get_base_model().set_attn_implementation(attention)
        batch = batch_of(trainer)
        reference = torch.cat(trainer.compute_ref_log_probs(trainer.model, batch))
        trainer.model.eval()
        trainer.compute_loss(trainer.model, batch).backward()
        grads = {
            name: one.grad for name, one in trainer.model.named_parameters() if one.grad is not None
        }
        found[shared] = shared_prompt._log_probs(trainer.model, batch), reference, grads
    assert found[True][2].keys() == found[False][2].keys()
    assert any(grad.abs().max() > 1e-4 for grad in found[False][2].values())
    torch.testing.assert_close(found[True], found[False], rtol=1e-4, atol=1e-5)


def test_fewer_tokens_go_through_the_model(tiny_model: Path, tmp_path: Path) -> None:
    seen = {}
    for shared in (False, True):
        trainer = trainer_on(tiny_model, tmp_path / "work", share_prompt=shared)
        layer = trainer.model.get_base_model().base_model.layers[0]
        layer.register_forward_pre_hook(
            lambda _, given, shared=shared: seen.update({shared: given[0].shape[:2].numel()})
        )
        shared_prompt._log_probs(trainer.model, batch_of(trainer))
    assert seen[True] < 0.75 * seen[False]


@pytest.mark.parametrize("losses", [("sigmoid",), ("ipo", "sft"), ("apo_zero",)], ids="+".join)
@pytest.mark.parametrize("micro", [1, 4])
def test_the_trajectory_is_the_same_with_and_without(
    losses: Any, micro: int, tiny_model: Path, tmp_path: Path
) -> None:
    history = {}
    for shared in (True, False):
        settings = DPO(
            **quick(
                num_train_epochs=3,
                per_device_train_batch_size=micro,
                gradient_accumulation_steps=4 // micro,
            ),
            loss_type=losses,
            lora=LORA,
            share_prompt=shared,
        )
        tuned = train_adapter(
            settings, pair_rows(), base=str(tiny_model), output=tmp_path / str(shared), seed=3
        )
        history[shared] = [
            (step["loss"], step["rewards/margins"], step["grad_norm"]) for step in tuned.history
        ]
    assert len(history[True]) == 6
    for step, expected in zip(history[True], history[False], strict=True):
        assert step == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert_close(tmp_path / "True", tmp_path / "False", tolerance=1e-4)


def test_a_sliding_window_shorter_than_a_row_is_found_and_left_to_the_stock_path(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    windowed = make_windowed_model(tiny_model, tmp_path / "windowed", window=8)
    trainer = trainer_on(windowed, tmp_path / "work")
    assert not is_shared(trainer)
    assert "MistralForCausalLM computes a prompt for each row" in caplog.text
    stock = trainer_on(windowed, tmp_path / "work", share_prompt=False)
    batch = batch_of(trainer)
    assert shared_prompt._log_probs(trainer.model, batch).equal(
        shared_prompt._log_probs(stock.model, batch)
    )


def test_a_sliding_window_longer_than_every_row_shares(tiny_model: Path, tmp_path: Path) -> None:
    assert is_shared(
        trainer_on(
            make_windowed_model(tiny_model, tmp_path / "windowed", window=512), tmp_path / "work"
        )
    )


def test_attention_without_masks_of_ones_own_is_left_to_the_stock_path(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    trainer = trainer_on(tiny_model, tmp_path / "work", share_prompt=False)
    trainer.model.config._attn_implementation = "flash_attention_2"
    assert not shared_prompt.share_if_equal(trainer, trainers.row_lengths(trainer.train_dataset))
    assert "its attention is flash_attention_2" in caplog.text


def test_other_calls_of_the_model_are_as_before(tiny_model: Path, tmp_path: Path) -> None:
    import torch

    shared, stock = (
        trainer_on(tiny_model, tmp_path / "work", share_prompt=share).model.eval()
        for share in (True, False)
    )
    left = {
        "input_ids": torch.tensor([[0, 5, 6], [5, 6, 7]]),
        "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
    }
    odd = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.tensor([[1, 1, 1]])}
    for given in (left, odd):
        assert shared(**given).logits.equal(stock(**given).logits)
        texts = [
            model.generate(**given, max_new_tokens=4, do_sample=False) for model in (shared, stock)
        ]
        assert texts[0].equal(texts[1])


def test_weights_rounded_once_give_the_same_bits_as_autocast(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = DPO(**quick(num_train_epochs=2, bf16=True), lora=LORA)
    once = train_adapter(settings, pair_rows(), base=str(tiny_model), output=tmp_path / "once")
    monkeypatch.setattr(shared_prompt, "round_frozen", lambda model: None)
    always = train_adapter(settings, pair_rows(), base=str(tiny_model), output=tmp_path / "always")
    assert once.adapter_hash == always.adapter_hash


# Rows of SFT


def sft_rows(count: int = 8) -> list[dict[str, Any]]:
    """Rows that begin with one instruction, and go on for different lengths."""
    return [
        {
            "prompt": [
                {"role": "system", "content": "Write what the handbook of the ferries says."},
                {
                    "role": "user",
                    "content": f"Question: how many berths has ship {n}?" + " Now?" * n,
                },
            ],
            "completion": [{"role": "assistant", "content": f"It has {n * n} berths."}],
        }
        for n in range(count)
    ]


def sft_on(tiny_model: Path, output: Path, **changes: Any) -> Any:
    settings = SFT(**quick(num_train_epochs=2, gradient_accumulation_steps=1) | changes)
    return train_adapter(settings, sft_rows(), base=str(tiny_model), output=output, seed=3)


@pytest.mark.parametrize("together", [2, 3, 6])
def test_any_number_of_rows_is_one_row(together: int) -> None:
    import torch

    draw = torch.Generator().manual_seed(together)
    ids = torch.randint(3, 9, (6, 7), generator=draw)
    ids[:, :2] = 5
    real = (torch.arange(7) < torch.randint(3, 8, (6, 1), generator=draw)).long()
    packed = shared_prompt.pack(ids * real, real, together)
    shown = packed.input_ids.repeat(together, 1).gather(1, packed.places)
    assert (shown * real).tolist() == (ids * real).tolist()
    positions = packed.position_ids.repeat(together, 1).gather(1, packed.places)
    assert (positions * real).tolist() == (torch.arange(7) * real).tolist()
    # Each token sees the tokens before it in its own row, and no other.
    for row in range(6):
        looks = packed.attention_mask[row % (6 // together), 0]
        for place in range(int(real[row].sum())):
            seen = (looks[packed.places[row, place]] == 0).nonzero().flatten().tolist()
            assert seen == sorted(packed.places[row, : place + 1].tolist())


@pytest.mark.parametrize("size", [3, 4, 8])
def test_a_training_of_sft_is_the_same_with_and_without(
    size: int, tiny_model: Path, tmp_path: Path
) -> None:
    found = {
        shared: sft_on(
            tiny_model,
            tmp_path / str(shared),
            share_prompt=shared,
            per_device_train_batch_size=size,
            lora=LORA,
        )
        for shared in (True, False)
    }
    one, other = (
        [(step["loss"], step["grad_norm"]) for step in found[shared].history]
        for shared in (True, False)
    )
    torch_close(one, other)
    assert found[True].tokens == found[False].tokens


def test_a_training_that_was_done_without_sharing_is_found(
    tiny_model: Path, tmp_path: Path
) -> None:
    first = sft_on(tiny_model, tmp_path / "sft", share_prompt=False)
    assert sft_on(tiny_model, tmp_path / "sft") == first


def test_rows_of_sft_go_through_the_model_as_fewer_tokens(tiny_model: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    settings = SFT(**quick(per_device_train_batch_size=8, gradient_accumulation_steps=1))
    trainer = trainers.make_trainer(
        settings, sft_rows(), [], tiny_model, None, tmp_path / "work/.w.x.y", 0
    )
    layer = trainer.model.get_base_model().base_model.layers[0]
    layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[:2].numel()))
    batch = batch_of(trainer)
    before = shared_prompt._log_probs(trainer.model, batch)
    with compat.compact_lm_head():
        assert shared_prompt.share_if_equal(trainer, trainers.row_lengths(trainer.train_dataset))
    after = shared_prompt._log_probs(trainer.model, batch)
    torch_close(after.tolist(), before.tolist())
    assert seen[-1] < 0.75 * seen[0]


def test_rows_that_would_become_too_long_are_packed_fewer_to_one() -> None:
    import torch

    ids = torch.arange(600).repeat(4, 1)
    ids[:, 550:] += torch.arange(4)[:, None]
    real = torch.ones_like(ids)
    assert shared_prompt.choose_together(ids, real) == 4
    ids[:, 100:] += 1000 * torch.arange(4)[:, None]
    assert shared_prompt.choose_together(ids, real) == 2
    assert shared_prompt.choose_together(ids[:3], real[:3]) == 1
    assert shared_prompt.choose_together(torch.arange(8).view(4, 2), torch.ones(4, 2)) == 1


def torch_close(one: Any, other: Any) -> None:
    import torch

    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
