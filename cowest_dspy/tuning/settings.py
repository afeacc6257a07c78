"""What tuning may be told: ``SFT``, ``DPO`` and ``Lora``, frozen and checked when they are made, not at the first step.

    SFT(epochs=4, learning_rate=3e-4)
    DPO(beta=0.1, loss_type=("sigmoid", "sft"), loss_weights=(1.0, 0.2), lora=Lora(rank=32, alpha=64))

A TOML table with the same keys makes the same object.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from cowest_dspy.errors import nearest

# The names that trl.DPOConfig documents (TRL 1.16). TRL itself finds a wrong one only at the first step.
LOSS_TYPES = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
)


Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Part = Annotated[float, Field(ge=0, lt=1)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Lora(_Frozen):
    """The size of a LoRA adapter (Hu et al., 2021, arXiv 2106.09685).

    ``alpha / rank`` scales what the adapter adds; 2 is the ratio that most recipes share. ``dropout`` is a probability, and
    0 because small data is seen a few times only. "all-linear" adapts every linear layer but the LM head, which is what
    LoRA needs to learn as well as full fine-tuning does (Dettmers et al., 2023, arXiv 2305.14314, section 4).
    """

    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    alpha: Positive = 32
    dropout: Part = 0.0
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"


class _Training(_Frozen):
    """What all ways of tuning share; see :class:`SFT` for the meaning of each field."""

    epochs: Positive = 3.0
    learning_rate: Positive = 2e-4
    batch_size: Count = 16
    micro_batch_size: Count | None = None
    warmup: Part = 0.1
    lr_scheduler: Literal["linear", "cosine", "constant"] = "linear"
    max_steps: Count | None = None
    max_length: Annotated[int, Field(ge=2)] | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    lora: Lora | None = None
    checkpoint_steps: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _micro_batches_fill_a_batch(self) -> _Training:
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size must divide batch_size: {self.batch_size} rows "
                f"cannot be fed in equal parts of {self.micro_batch_size}"
            )
        return self

    @property
    def micro_batch(self) -> int:
        """Rows of one forward pass: as given, or the largest divisor of ``batch_size`` that is at most 4."""
        return self.micro_batch_size or max(size for size in range(1, 5) if self.batch_size % size == 0)

    def steps(self, rows: int) -> int:
        """Optimiser steps for so many rows: whole batches, the last one filled from the next pass over the rows."""
        steps = max(1, -(-round(rows * self.epochs) // self.batch_size))
        return min(steps, self.max_steps or steps)


class SFT(_Training):
    """Supervised fine-tuning on completions.

    epochs: passes over the rows; a fraction such as 0.5 is allowed. Training stops after whole batches.
    learning_rate: the highest one, reached after the warm-up. 2e-4 is QLoRA's for small models (arXiv 2305.14314, table 9).
    batch_size: rows of one optimiser step.
    micro_batch_size: rows of one forward pass; must divide ``batch_size``. It decides memory and speed, not the result.
        None: the largest divisor of ``batch_size`` that is at most 4 (on a CPU, 2 took half the memory of 8 for a tenth
        more time).
    warmup: part of all steps, rounded down, during which the learning rate rises; it is 0 at the first of them.
    lr_scheduler: what the learning rate does after the warm-up: falls to 0 linearly or as a cosine, or stays.
    max_steps: stop after so many optimiser steps; the learning-rate schedule ends there, too.
    max_length: tokens of the longest row that is allowed. A longer one is an error, never cut. None: whatever the model takes.
    precision: of activations; weights and the optimiser are float32. "auto" is bfloat16 where the hardware computes in it.
        bfloat16 is faster, but what an adapter adds to an activation is lost while it is below 1/256 of it, so the very
        first steps do less than in float32 (measured: SmolLM2-135M lags one step behind).
    lora: the adapter's size. None: ``Lora()``, or that of the adapter that is trained further.
    checkpoint_steps: optimiser steps between two checkpoints, from which a killed training goes on. None: one about every
        minute. 0: none. It does not change the result.
    """


class DPO(_Training):
    """Preference tuning on pairs: DPO (Rafailov et al., 2023, arXiv 2305.18290) and the losses that TRL has beside it.

    beta: how strongly the tuned model is held to the reference; higher holds more. 0.1 is the paper's.
    loss_type: a name of TRL's, or several to be added: "sigmoid" is DPO; "ipo", "robust", "sppo_hard", "apo_zero", ...
    loss_weights: one weight per name of ``loss_type``; None: 1 each.
    label_smoothing: the probability that a pair is labelled the wrong way round, for "robust", and the smoothing of
        "exo_pair" (its paper has 1e-3). In [0, 0.5).
    learning_rate, epochs: 3e-4 and 4 moved a 135M model with LoRA on 61 pairs, where 5e-5 changed nothing.
    batch_size: pairs of one optimiser step; ``micro_batch_size``: pairs of one forward pass. For "sft", which averages over
        the tokens of a forward pass, and for "aot", "aot_unpaired" and "bco_pair", which compare the pairs of one, it does
        change the result: give it explicitly there.

    Everything else is as in :class:`SFT`. The reference is the model as it is when training starts.
    """

    epochs: Positive = 4.0
    learning_rate: Positive = 3e-4
    batch_size: Count = 8
    beta: Positive = 0.1
    loss_type: str | tuple[str, ...] = "sigmoid"
    loss_weights: tuple[float, ...] | None = None
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0

    @property
    def losses(self) -> tuple[str, ...]:
        """``loss_type`` as a tuple."""
        return (self.loss_type,) if isinstance(self.loss_type, str) else self.loss_type

    @field_validator("loss_type")
    @classmethod
    def _losses_exist(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        names = (value,) if isinstance(value, str) else value
        if not names:
            raise ValueError('loss_type is empty: name at least one, for instance "sigmoid"')
        for name in names:
            if name not in LOSS_TYPES:
                raise ValueError(f'TRL has no DPO loss "{name}".{nearest(name, LOSS_TYPES)} It has: {", ".join(LOSS_TYPES)}')
        return value

    @model_validator(mode="after")
    def _losses_fit_together(self) -> DPO:
        if self.loss_weights is not None and len(self.loss_weights) != len(self.losses):
            raise ValueError(f"loss_weights has {len(self.loss_weights)} numbers for {len(self.losses)} losses: give one for each")
        if "exo_pair" in self.losses and not self.label_smoothing:
            raise ValueError('"exo_pair" needs label_smoothing > 0, for instance 1e-3')
        return self
