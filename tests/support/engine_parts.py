"""Asking the in-process engine, and transformers' own generate, beside each other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tiny import make_adapter

from cowest_dspy.lms import LocalEngine
from cowest_dspy.store import serialize

SHOTS = [
    {"role": "user", "content": "Count to three."},
    {"role": "assistant", "content": "one two three"},
] * 3


SYSTEM = {
    "role": "system",
    "content": "You are a terse machine that answers with a few letters, whatever it is asked.",
}


def prompts(count: int) -> list[list[dict[str, str]]]:
    return [
        [SYSTEM, *SHOTS, {"role": "user", "content": f"Question {'x' * i} {i}?"}]
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> LocalEngine:
    return LocalEngine(tiny_model, dtype="float32", max_batch=8)


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tiny_model, tmp_path_factory.mktemp("adapter"), seed=1)


def ask_all(
    engine: LocalEngine,
    asked: list[list[dict[str, str]]],
    model: str | None = None,
    **settings: Any,
) -> list[str]:
    requests = [
        serialize.request_from_messages(model or engine.model_id, messages, **settings)
        for messages in asked
    ]
    with ThreadPoolExecutor(len(requests)) as pool:
        return [
            serialize.response_text(response) for response in pool.map(engine.complete, requests)
        ]


def generated(
    folder: Path, messages: list[dict[str, str]], max_tokens: int, adapter: Path | None = None
) -> str:
    """What transformers' generate makes of one prompt."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    out = model.generate(**ids, max_new_tokens=max_tokens, do_sample=False)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
