"""Adapters on disk and in a model: start one, continue one, save one as safetensors and nothing
else, atomically."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cowest_dspy.errors import TuningError
from cowest_dspy.lms.local.lora import attach
from cowest_dspy.lms.local.weights import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_hash, loading
from cowest_dspy.tuning.config import Lora
from cowest_dspy.utils import files

FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)


def load_base(folder: Path) -> Any:
    """A fresh copy of the model in ``folder``, in float32: training changes a model in place, so
    nobody else's is used."""
    import torch
    from transformers import AutoModelForCausalLM

    with loading():
        # On a CPU the backward pass of plain attention is faster than that of the fused one: a
        # fifth of a whole step.
        attention = None if torch.cuda.is_available() else "eager"
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=attention
        )


def lora_config(lora: Lora) -> Any:
    """``lora`` as PEFT's configuration."""
    from peft import LoraConfig

    modules = (
        lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    )
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=lora.lora_dropout,
        target_modules=modules,
        task_type="CAUSAL_LM",
    )


def continued(base: Any, adapter: Path, lora: Lora | None) -> Any:
    """``base`` with the adapter in ``adapter``, to be trained further.

    Raises:
        ModelError: the folder holds no adapter that fits the base.
        TuningError: ``lora`` is given and asks for another size than the adapter has.
    """
    model = attach(base, adapter, is_trainable=True)
    has: Any = model.peft_config["default"]
    if lora and (lora.r, lora.lora_alpha) != (has.r, has.lora_alpha):
        raise TuningError(
            f"lora asks for rank {lora.r}, alpha {lora.lora_alpha}, but training goes on from the "
            f"adapter in {adapter}, "
            f"which has rank {has.r}, alpha {has.lora_alpha}. Leave lora out, or start without an "
            "adapter."
        )
    return model


def drop_out_as_configured(model: Any) -> None:
    """Gives adapters the dropout of their configuration again: TRL takes every dropout out of a
    model that it tunes on pairs, which is meant for the base, and would leave ``Lora(dropout=...)``
    without any effect."""
    import torch

    for module in model.modules():
        for name, dropout in getattr(module, "lora_dropout", {}).items():
            if isinstance(dropout, torch.nn.Dropout):
                dropout.p = model.peft_config[name].lora_dropout


def count_trainable(model: Any) -> int:
    """Numbers that training may change.

    Raises:
        TuningError: there are none.
    """
    trainable = sum(
        parameter.numel() for parameter in model.parameters() if parameter.requires_grad
    )
    if not trainable:
        raise TuningError(
            "Nothing in this model can be trained: no parameter of an adapter requires a gradient."
        )
    return trainable


@contextmanager
def workplace(output: Path) -> Iterator[Path]:
    """A folder beside ``output`` for everything that training writes; gone when the context ends.

    Those that killed processes have left for the same output go, too.

    Raises:
        TuningError: ``output`` exists and is not an adapter, so it must not be replaced.
    """
    if output.exists() and not (
        output.is_dir() and {path.name for path in output.iterdir()} <= set(FILES)
    ):
        raise TuningError(
            f"{output} exists and is not an adapter of ours: it is not overwritten. Give another "
            "output folder."
        )
    with files.workplace(output) as folder:
        yield folder


def save(model: Any, work: Path, output: Path, base_name: str) -> str:
    """Writes the trained adapter of ``model`` into ``output``, all of it or nothing; gives its
    content hash.

    The configuration names the base by ``base_name``, not by its path on this machine, and does not
    depend on hash order. Of a model whose weights are shared out over processes every process has
    to call it; each gets the whole adapter.
    """
    staged = work / "adapter"
    named = {
        "selected_adapters": ["default"],
        "safe_serialization": True,
        "save_embedding_layers": False,
    }
    model.save_pretrained(staged, state_dict=whole(model), **named)
    for path in staged.iterdir():
        if path.name not in FILES:
            path.unlink()
    config = json.loads((staged / FILES[0]).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base_name
    if isinstance(config.get("target_modules"), list):
        config["target_modules"] = sorted(config["target_modules"])
    (staged / FILES[0]).write_text(
        json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
    files.replace_folder(staged, output)
    return adapter_hash(output)


def whole(model: Any) -> dict[str, Any] | None:
    """The adapter's tensors put together again where FSDP has shared them out, on the CPU; None
    where it has not.

    Only the adapter is gathered, one tensor at a time: the base stays where it is, however large it
    is.
    """
    from torch.distributed.tensor import DTensor

    named = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    if not any(isinstance(parameter, DTensor) for parameter in named.values()):
        return None
    return {
        name: (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter)
        .detach()
        .cpu()
        for name, parameter in named.items()
    }
