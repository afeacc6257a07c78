"""A PEFT adapter as GGUF: the same sums, in llama.cpp's names and order of rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import make_adapter

from cowest_dspy.errors import ModelError
from cowest_dspy.lms import lora_gguf
from cowest_dspy.lms.local.weights import adapter_hash


@pytest.fixture
def adapter(tiny_model: Path, tmp_path: Path) -> Path:
    return make_adapter(tiny_model, tmp_path / "adapter", seed=1)


def configured(adapter: Path, **changes: Any) -> Path:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return adapter


def written(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata and tensors of a GGUF file."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def in_peft(adapter: Path, module: str) -> tuple[Any, Any]:
    from safetensors.numpy import load_file

    tensors = load_file(adapter / "adapter_model.safetensors")
    return tensors[f"base_model.model.{module}.lora_A.weight"], tensors[
        f"base_model.model.{module}.lora_B.weight"
    ]


def test_an_adapter_has_its_content_in_its_name_and_what_llama_cpp_asks_for(
    adapter: Path, tiny_model: Path
) -> None:
    file = lora_gguf.convert(adapter, tiny_model)
    fields, tensors = written(file)
    assert (
        file.name == f"cowest-{adapter_hash(adapter)}.gguf"
        and lora_gguf.convert(adapter, tiny_model) == file
    )
    assert (fields["general.type"], fields["general.architecture"], fields["adapter.type"]) == (
        "adapter",
        "llama",
        "lora",
    )
    assert fields["adapter.lora.alpha"] == 8 and len(tensors) == 2 * 2 * 7
    a, b = in_peft(adapter, "model.layers.1.mlp.down_proj")
    assert np.array_equal(tensors["blk.1.ffn_down.weight.lora_a"], a)
    assert np.array_equal(tensors["blk.1.ffn_down.weight.lora_b"], b)
    assert {path.name for path in adapter.iterdir()} <= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }


@pytest.mark.parametrize(
    ("module", "name", "heads"), [("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2)]
)
def test_rows_that_are_rotated_together_stand_together(
    module: str, name: str, heads: int, adapter: Path, tiny_model: Path
) -> None:
    _, tensors = written(lora_gguf.convert(adapter, tiny_model))
    _, b = in_peft(adapter, f"model.layers.0.self_attn.{module}")
    size = len(b) // heads
    for head in range(heads):
        ours, theirs = (
            rows[head * size : (head + 1) * size]
            for rows in (tensors[f"blk.0.{name}.weight.lora_b"], b)
        )
        assert np.array_equal(ours[0::2], theirs[: size // 2]) and np.array_equal(
            ours[1::2], theirs[size // 2 :]
        )


def test_rslora_and_patterns_scale_b(adapter: Path, tiny_model: Path) -> None:
    configured(adapter, use_rslora=True, alpha_pattern={"down_proj": 2})
    _, tensors = written(lora_gguf.convert(adapter, tiny_model))
    # llama.cpp multiplies by alpha / rank = 8 / 4 itself; PEFT by alpha / sqrt(rank): 8 / 2, or 2 /
    # 2 by the pattern.
    for module, name, factor in (("down_proj", "ffn_down", 0.5), ("up_proj", "ffn_up", 2.0)):
        _, b = in_peft(adapter, f"model.layers.0.mlp.{module}")
        assert np.allclose(tensors[f"blk.0.{name}.weight.lora_b"], b * factor)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "biases"),
        ({"modules_to_save": ["lm_head"]}, "whole modules"),
    ],
)
def test_what_llama_cpp_cannot_take_is_said(
    changes: dict[str, Any], says: str, adapter: Path, tiny_model: Path
) -> None:
    with pytest.raises(ModelError, match=f"plain LoRA adapters only, and this one has {says}"):
        lora_gguf.convert(configured(adapter, **changes), tiny_model)


def test_a_model_of_another_kind_is_sent_to_vllm(
    adapter: Path, tiny_model: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(tiny_model, tmp_path / "other")
    config = other / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"gemma3_text"'))
    with pytest.raises(
        ModelError, match=r"is a gemma3_text model.*llama, mistral, qwen2, qwen3.*vllm"
    ):
        lora_gguf.convert(adapter, other)
