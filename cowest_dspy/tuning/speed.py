"""How fast this machine trains a model: one of its layers with an adapter, forward and backward,
timed with random numbers.

The model's own configuration makes the layer, so that its attention, norms and widths are what is
measured, without reading its weights. Other work on the machine makes it slower, as it will make
the training.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from cowest_dspy.tuning import trainers
from cowest_dspy.tuning.adapters import lora_config
from cowest_dspy.tuning.config import Lora

TOKENS, BUDGET, TIMES = 128, 1.5, 5
"""Tokens of a pass; seconds after which no further pass is timed, and passes at most. The fastest
counts."""


@dataclass(frozen=True)
class Speed:
    """Seconds that one layer takes for a token, forward and in both directions, and the operations
    per second that it reaches."""

    forward_token: float
    both_token: float
    flops: float

    def forward(self, tokens: float, row: float) -> float:
        """Seconds of so many tokens through one layer. ``row``: tokens of the sequences that they
        are in, which cost attention."""
        return tokens * self.forward_token * _longer(row)

    def both(self, tokens: float, row: float) -> float:
        """The same with the way back."""
        return tokens * self.both_token * _longer(row)

    def head(self, products: float, operations: int) -> float:
        """Seconds of the LM head: so many products, each some operations."""
        return products * operations / self.flops


def _longer(row: float) -> float:
    """Longer rows than the measured one take more for attention: a fifth of a layer at 512 tokens,
    as was seen on small models."""
    return 1 + max(0.0, row - TOKENS) / 2048


def layer_speed(folder: Path, lora: Lora, half: bool) -> Speed | None:
    """Measures one layer of the model in ``folder``, once per process; None where its configuration
    makes none that can be measured alone."""
    return _once(folder, lora.model_dump_json(), half)


@lru_cache(maxsize=8)
def _once(folder: Path, lora: str, half: bool) -> Speed | None:
    import torch

    try:
        with trainers.quiet(), torch.random.fork_rng():
            return _measured(folder, Lora.model_validate_json(lora), half)
    except (
        AttributeError,
        KeyError,
        RuntimeError,
        TypeError,
        ValueError,
    ):  # A model that is built otherwise than most.
        return None


def _measured(folder: Path, lora: Lora, half: bool) -> Speed:
    import torch
    from peft import get_peft_model
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(folder)
    text: Any = config.get_text_config()
    text.num_hidden_layers = 1
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1]
    text.vocab_size = 16  # The embeddings are not what is measured.
    text.pad_token_id = text.bos_token_id = text.eos_token_id = None
    gpu = torch.cuda.is_available()
    base: Any = AutoModel.from_config(
        text, dtype=torch.float32, attn_implementation=None if gpu else "eager"
    )
    wanted = lora_config(lora)
    wanted.task_type = None
    model: Any = get_peft_model(base, wanted)
    device = torch.device("cuda" if gpu else "cpu")
    model.to(device)
    linear = sum(of.weight.numel() for of in base.modules() if isinstance(of, torch.nn.Linear))
    inputs = torch.randn(1, TOKENS, text.hidden_size, device=device, requires_grad=True)

    def timed(backward: bool) -> float:
        started = time.perf_counter()
        with (
            torch.autocast(device.type, torch.bfloat16, enabled=half),
            torch.set_grad_enabled(backward),
        ):
            out = model(inputs_embeds=inputs, use_cache=False).last_hidden_state
            if backward:
                out.float().sum().backward()
        if gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def best(backward: bool) -> float:
        taken, began = [timed(backward) for _ in range(2)][1:], time.perf_counter()
        while len(taken) < TIMES and time.perf_counter() - began < BUDGET:
            taken.append(timed(backward))
        return min(taken)

    forward, both = best(False), best(True)
    return Speed(forward / TOKENS, both / TOKENS, 2 * linear * TOKENS / forward)
