"""A PEFT LoRA adapter -> the GGUF file that llama.cpp's server can be started with.

    lora_gguf.convert(Path("adapters/dpo"), base=Path("models/SmolLM2-135M-Instruct"))    #
        .../cowest-9f31c2a07b1e.gguf

The file's name holds the hash of the adapter's weights, so that a server's list of adapters says
which ones it has. How PEFT scales an adapter (rank, alpha, rsLoRA, patterns) is put into one alpha
and the B matrices.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cowest_dspy.errors import ModelError
from cowest_dspy.lms.local import weights
from cowest_dspy.utils.extras import check_extra
from cowest_dspy.utils.files import workplace
from cowest_dspy.utils.reading import read_json_text

# Of a Hugging Face model_type: llama.cpp's architecture, and whether its rows of q and k are stored
# in the order of llama.cpp's "normal" rotary embedding (pairs beside each other) instead of Hugging
# Face's (halves).
ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
}
_TENSOR = re.compile(
    r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight$"
)


@dataclass(frozen=True)
class _Lora:
    """One adapted layer: Hugging Face's name of it, A ``[rank, in]``, B ``[out, rank]``, and PEFT's
    scaling of their product."""

    module: str
    a: Any
    b: Any
    scaling: float


def file_name(adapter_hash: str) -> str:
    """The name of the file that holds the adapter with this hash."""
    return f"cowest-{adapter_hash}.gguf"


def convert(adapter: Path, base: Path) -> Path:
    """The adapter in the folder ``adapter`` as a GGUF file, for the model whose folder is ``base``.

    The file lies in :func:`cowest_dspy.lms.local.weights.cache_folder`, is made once, and appears
    whole or not at all. A file that lies beside the adapter is never taken for it: whoever gave the
    adapter may have put it there.

    Raises:
        ModelError: no adapter there, a damaged one, one that llama.cpp cannot take (DoRA, biases,
            embeddings, whole modules), a model of an architecture that is not known here, or the
            package ``gguf`` is not installed.
    """
    adapter = Path(adapter).resolve()
    config = _plain(adapter)
    file = Path(base) / "config.json"
    shape = file.read_bytes()
    place = (
        weights.cache_folder() / "lora" / hashlib.sha256(shape).hexdigest()[: weights.HASH_LENGTH]
    )
    target = place / file_name(weights.adapter_hash(adapter))
    if target.is_file():
        return target
    check_extra("gguf", "Writing an adapter for llama.cpp", ModelError)
    model = read_json_text(shape, str(file), ModelError)
    kind = model.get("model_type")
    if kind not in ARCHITECTURES:
        raise ModelError(
            f"{base} is a {kind} model: its adapters cannot be converted for llama.cpp here. "
            f"Known: {', '.join(ARCHITECTURES)}. "
            'Serve it with vLLM (server = "vllm"), which takes the adapter as it is.'
        )
    alpha, loras = _read(adapter, config)
    with workplace(target) as work:
        _write(work / target.name, model, alpha, loras)
        os.replace(work / target.name, target)
    return target


def _plain(folder: Path) -> dict[str, Any]:
    """The adapter's configuration, if it is a plain LoRA."""
    config = weights.adapter_config(folder)
    not_taken = {
        "DoRA": config.get("use_dora"),
        "whole modules (modules_to_save)": config.get("modules_to_save"),
        "biases": config.get("bias", "none") != "none" or config.get("lora_bias"),
        f"{config.get('peft_type')} instead of LoRA": config.get("peft_type") != "LORA",
    }
    for what in (what for what, there in not_taken.items() if there):
        raise ModelError(
            f"{folder}: llama.cpp takes plain LoRA adapters only, and this one has {what}."
        )
    return config


def _read(folder: Path, config: dict[str, Any]) -> tuple[float, list[_Lora]]:
    """PEFT's alpha and the adapted layers."""
    from safetensors import safe_open

    sides: dict[str, dict[str, Any]] = {}
    with safe_open(folder / weights.ADAPTER_WEIGHTS, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - safe_open has keys() and is no dictionary
            found = _TENSOR.match(name)
            if found is None:
                raise ModelError(
                    f"{folder}: llama.cpp takes LoRA of linear layers only, and this adapter has "
                    f"{name}."
                )
            sides.setdefault(found["module"], {})[found["side"]] = (
                tensors.get_tensor(name).float().numpy()
            )
    return float(config["lora_alpha"]), [
        _Lora(module, pair["A"], pair["B"], _scaling(config, module, pair["A"].shape[0]))
        for module, pair in sorted(sides.items())
    ]


def _scaling(config: dict[str, Any], module: str, rank: int) -> float:
    """PEFT's factor of B times A for one layer: alpha / rank, or alpha / sqrt(rank) with rsLoRA;
    patterns may set alpha."""
    patterns = (config.get("alpha_pattern") or {}).items()
    alpha = next(
        (value for pattern, value in patterns if re.match(rf"(.*\.)?({pattern})$", module)),
        config["lora_alpha"],
    )
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _write(target: Path, model: dict[str, Any], alpha: float, loras: list[_Lora]) -> None:
    from gguf import GGUFWriter, get_tensor_name_map
    from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES

    name, permuted = ARCHITECTURES[model["model_type"]]
    arch: Any = next(
        arch
        for arch, known in MODEL_ARCH_NAMES.items()
        if known == name and isinstance(arch, MODEL_ARCH)
    )
    names = get_tensor_name_map(arch, model["num_hidden_layers"])
    writer = GGUFWriter(target, name)
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for lora in loras:
        tensor = names.get_name(lora.module)
        if tensor is None:
            raise ModelError(
                f"llama.cpp has no layer for {lora.module} in a {name} model: adapt other modules."
            )
        # llama.cpp computes alpha / rank itself; what PEFT does beyond that goes into B.
        b = lora.b * (lora.scaling * lora.a.shape[0] / alpha)
        if permuted and lora.module.endswith(("q_proj", "k_proj")):
            heads = model["num_attention_heads"]
            b = _permuted(
                b,
                heads
                if lora.module.endswith("q_proj")
                else model.get("num_key_value_heads") or heads,
            )
        writer.add_tensor(f"{tensor}.weight.lora_a", lora.a)
        writer.add_tensor(f"{tensor}.weight.lora_b", b.astype(lora.a.dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _permuted(b: Any, heads: int) -> Any:
    """Rows ``[out, rank]`` of a q or k projection: in each head, the two halves become pairs, as in
    the weights of the GGUF."""
    return b.reshape(heads, 2, -1, b.shape[1]).swapaxes(1, 2).reshape(b.shape)
