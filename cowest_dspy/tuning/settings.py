"""What tuning may be told: ``SFT``, ``DPO``, ``KTO`` and ``Lora``, frozen and checked when they are
made, not at the first step.

    SFT(epochs=4, learning_rate=3e-4) DPO(beta=0.1, loss_type=("sigmoid", "sft"), loss_weights=(1.0,
    0.2), lora=Lora(rank=32, alpha=64)) KTO(beta=0.1, desirable_weight=1.5)

A TOML table with the same keys makes the same object. What stands under a field is shown by editors
and in the documentation, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from cowest_dspy.errors import nearest
from cowest_dspy.tuning import other_names

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
"""The names that trl.DPOConfig documents (TRL 1.16). TRL itself finds a wrong one only at the first
step."""

KTO_LOSS_TYPES = ("kto", "apo_zero_unpaired")
"""The names that trl.KTOConfig documents."""

# Names of transformers that are packages' names, too. "all" is not offered: it would send to
# whatever happens to be installed.
REPORTERS = ("mlflow", "tensorboard", "trackio", "wandb")

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Part = Annotated[float, Field(ge=0, lt=1)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _keys_are_known(cls, given: Any) -> Any:
        """A name that TRL has or had, and another settings object's, gets a sentence that says what
        to write instead."""
        if isinstance(given, Mapping) and (
            told := other_names.unknown_keys(given, cls.model_fields, *cls._other_keys())
        ):
            raise PydanticCustomError(other_names.UNKNOWN, "{told}", {"told": "\n  ".join(told)})
        return given

    @classmethod
    def _other_keys(cls) -> tuple[Mapping[str, str], Mapping[str, str]]:
        return {}, {}


class Lora(_Frozen):
    """The size of a LoRA adapter (Hu et al., 2021, arXiv 2106.09685)."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    """Rows of the two matrices that a layer gets: more can learn more, and take more memory."""
    alpha: Positive = 32
    """``alpha / rank`` scales what the adapter adds; 2 is the ratio that most recipes share."""
    dropout: Part = 0.0
    """The probability that an input of the adapter is left out; 0 because small data is seen a few
    times only."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """The layers that are adapted. "all-linear": every linear layer but the LM head, which is what
    LoRA needs to learn as well as full fine-tuning does (Dettmers et al., 2023, arXiv 2305.14314,
    section 4)."""

    @classmethod
    def _other_keys(cls) -> tuple[Mapping[str, str], Mapping[str, str]]:
        return other_names.LORA, {}


class _Training(_Frozen):
    """What all ways of tuning share."""

    epochs: Positive = 3.0
    """Passes over the rows; a fraction such as 0.5 is allowed. Training stops after whole batches.
    """
    learning_rate: Positive = 2e-4
    """The highest one, reached after the warm-up. 2e-4 is QLoRA's for small models (arXiv
    2305.14314, table 9)."""
    batch_size: Count = 16
    """Rows of one optimiser step."""
    micro_batch_size: Count | None = None
    """Rows of one forward pass; must divide ``batch_size``. It decides memory and speed, not the
    result. None: the largest divisor of ``batch_size`` that is at most 4 (on a CPU, 2 took half the
    memory of 8 for a tenth more time)."""
    warmup: Part = 0.1
    """Part of all steps, rounded down, during which the learning rate rises; it is 0 at the first
    of them."""
    lr_scheduler: Literal["linear", "cosine", "constant"] = "linear"
    """What the learning rate does after the warm-up: falls to 0 linearly or as a cosine, or stays.
    """
    max_steps: Count | None = None
    """Stop after so many optimiser steps; the learning-rate schedule ends there, too."""
    max_length: Annotated[int, Field(ge=2)] | None = None
    """Tokens of the longest row that is allowed. A longer one is an error, never cut. None:
    whatever the model takes."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of activations; weights and the optimiser are float32. "auto" is bfloat16 where the hardware
    computes in it. bfloat16 is faster, but what an adapter adds to an activation is lost while it
    is below 1/256 of it, so the very first steps do less than in float32 (measured: SmolLM2-135M
    lags one step behind)."""
    lora: Lora | None = None
    """The adapter's size. None: ``Lora()``, or that of the adapter that is trained further."""
    held_out: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Part of the rows that is not trained on but evaluated on. Rows of one example or of one
    prompt stay together. 0: nothing is evaluated. See evaluation.py."""
    evaluate_every: Count | None = None
    """Optimiser steps from one evaluation to the next; the last step is always one. None: about ten
    evaluations."""
    patience: Count | None = None
    """Stop after so many evaluations in a row without a lower held-out loss than the lowest before.
    None: never."""
    keep_best: bool = True
    """Give the adapter of the evaluation with the lowest held-out loss, not that of the last step.
    """
    report_to: tuple[str, ...] = ()
    """Where else the logs go: "mlflow", "tensorboard", "trackio", "wandb"; nowhere by default. What
    writes files writes them into the folder ``<output>.logs``, unless its own environment variable
    says otherwise."""
    checkpoint_steps: Annotated[int, Field(ge=0)] | None = None
    """Optimiser steps between two checkpoints, from which a killed training goes on. None: one
    about every minute. 0: none. It does not change the result."""
    together: ClassVar[int] = 4

    @field_validator("report_to")
    @classmethod
    def _reporters_exist(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in REPORTERS:
                raise ValueError(
                    f'report_to has no "{name}".{nearest(name, REPORTERS)} It has: '
                    f"{', '.join(REPORTERS)}"
                )
        return value

    @model_validator(mode="after")
    def _what_evaluates_has_rows(self) -> _Training:
        if not self.held_out and (self.evaluate_every or self.patience):
            given = "evaluate_every" if self.evaluate_every else "patience"
            raise ValueError(
                f"{given} needs rows to evaluate on: set held_out, for instance 0.1, or leave "
                f"{given} out"
            )
        return self

    def decisive(self) -> dict[str, Any]:
        """The settings as JSON values, without those that cannot change the adapter: where logs go,
        checkpoints, how to evaluate on nothing."""
        idle = set() if self.held_out else {"held_out", "evaluate_every", "patience", "keep_best"}
        return self.model_dump(mode="json", exclude={"report_to", "checkpoint_steps", *idle})

    @classmethod
    def _other_keys(cls) -> tuple[Mapping[str, str], Mapping[str, str]]:
        kinds = {"SFT": SFT, "DPO": DPO, "KTO": KTO, "lora = Lora(...)": Lora}
        owners = {
            key: [name for name, kind in kinds.items() if key in kind.model_fields]
            for one in kinds.values()
            for key in one.model_fields
        }
        return other_names.TRAINING, {key: " and ".join(names) for key, names in owners.items()}

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
        """Rows of one forward pass: as given, or the largest divisor of ``batch_size`` that is at
        most ``together``."""
        return self.micro_batch_size or max(
            size for size in range(1, self.together + 1) if self.batch_size % size == 0
        )

    def steps(self, rows: int) -> int:
        """Optimiser steps for so many rows: whole batches, the last one filled from the next pass
        over the rows."""
        steps = max(1, -(-round(rows * self.epochs) // self.batch_size))
        return min(steps, self.max_steps or steps)


class SFT(_Training):
    """Supervised fine-tuning on completions."""


class DPO(_Training):
    """Preference tuning on pairs: DPO (Rafailov et al., 2023, arXiv 2305.18290) and the losses that
    TRL has beside it.

    Everything else is as in :class:`SFT`. The reference is the model as it is when training starts.

    "cpo", "simpo" and "orpo" are refused: TRL has them only in trl.experimental, whose trainers cut
    rows that are longer than a limit, and tokenise a chat template's text anew (ORPO's also puts
    loss on prompts). "sigmoid_norm" divides by lengths as SimPO does; ("sigmoid", "sft") adds the
    likelihood of the chosen side as CPO and ORPO do.
    """

    epochs: Positive = 4.0
    """Passes over the pairs. With the learning rate 3e-4, 4 of them moved a 135M model with LoRA on
    61 pairs, where 5e-5 changed nothing."""
    learning_rate: Positive = 3e-4
    """The highest one, reached after the warm-up."""
    batch_size: Count = 8
    """Pairs of one optimiser step."""
    micro_batch_size: Count | None = None
    """Pairs of one forward pass; None: at most 2, which were as fast as 4 on a CPU in less memory.
    For "sft", which averages over the tokens of a forward pass, and for "aot", "aot_unpaired" and
    "bco_pair", which compare the pairs of one, it does change the
    result: give it explicitly there."""
    beta: Positive = 0.1
    """How strongly the tuned model is held to the reference; higher holds more. 0.1 is the paper's.
    """
    loss_type: str | tuple[str, ...] = "sigmoid"
    """A name of TRL's, or several to be added: "sigmoid" is DPO; "ipo", "robust", "sppo_hard",
    "apo_zero", ..."""
    loss_weights: tuple[float, ...] | None = None
    """One weight per name of ``loss_type``; None: 1 each."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """The probability that a pair is labelled the wrong way round, for "robust", and the smoothing
    of "exo_pair" (its paper has 1e-3)."""
    share_prompt: bool = True
    """Compute the prompt of a pair once for both sides, where the model's log-probabilities allow
    it (found out before training). It changes speed and memory, not the result."""
    together: ClassVar[int] = 2

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
            if name in other_names.EXPERIMENTAL:
                raise ValueError(other_names.refusal(name))
            if name in KTO_LOSS_TYPES:
                raise ValueError(
                    f'"{name}" is a loss of KTO(...), [kto] in a TOML: it learns from labelled '
                    "drafts, not pairs"
                )
            if name not in LOSS_TYPES:
                raise ValueError(
                    f'TRL has no DPO loss "{name}".{nearest(name, LOSS_TYPES)} It has: '
                    f"{', '.join(LOSS_TYPES)}"
                )
        return value

    @model_validator(mode="after")
    def _losses_fit_together(self) -> DPO:
        if self.loss_weights is not None and len(self.loss_weights) != len(self.losses):
            raise ValueError(
                f"loss_weights has {len(self.loss_weights)} numbers for {len(self.losses)} "
                "losses: give one for each"
            )
        if "exo_pair" in self.losses and not self.label_smoothing:
            raise ValueError('"exo_pair" needs label_smoothing > 0, for instance 1e-3')
        return self


class KTO(_Training):
    """Tuning on drafts one by one, each labelled as desirable or not: KTO (Ethayarajh et al., 2024,
    arXiv 2402.01306).

    It needs no two drafts of one question to compare, so every draft that helped or hurt teaches,
    also where all helped.

    Everything else is as in :class:`SFT`. The reference is the model as it is when training starts.
    Its log-probabilities are computed once, those of mixed rows too; a step has one forward pass
    without gradients more than one of SFT.
    """

    epochs: Positive = 4.0
    """Passes over the drafts."""
    learning_rate: Positive = 3e-4
    """The highest one, reached after the warm-up."""
    batch_size: Count = 16
    """Rows of one optimiser step, at least 2. TRL's documentation recommends 16 to 128. KTO
    compares each row with an estimate of the KL divergence from the reference, which is the mean
    over the rows of the step, each prompt with the completion of another (unpaired.py): more rows,
    a steadier estimate."""
    micro_batch_size: Count | None = None
    """Rows of one forward pass. TRL estimates the KL from these alone; here they do not change the
    result."""
    beta: Positive = 0.1
    """How strongly the tuned model is held to the reference; higher holds more. 0.1 is the paper's
    and TRL's."""
    loss_type: str = "kto"
    """Either "kto" or "apo_zero_unpaired", which has no KL term (D'Oosterlinck et al., 2024, arXiv
    2408.06266)."""
    desirable_weight: Positive | None = None
    """The paper's lambda_D, a factor of the losses of drafts that helped. None: so that both labels
    weigh the same as a whole, n_D lambda_D = n_U lambda_U, the lower end of what the paper's
    section on imbalanced data recommends (1 to 4/3); the commoner label then has 1, or what was
    given. TRL's default is 1."""
    undesirable_weight: Positive | None = None
    """The paper's lambda_U, the same for drafts that hurt."""

    def weights(self, desirable: int, undesirable: int) -> tuple[float, float]:
        """The factors of desirable and undesirable losses for so many rows of each; where neither
        is given, the smaller is 1.

        >>> KTO().weights(desirable=30, undesirable=10), KTO(desirable_weight=2.0).weights(desirable=30, undesirable=10)
        ((1.0, 3.0), (2.0, 6.0))
        """
        good, bad = self.desirable_weight, self.undesirable_weight
        if good is None and bad is None:
            most = max(desirable, undesirable)
            return most / desirable, most / undesirable
        if good is None:
            assert bad is not None
            return bad * undesirable / desirable, bad
        return good, good * desirable / undesirable if bad is None else bad

    @field_validator("loss_type")
    @classmethod
    def _loss_exists(cls, value: str) -> str:
        if value not in KTO_LOSS_TYPES:
            raise ValueError(
                (
                    f'TRL has no KTO loss "{value}".{nearest(value, KTO_LOSS_TYPES)} It has: '
                    f"{', '.join(KTO_LOSS_TYPES)}"
                )
                + ("; that one is of DPO(...), [dpo] in a TOML" if value in LOSS_TYPES else "")
            )
        return value

    @model_validator(mode="after")
    def _the_kl_term_can_be_estimated(self) -> KTO:
        if self.loss_type == "kto" and self.batch_size == 1:
            raise ValueError(
                "KTO estimates its KL term from prompts with completions of other rows of the "
                "same optimiser step, and batch_size "
                'is 1: give 2 or more, better 16, or loss_type = "apo_zero_unpaired"'
            )
        return self
