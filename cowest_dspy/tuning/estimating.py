"""What a training will take, before it starts: memory from the model's shape and the rows' lengths,
time from one measured layer.

    found = estimate(DPO(), Lengths.of(rows, folder), folder)
    print(found)            # about 2.1 GiB of 24.0 free, about 12 minutes for 120 steps
    found.fits              # True

Memory is a sum of parts, each of which can be looked at: weights, the adapter with its gradients
and Adam's two averages, what the forward pass keeps for the backward pass, the LM head's tile. How
much a layer keeps was fitted to measured peaks on a CPU (benchmarks/bench_estimate.py) and is
within a factor of 2 there; on a GPU it was never compared. Time is that of one layer of the model
itself with its adapter (speed.py), times layers, rows and passes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cowest_dspy.errors import CowestError
from cowest_dspy.lms.local import footprint, weights
from cowest_dspy.tuning.cluster import Machines, machines
from cowest_dspy.tuning.config import DPO, KTO, SFT, Lora
from cowest_dspy.tuning.rows import Row
from cowest_dspy.tuning.speed import layer_speed

HIDDEN, INNER, SCORES = 22, 8, 2
"""Numbers that a layer with LoRA keeps: of a token so many times the hidden width and the MLP's
inner one, and of each attention head so many times the square of a row's tokens (eager attention,
which is what trains on a CPU; a GPU's keeps none)."""
HALVED = 0.75
"""What is kept under bfloat16, as part of that: norms and sums stay float32."""
TILE = 4096, 3
"""Tokens that the LM head looks at together at most (TRL's), and arrays of tokens times vocabulary
at its peak."""
LIBRARIES = 0.6 * 2**30
"""Bytes of a process that has imported PyTorch, transformers and TRL."""
LOOKED_AT = 48
"""Rows that are tokenised for their lengths: the longest by characters, and others spread over all.
"""


@dataclass(frozen=True)
class Lengths:
    """Tokens of training rows: how many rows, the longest, the mean of prompts and of completions.
    A pair has two of these."""

    rows: int
    longest: int
    prompt: float
    completion: float
    sides: int = 1

    @classmethod
    def of(cls, data: Sequence[Row], folder: Path) -> Lengths:
        """Of rows, by the tokenizer of the model in ``folder``; of many rows some are looked at,
        the longest among them."""
        tokenizer = weights.load_tokenizer(folder)
        by_size = sorted(range(len(data)), key=lambda index: -_characters(data[index]))
        spread = range(0, len(data), max(1, len(data) // LOOKED_AT))
        found = [_tokens(tokenizer, data[index]) for index in sorted({*by_size[:8], *spread})]
        typical = [_tokens(tokenizer, data[index]) for index in spread]
        prompt = sum(prompt for prompt, _ in typical) / len(typical)
        completion = sum(sum(rest) / len(rest) for _, rest in typical) / len(typical)
        longest = max(prompt + max(rest) for prompt, rest in found)
        return cls(len(data), longest, prompt, completion, len(found[0][1]))


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at its peak. ``libraries`` are there before training begins, unless the
    process is started for it."""

    libraries: float
    weights: float
    adapter: float
    activations: float
    head: float

    @property
    def own(self) -> float:
        """Of training itself."""
        return self.weights + self.adapter + self.activations + self.head

    @property
    def total(self) -> float:
        """All of the process."""
        return self.libraries + self.own


@dataclass(frozen=True)
class Estimate:
    """What a training will take: ``memory`` of each process, ``needed`` bytes of all on one device,
    ``free`` bytes there; ``seconds`` of ``steps`` optimiser steps, None where no layer could be
    measured. ``where`` is "GPU" or "memory"."""

    steps: int
    memory: Memory
    needed: float
    free: float
    seconds: float | None
    where: str = "memory"

    @property
    def fits(self) -> bool:
        """Whether that much is free."""
        return self.needed <= self.free

    def __str__(self) -> str:
        place = " on the GPU" if self.where == "GPU" else ""
        time = "" if self.seconds is None else f"about {_time(self.seconds)} for "
        return (
            f"about {_gib(self.needed)} GiB of {_gib(self.free)} free{place}, "
            f"{time}{self.steps:,} steps"
        )

    def warning(self) -> str | None:
        """What to do where it does not fit; None where it does."""
        if self.fits:
            return None
        parts = sorted(
            (
                (getattr(self.memory, name), name)
                for name in ("weights", "adapter", "activations", "head")
            ),
            reverse=True,
        )
        largest = f"{_gib(parts[0][0])} GiB are {parts[0][1]}"
        return (
            f"training may need more than there is ({largest} of one process): lower "
            "micro_batch_size, shorten rows, "
            "take a smaller model, or share it out over GPUs (programs/accelerate/fsdp.yaml)"
        )


def estimate(
    settings: SFT | DPO | KTO,
    lengths: Lengths,
    folder: Path,
    *,
    where: Machines | None = None,
    further: bool = False,
    measure: bool = True,
) -> Estimate:
    """What training by ``settings`` on rows of these ``lengths`` takes.

    ``folder``: of the base. ``further``: from an adapter on, which DPO and KTO then keep a copy of.
        ``measure``: whether one layer is timed (some seconds for a large model).
    """
    import torch

    where, gpu = where or Machines(1), torch.cuda.is_available()
    half = weights.choose_dtype() == "bfloat16" if settings.bf16 is None else settings.bf16
    steps, share = settings.steps(lengths.rows), max(1, settings.step_rows // where.processes)
    micro = min(settings.per_device_train_batch_size, share)
    memory = _memory(
        settings, lengths, folder, micro, half=half, gpu=gpu, further=further, parts=where
    )
    seconds = _seconds(settings, lengths, folder, where, half) if measure else None
    if gpu:
        return Estimate(
            steps, memory, memory.own, float(torch.cuda.mem_get_info()[0]), seconds, "GPU"
        )
    import psutil

    # Processes that are started for it bring their own libraries; this one has them.
    needed = memory.own if where.alone else memory.total * where.here
    free = float(psutil.virtual_memory().available)
    return Estimate(steps, memory, needed, free, seconds)


def foreseen(
    settings: SFT | DPO | KTO,
    data: Lengths | Sequence[Row],
    base: str | Path,
    *,
    processes: int | str | Path | Machines = 1,
    further: bool = False,
) -> Estimate | None:
    """As :func:`estimate`, of a base's folder or id and of rows as they are; None where they do not
    tell.

    Training itself then says why: rows that cannot be trained on, a model of another make, a file
    that is not there.
    """
    from jinja2 import TemplateError

    try:
        folder = weights.locate(str(base))
        lengths = data if isinstance(data, Lengths) else Lengths.of(data, folder)
        return estimate(settings, lengths, folder, where=machines(processes), further=further)
    except (
        AttributeError,
        IndexError,
        KeyError,
        OSError,
        TypeError,
        ValueError,
        ZeroDivisionError,
        TemplateError,
        CowestError,
    ):
        return None


def _memory(
    settings: Any,
    lengths: Lengths,
    folder: Path,
    micro: int,
    *,
    half: bool,
    gpu: bool,
    further: bool,
    parts: Machines,
) -> Memory:
    tensors, config = footprint.tensors(folder), _config(folder)
    hidden, layers = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    layer = [shape for name, shape in tensors.items() if _adapted(name, shape, "all-linear")]
    all_of, linear = (sum(math.prod(shape) for shape in some) for some in (tensors.values(), layer))
    shards = parts.processes if parts.sharded else 1
    bytes_of = (2 if half and not parts.sharded else 4) * linear + 4 * (all_of - linear)
    lora = settings.lora or Lora()
    trained = sum(
        lora.r * sum(shape)
        for name, shape in tensors.items()
        if _adapted(name, shape, lora.target_modules)
    )
    # In float32: the numbers, their gradients, Adam's two averages; and the reference's copy.
    adapter = 4 * trained * (4 + (further and not isinstance(settings, SFT)))
    tokens, row = _together(settings, lengths)
    scores = 0.0 if gpu else SCORES * config.num_attention_heads * row * row * (tokens / row)
    kept = (
        layers
        * micro
        * (tokens * (HIDDEN * hidden + INNER * inner) + scores)
        * 4
        * (HALVED if half else 1)
    )
    looked_at = min(TILE[0], micro * (lengths.longest - lengths.prompt) * lengths.sides)
    gathered = 4 * linear / layers if shards > 1 else 0.0
    head = looked_at * config.vocab_size * 4 * TILE[1]
    return Memory(LIBRARIES, bytes_of / shards + gathered, adapter / shards, kept, head)


def _together(settings: Any, lengths: Lengths) -> tuple[float, float]:
    """Tokens that one row of training takes through the model, at the longest, and those of one
    sequence of attention."""
    longest = lengths.longest
    if lengths.sides == 1:
        return longest, longest
    if settings.share_prompt:
        together = lengths.prompt + 2 * (longest - lengths.prompt)
        return together, together
    return 2.0 * longest, longest


def _seconds(
    settings: Any, lengths: Lengths, folder: Path, where: Machines, half: bool
) -> float | None:
    """Of all steps on one process's part, with one more pass forward over every pair for the
    reference."""
    speed = layer_speed(folder, settings.lora or Lora(), half)
    if speed is None:
        return None
    config, row = _config(folder), lengths.prompt + lengths.completion
    shared = lengths.sides == 2 and settings.share_prompt
    tokens = lengths.prompt + lengths.completion * 2 if shared else row * lengths.sides
    said = lengths.completion * lengths.sides
    rows = settings.steps(lengths.rows) * settings.step_rows / where.processes
    trained = config.num_hidden_layers * speed.both(tokens, row) + speed.head(
        said * config.vocab_size * config.hidden_size, 6
    )
    referring = 0.0
    if not isinstance(settings, SFT):
        referring = config.num_hidden_layers * speed.forward(tokens, row)
        referring += speed.head(said * config.vocab_size * config.hidden_size, 2)
    return rows * trained + lengths.rows * referring


def _adapted(name: str, shape: tuple[int, ...], targets: str | Iterable[str]) -> bool:
    """Whether LoRA adapts this tensor: the weight of a linear layer, but not of the embeddings or
    the head."""
    if (
        len(shape) != 2
        or not name.endswith("weight")
        or any(part in name for part in ("embed", "lm_head", "wte", "wpe"))
    ):
        return False
    return isinstance(targets, str) or name.removesuffix(".weight").rpartition(".")[2] in targets


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder).get_text_config()


def _characters(row: Row) -> int:
    return sum(
        len(str(value))
        for name, value in row.items()
        if name in ("prompt", "completion", "chosen", "rejected")
    )


def _tokens(tokenizer: Any, row: Row) -> tuple[int, list[int]]:
    """Tokens of the prompt, and of each completion."""
    prompt = len(
        tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
    )
    sides = [row[name] for name in ("chosen", "rejected", "completion") if name in row]
    whole = [
        len(tokenizer.apply_chat_template([*row["prompt"], *side], return_dict=False))
        for side in sides
    ]
    return prompt, [max(1, size - prompt) for size in whole]


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f}" if size >= 0.1 * 2**30 else f"{size / 2**30:.2f}"


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{max(1, round(seconds))} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
