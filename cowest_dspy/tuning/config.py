"""The tables [sft], [dpo] and [kto]: ``SFT``, ``DPO``, ``KTO`` and ``Lora``, in TRL's and PEFT's
own names.

    SFT(num_train_epochs=4, learning_rate=3e-4)
    DPO(beta=0.1, loss_type=("sigmoid", "sft"), loss_weights=(1.0, 0.2), lora=Lora(r=32))
    KTO(beta=0.1, desirable_weight=1.5)

The fields below are those whose defaults are ours. Every other field of trl.SFTConfig, DPOConfig or
KTOConfig (of peft.LoraConfig for ``lora``, which may be such an object) may be given too, and goes
to TRL or PEFT as it is; the few that a training decides itself are errors that say why, unless they
say what it does anyway. A TOML table with the same keys makes the same object.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from cowest_dspy.errors import nearest
from cowest_dspy.utils.table import MOVED, Reference, TomlTable

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

_ONLY_COMPLETIONS = "only completions carry loss, always"
_BY_ITSELF = "each row is trained on by itself"
_ORDERED = "rows are shuffled by the seed, and sorted by length in a step"
_EVERY_STEP = "every step is logged"
_NO_UPLOAD = "nothing is uploaded by a training"
_SHARED_OUT = "processes, or a configuration file of Accelerate's, say how a training is shared out"
_RESUMES = "a stopped training resumes to the same bits, from checkpoints that hold all of it"
_OF_THE_BASE = "the base is that of the LM that is tuned"

RESERVED: dict[str, tuple[Any, ...]] = {
    "output_dir": ("the output folder is an argument of the training",),
    "seed": ("the seed is an argument of the training",),
    "data_seed": (_ORDERED, None),
    "trust_remote_code": ("code out of a model's folder is never run", False),
    "model_init_kwargs": ("the model is loaded in float32, before TRL has it", None),
    "chat_template_path": ("the model's own chat template is used, as when it is asked", None),
    "completion_only_loss": (_ONLY_COMPLETIONS, True, None),
    "assistant_only_loss": (_ONLY_COMPLETIONS, False),
    "packing": (_BY_ITSELF, False),
    "eval_packing": (_BY_ITSELF, False, None),
    "auto_find_batch_size": ("a step has as many rows as the settings say", False),
    "train_sampling_strategy": (_ORDERED,),
    "shuffle_dataset": (_ORDERED, False),
    "truncation_mode": ("rows are never cut; a row longer than max_length is an error",),
    "precompute_ref_log_probs": (
        "the reference is computed once before the first step, always",
        True,
    ),
    "sync_ref_model": ("the reference is the model as it is when training starts", False),
    "eval_strategy": ("set held_out to evaluate, and eval_steps to say how often",),
    "eval_on_start": ("where rows are held out, the start is evaluated, too", True),
    "save_strategy": ("set save_steps to say how often checkpoints are written; 0 writes none",),
    "save_total_limit": ("the newest checkpoint is kept, until the adapter is there", 1),
    "save_only_model": (_RESUMES, False),
    "ignore_data_skip": (_RESUMES, False),
    "restore_callback_states_from_checkpoint": (_RESUMES, True),
    "enable_jit_checkpoint": ("Ctrl-C and SIGTERM write a checkpoint, always", False),
    "resume_from_checkpoint": (
        "a stopped training resumes when it is started again",
        None,
    ),
    "logging_steps": (_EVERY_STEP, 1),
    "logging_strategy": (_EVERY_STEP, "steps"),
    "logging_nan_inf_filter": ("a loss that is no number stops the training", False),
    "push_to_hub": (_NO_UPLOAD, False),
    **dict.fromkeys(
        ("hub_model_id", "hub_token", "hub_private_repo", "hub_revision"), (_NO_UPLOAD, None)
    ),
    "hub_always_push": (_NO_UPLOAD, False),
    "hub_strategy": (_NO_UPLOAD,),
    "deepspeed": (_SHARED_OUT, None),
    "fsdp": (_SHARED_OUT, None),
    "fsdp_config": (_SHARED_OUT, None),
    "parallelism_config": (_SHARED_OUT, None),
    "task_type": ("only causal language models are tuned", "CAUSAL_LM"),
    "peft_type": ("the adapter is a LoRA", "LORA"),
    "inference_mode": ("the adapter is to be trained", False),
    "modules_to_save": ("only LoRA's own matrices are trained and saved", None),
    "bias": ("biases are not trained", "none"),
    "layer_replication": ("it moves the layers of the model itself, which others use, too", None),
    "base_model_name_or_path": (_OF_THE_BASE, None),
    "revision": (_OF_THE_BASE, None),
}
"""Fields of TRL and PEFT that a training sets itself: why, and the values that are what it does
anyway, so that they may be given."""

BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of PEFT's init_lora_weights that change the base's weights."""

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Part = Annotated[float, Field(ge=0, lt=1)]


class Sft(TomlTable):
    """[sft]: domain fine-tuning. ``drafts`` and ``answers`` name functions of a seed that give
    prompt/completion rows."""

    drafts: Reference = Field(description="rows that teach the weak model to draft")
    answers: Reference | None = Field(
        None, description="rows that teach it to answer alone: the fair weak baseline"
    )
    settings: dict[str, Any] = Field(default_factory=dict, description="as cowest_dspy.tuning.SFT")
    answer_settings: dict[str, Any] = Field(
        default_factory=dict, description="as cowest_dspy.tuning.SFT"
    )


@cache
def library_fields(config: str) -> frozenset[str]:
    """The fields of a configuration class of TRL or PEFT, such as "DPOConfig"."""
    import peft
    import trl

    found: Any = getattr(trl, config, None) or getattr(peft, config)
    return frozenset(one.name for one in dataclasses.fields(found))


def _close_schema(schema: dict[str, Any], settings: type[_Settings]) -> None:
    """Name every key in a JSON schema, also those that are passed on."""
    known = {*settings.model_fields, *library_fields(settings.library_config)} - {*RESERVED}
    schema.pop("additionalProperties", None)
    schema["propertyNames"] = {"enum": sorted(known)}


def _is_done_anyway(key: str, value: Any) -> bool:
    """Whether a value of a field that a training sets itself is the one that it sets."""
    done = RESERVED.get(key, ("",))[1:]
    return any(value == one and type(value) is type(one) for one in done)


class _Settings(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="allow",
        use_attribute_docstrings=True,
        json_schema_extra=_close_schema,  # pyright: ignore[reportArgumentType]
    )
    library_config: ClassVar[str]
    moved: ClassVar[Mapping[str, str]]

    @model_validator(mode="before")
    @classmethod
    def _keys_are_known(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        said = cast("Mapping[str, Any]", given)
        others = {key: value for key, value in said.items() if not _is_done_anyway(key, value)}
        wrong = [text for key in others if (text := cls._fault(str(key)))]
        if wrong:
            raise PydanticCustomError("unknown_keys", "{told}", {"told": "\n  ".join(wrong)})
        return others

    @classmethod
    def _fault(cls, key: str) -> str | None:
        """What is wrong with a key, or None."""
        if key in cls.model_fields:
            return None
        if key in cls.moved:
            return f"{key}: there is no such key here: write {cls.moved[key]}."
        if key in RESERVED:
            return f"{key}: it cannot be set: {RESERVED[key][0]}."
        if key in library_fields(cls.library_config):
            return None
        owners = [
            kind
            for kind in ("SFT", "DPO", "KTO", "Lora")
            if key in globals()[kind].model_fields or key in globals()[kind].moved
        ]
        if owners:
            where = "lora" if owners == ["Lora"] else " and ".join(owners)
            return f"{key}: there is no such key here: it is one of {where}."
        known = [*cls.model_fields, *sorted(library_fields(cls.library_config))]
        return (
            f"{key}: there is no such key.{nearest(key, known)} Known: "
            f"{', '.join(cls.model_fields)}, and every other field of {cls.library_config}."
        )


class Lora(_Settings):
    """A LoRA adapter (Hu et al., 2021, arXiv 2106.09685); the fields of peft.LoraConfig."""

    library_config: ClassVar[str] = "LoraConfig"
    moved: ClassVar[Mapping[str, str]] = MOVED["lora"]

    r: Annotated[int, Field(ge=1, le=1024)] = 16
    """Rank: rows of the two matrices that a layer gets. More can learn more, and take more memory.
    """
    lora_alpha: Positive = 32
    """``lora_alpha / r`` scales what the adapter adds; 2 is the ratio that most recipes share."""
    lora_dropout: Part = 0.0
    """The probability that an input of the adapter is left out; 0 because small data is seen a few
    times only."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """The layers that are adapted. "all-linear": every linear layer but the LM head, which is what
    LoRA needs to learn as well as full fine-tuning does (Dettmers et al., 2023, arXiv 2305.14314,
    section 4)."""

    @model_validator(mode="before")
    @classmethod
    def _may_be_of_peft(cls, given: Any) -> Any:
        """A ``peft.LoraConfig`` as what it says."""
        if not dataclasses.is_dataclass(given) or type(given).__name__ != cls.library_config:
            return given
        default, made = type(given)(), dict[str, Any]()
        for one in dataclasses.fields(given):
            value = getattr(given, one.name)
            if one.name in cls.model_fields or value != getattr(default, one.name):
                made[one.name] = sorted(value) if isinstance(value, set) else value
        if made["target_modules"] is None:
            del made["target_modules"]
        return made

    @model_validator(mode="after")
    def _the_base_stays_as_it_is(self) -> Lora:
        init = str((self.model_extra or {}).get("init_lora_weights", "")).lower()
        if init.startswith(BASE_CHANGING):
            raise ValueError(
                f'init_lora_weights = "{init}" changes the weights of the base, which the '
                'reference and other adapters use, too: give "gaussian", "orthogonal", or leave it '
                "out"
            )
        if init == "eva":
            raise ValueError(
                'init_lora_weights = "eva" needs activations of the training rows, which are not '
                'computed here: give "gaussian", "orthogonal", or leave it out'
            )
        return self


class _Training(_Settings):
    """What all ways of tuning share."""

    moved: ClassVar[Mapping[str, str]] = MOVED["training"]

    num_train_epochs: Positive = 3.0
    """Passes over the rows; a fraction such as 0.5 is allowed."""
    learning_rate: Positive = 2e-4
    """The highest one, reached after the warm-up. 2e-4 is QLoRA's for small models (arXiv
    2305.14314, table 9)."""
    per_device_train_batch_size: Count = 4
    """Rows of one forward pass: memory and speed."""
    gradient_accumulation_steps: Count = 4
    """Forward passes of one optimiser step. The rows of a step are per_device_train_batch_size
    times this; several processes share them out, so that the step stays the same."""
    warmup_steps: Annotated[float, Field(ge=0)] = 0.1
    """Steps during which the learning rate rises from 0; a number below 1 is a part of all steps.
    """
    lr_scheduler_type: str = "linear"
    """What the learning rate does after the warm-up: "linear", "cosine", "constant_with_warmup",
    ...; "constant" has no warm-up."""
    max_steps: Count | None = None
    """Stop after so many optimiser steps; the learning-rate schedule ends there, too."""
    max_length: Annotated[int, Field(ge=2)] | None = None
    """Tokens of the longest row that is allowed. A longer one is an error, never cut. None:
    whatever the model takes."""
    bf16: bool | None = None
    """Activations in bfloat16; weights and the optimiser are float32. None: where the hardware
    computes in it. bfloat16 is faster, but what an adapter adds to an activation is lost while it
    is below 1/256 of it, so the very first steps do less than in float32 (measured: SmolLM2-135M
    lags one step behind)."""
    lora: Lora | None = None
    """The adapter's size. None: ``Lora()``, or that of the adapter that is trained further."""
    held_out: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Part of the rows that is not trained on but evaluated on. Rows of one example or of one
    prompt stay together. 0: nothing is evaluated."""
    eval_steps: Positive = 0.1
    """Optimiser steps from one evaluation to the next; a number below 1 is a part of all steps."""
    early_stopping_patience: Count | None = None
    """Stop after so many evaluations in a row without a lower held-out loss than the lowest before.
    None: never."""
    load_best_model_at_end: bool = True
    """Give the adapter of the evaluation with the lowest held-out loss, not that of the last step.
    """
    report_to: tuple[str, ...] = ()
    """Where else TRL sends its logs: "mlflow", "tensorboard", "trackio", "wandb"; nowhere by
    default."""
    save_steps: Annotated[int, Field(ge=0)] | None = None
    """Optimiser steps between two checkpoints, from which a stopped training resumes. None: one
    about every minute. 0: none. It does not change the result."""

    def steps(self, rows: int) -> int:
        """Optimiser steps for so many rows."""
        steps = max(1, -(-round(rows * self.num_train_epochs) // self.step_rows))
        return min(steps, self.max_steps or steps)

    @property
    def step_rows(self) -> int:
        """Rows of one optimiser step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def decisive(self) -> dict[str, Any]:
        """The settings as JSON values, without those that cannot change the adapter: where logs go,
        checkpoints, how to evaluate on nothing."""
        idle = {"report_to", "run_name", "project", "save_steps", "disable_tqdm"}
        if not self.held_out:
            idle |= {"held_out", "eval_steps", "early_stopping_patience", "load_best_model_at_end"}
        return self.model_dump(mode="json", exclude=idle)

    @model_validator(mode="after")
    def _early_stopping_has_rows(self) -> _Training:
        if self.early_stopping_patience and not self.held_out:
            raise ValueError(
                "early_stopping_patience needs rows to evaluate on: set held_out, for instance "
                "0.1, or leave early_stopping_patience out"
            )
        return self


class SFT(_Training):
    """Supervised fine-tuning on completions; the fields of trl.SFTConfig."""

    library_config: ClassVar[str] = "SFTConfig"

    share_prompt: bool = True
    """Compute what the rows of a batch begin with once for all of them, where the model's
    log-probabilities allow it (found out before training). It changes speed and memory, not the
    result; with ``lora_dropout``, rows drop the same in what they share."""

    def decisive(self) -> dict[str, Any]:
        """The settings that can change the adapter, as JSON values. ``share_prompt`` is not among
        them, so that what was trained before there was such a setting is found."""
        return {name: value for name, value in super().decisive().items() if name != "share_prompt"}


class DPO(_Training):
    """Preference tuning on pairs: DPO (Rafailov et al., 2023, arXiv 2305.18290) and the losses that
    TRL has beside it; the fields of trl.DPOConfig.

    Everything else is as in :class:`SFT`. The reference is the model as it is when training starts.
    """

    library_config: ClassVar[str] = "DPOConfig"

    num_train_epochs: Positive = 4.0
    """Passes over the pairs. With the learning rate 3e-4, 4 of them moved a 135M model with LoRA on
    61 pairs, where 5e-5 changed nothing."""
    learning_rate: Positive = 3e-4
    """The highest one, reached after the warm-up."""
    per_device_train_batch_size: Count = 2
    """Pairs of one forward pass: memory and speed; 2 were as fast as 4 on a CPU in less memory. For
    "sft", which averages over the tokens of a forward pass, and for "aot", "aot_unpaired" and
    "bco_pair", which compare the pairs of one, it does change the result."""
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

    @property
    def losses(self) -> tuple[str, ...]:
        """``loss_type`` as a tuple."""
        return (self.loss_type,) if isinstance(self.loss_type, str) else self.loss_type

    @field_validator("loss_type")
    @classmethod
    def _losses_exist(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for name in (value,) if isinstance(value, str) else value:
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
    arXiv 2402.01306); the fields of trl.KTOConfig.

    It needs no two drafts of one question to compare, so every draft that helped or hurt teaches,
    also where all helped. Everything else is as in :class:`SFT`. The reference is the model as it
    is when training starts.
    """

    library_config: ClassVar[str] = "KTOConfig"

    num_train_epochs: Positive = 4.0
    """Passes over the drafts."""
    learning_rate: Positive = 3e-4
    """The highest one, reached after the warm-up."""
    per_device_train_batch_size: Count = 8
    """Rows of one forward pass, at least 2: KTO compares each row with an estimate of the KL
    divergence from the reference, which TRL takes over these rows, each prompt with the completion
    of another. More rows, a steadier estimate; several processes put theirs together, so that
    their adapter is not that of one process."""
    gradient_accumulation_steps: Count = 2
    """Forward passes of one optimiser step."""
    beta: Positive = 0.1
    """How strongly the tuned model is held to the reference; higher holds more. 0.1 is the paper's
    and TRL's."""
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
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

        >>> KTO().weights(desirable=30, undesirable=10)
        (1.0, 3.0)
        >>> KTO(desirable_weight=2.0).weights(desirable=30, undesirable=10)
        (2.0, 6.0)
        """
        good, bad = self.desirable_weight, self.undesirable_weight
        if good is None and bad is None:
            most = max(desirable, undesirable)
            return most / desirable, most / undesirable
        if good is None:
            assert bad is not None
            return bad * undesirable / desirable, bad
        return good, good * desirable / undesirable if bad is None else bad

    @model_validator(mode="after")
    def _the_kl_term_can_be_estimated(self) -> KTO:
        if self.loss_type == "kto" and self.per_device_train_batch_size == 1:
            raise ValueError(
                "KTO estimates its KL term from prompts with completions of other rows of the "
                "same forward pass, and per_device_train_batch_size is 1: give 2 or more, or "
                'loss_type = "apo_zero_unpaired"'
            )
        return self
