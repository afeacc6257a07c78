"""Which models are computed in parts, and that those which are not say what transformers says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import make_tiny_model

from cowest_dspy.lms import LocalEngine
from cowest_dspy.store import serialize

SYSTEM = {
    "role": "system",
    "content": (
        "You are a terse machine that answers with a few letters, whatever it is asked, always."
    ),
}


def made(folder: Path, base: Path, kind: str) -> Path:
    """A random model of another architecture, with the tiny model's tokenizer."""
    import shutil

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    common: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.1,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None,
    }  # fmt: skip
    special: dict[str, dict[str, Any]] = {
        "qwen2": {},
        "qwen3": {},
        "mistral": {"sliding_window": 24},
        "gemma2": {
            "sliding_window": 24,
            "attn_logit_softcapping": 2.0,
            "query_pre_attn_scalar": 16,
        },
    }
    config = AutoConfig.for_model(kind, **common, **special[kind])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (base / name).is_file():
            shutil.copy(base / name, folder / name)
    return folder


def said(folder: Path, messages: list[dict[str, str]], max_tokens: int) -> str:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    out = model.generate(**ids, max_new_tokens=max_tokens, do_sample=False)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("kind", "in_parts"), [("qwen2", True), ("qwen3", True), ("mistral", False), ("gemma2", False)]
)
def test_every_architecture_says_what_generate_says(
    tiny_model: Path, tmp_path: Path, kind: str, in_parts: bool
) -> None:
    engine = LocalEngine(made(tmp_path / kind, tiny_model, kind), dtype="float32", max_batch=4)
    asked = [
        [SYSTEM, {"role": "user", "content": f"Question {'x' * place}?"}] for place in (1, 9, 3)
    ]
    from concurrent.futures import ThreadPoolExecutor

    requests = [
        serialize.request_from_messages(engine.model_id, messages, max_tokens=10)
        for messages in asked
    ]
    with ThreadPoolExecutor(3) as pool:
        answers = [serialize.response_text(one) for one in pool.map(engine.complete, requests)]
    assert answers == [said(tmp_path / kind, messages, 10) for messages in asked]
    assert engine._load().joinable == in_parts


def test_a_plain_model_keeps_seeds_and_batches_apart_too(tiny_model: Path, tmp_path: Path) -> None:
    folder = made(tmp_path / "gemma2", tiny_model, "gemma2")
    asked = [{"role": "user", "content": "Hello?"}]

    def drafts(max_batch: int) -> list[str]:
        from concurrent.futures import ThreadPoolExecutor

        engine = LocalEngine(folder, dtype="float32", max_batch=max_batch)
        requests = [
            serialize.request_from_messages(
                engine.model_id, asked, max_tokens=8, temperature=1.0, seed=seed
            )
            for seed in range(5)
        ]
        with ThreadPoolExecutor(5) as pool:
            return [serialize.response_text(one) for one in pool.map(engine.complete, requests)]

    assert drafts(4) == drafts(1) and len(set(drafts(4))) > 1


def test_a_shared_beginning_is_computed_once_for_all_prompts(tmp_path: Path) -> None:
    engine = LocalEngine(make_tiny_model(tmp_path / "tiny"), dtype="float32", max_batch=4)
    asked = [[SYSTEM, {"role": "user", "content": f"{place}?"}] for place in range(3)]
    for messages in asked:
        engine.complete(serialize.request_from_messages(engine.model_id, messages, max_tokens=2))
    assert len(engine._batcher._prefixes) == 1
