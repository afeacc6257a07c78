"""Rows, settings and measures that the tests of tuning share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tuning_fixtures import modules_are_no_garbage  # noqa: F401 - fixtures

from cowest_dspy.tuning import (
    DPO,
    SFT,
    Lora,
    train_adapter,
)
from cowest_dspy.tuning.data import split_rows

# Large enough steps that a few of them move a tiny model.
QUICK: dict[str, Any] = {
    "num_train_epochs": 1,
    "learning_rate": 3e-3,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "warmup_steps": 0,
    "bf16": False,
}
LORA = Lora(r=4, lora_alpha=8)


def quick(**changes: Any) -> dict[str, Any]:
    return QUICK | changes


def says(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def sft_rows(count: int = 8) -> list[dict[str, Any]]:
    # Completions of different lengths, so that padding and token-wise averages matter.
    return [
        {
            "prompt": [
                says("system", "Say what the handbook says."),
                says("user", f"How hot is press {number}?"),
            ],
            "completion": [
                says(
                    "assistant",
                    f"Press {number} runs at {100 + number} degrees."
                    + " And at 4 bar." * (number % 3),
                )
            ],
        }
        for number in range(count)
    ]


def pair_rows(count: int = 8) -> list[dict[str, Any]]:
    return [
        {
            "prompt": row["prompt"],
            "chosen": row["completion"],
            "rejected": [
                says(
                    "assistant",
                    "I do not know." if index % 2 else "It is not said anywhere in the handbook.",
                )
            ],
            "example_id": str(index),
            "chosen_influence": 1.0,
        }
        for index, row in enumerate(sft_rows(count))
    ]


def labelled_rows(count: int = 8) -> list[dict[str, Any]]:
    """The sides of ``count`` pairs, one by one: twice as many rows."""
    return labelled(pair_rows(count))


def labelled(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The sides of pairs, one by one."""
    sides = (("chosen", True), ("rejected", False))
    return [
        {"prompt": row["prompt"], "completion": row[side], "label": label, "influence": 1.0}
        for row in pairs
        for side, label in sides
    ]


def held_of(data: list[dict[str, Any]], part: float = 0.4, seed: int = 1) -> list[dict[str, Any]]:
    return [
        data[index]
        for index in split_rows(data, part, seed, [row["example_id"] for row in data]).held_out
    ]


def pairs_with_one_turned_round(
    count: int = 10, part: float = 0.4, seed: int = 1
) -> list[dict[str, Any]]:
    """All of the held-out pairs but one are like those that are trained on, one is the other way
    round: too sure is too much."""
    data = pair_rows(count)
    turned = held_of(data, part, seed)[0]
    turned["chosen"], turned["rejected"] = turned["rejected"], turned["chosen"]
    return data


def kinds(count: int) -> dict[str, tuple[Any, Any, Any]]:
    return {
        "sft": (train_adapter, SFT, sft_rows(count)),
        "dpo": (train_adapter, DPO, pair_rows(count)),
    }


def read(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def assert_close(left: Path, right: Path, tolerance: float) -> None:
    import torch

    first, second = read(left), read(right)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(
            tensor,
            second[name],
            rtol=0,
            atol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def load(folder: Path, adapter: Path | None = None) -> tuple[Any, Any]:
    """Model and tokenizer, loaded by other means than the library's."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    return (
        PeftModel.from_pretrained(model, adapter) if adapter else model
    ).eval(), AutoTokenizer.from_pretrained(folder)


def completion_logprob(
    folder: Path, prompt: list[Any], completion: list[Any], adapter: Path | None = None
) -> tuple[float, int]:
    """The log-probability of a completion's tokens given its prompt, and their number: the
    definition, written out."""
    import torch

    model, tokenizer = load(folder, adapter)
    start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(prompt + completion, return_dict=False)
    with torch.no_grad():
        scores = model(torch.tensor([whole])).logits[0].float().log_softmax(-1)
    places = range(len(start), len(whole))
    return sum(scores[place - 1, whole[place]].item() for place in places), len(places)


def unpaired_rows(count: int) -> list[dict[str, Any]]:
    """Two drafts of each question, one that helped, and one more that hurt for every third."""
    made: list[dict[str, Any]] = []
    for index, row in enumerate(sft_rows(count)):
        made.append(row | {"label": True})
        bad = "I do not know." if index % 2 else "It is not said anywhere in the handbook."
        made.append(row | {"completion": [says("assistant", bad)], "label": False})
        if index % 3 == 0:
            made.append(row | {"completion": [says("assistant", "No.")], "label": False})
    return made


# Dropout draws random numbers in every forward pass; two micro-batches make a step; 8 rows in 5
# passes make 10 of them.
HARD: dict[str, Any] = quick(
    num_train_epochs=5,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    warmup_steps=0.3,
    lora=Lora(r=4, lora_alpha=8, lora_dropout=0.3),
)


class Stopped(Exception):
    """What the tests stop a training with."""


def train(
    kind: str, base: Path, output: Path, seed: int = 3, stop: int | None = None, **changes: Any
) -> tuple[Any, list[int]]:
    """The result and the steps that were told; stopped after that many optimiser steps, the result
    is None."""
    told: list[int] = []

    def on_step(step: int, total: int, logs: dict[str, float]) -> None:
        told.append(step)
        if step == stop:
            raise Stopped

    run, settings, data = kinds(8)[kind]
    try:
        return run(
            settings(**HARD | changes),
            data,
            base=str(base),
            output=output,
            seed=seed,
            on_step=on_step,
        ), told
    except Stopped:
        return None, told


def left(output: Path) -> list[str]:
    return sorted(path.name for path in output.parent.iterdir() if path.name != output.name)


def same(one: Any, other: Any) -> bool:
    files = ("adapter_model.safetensors", "adapter_config.json")
    return one.history == other.history and all(
        (one.path / f).read_bytes() == (other.path / f).read_bytes() for f in files
    )


def watch_parameters(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """The names of a model's parameters ("all"), and of those that a training changed ("changed"),
    once one was run."""
    import torch
    from transformers import Trainer

    seen: dict[str, set[str]] = {}
    run = Trainer.train

    def watched(trainer: Any, *arguments: Any, **options: Any) -> Any:
        before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
        result = run(trainer, *arguments, **options)
        after = dict(trainer.model.named_parameters())
        seen["changed"] = {
            name for name, value in before.items() if not torch.equal(value, after[name])
        }
        seen["all"] = set(after)
        return result

    monkeypatch.setattr(Trainer, "train", watched)
    return seen
