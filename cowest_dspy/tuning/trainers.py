"""TRL's trainers, set up and run: the one place that knows their arguments."""

from __future__ import annotations

import importlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cowest_dspy.lms.local import lora, weights
from cowest_dspy.tuning import adapters, reference, shared_prompt, unpaired
from cowest_dspy.tuning.config import DPO, KTO, SFT, Lora


def sft_trainer(
    settings: SFT,
    data: Sequence[dict[str, Any]],
    base: Path,
    adapter: Path | None,
    work: Path,
    seed: int,
) -> Any:
    """A ``trl.SFTTrainer`` with its data tokenised, on a fresh copy of ``base``; prompts carry no
    loss."""
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    args = SFTConfig(**_arguments(settings, len(data), work, seed), completion_only_loss=True)
    return SFTTrainer(
        args=args,
        train_dataset=Dataset.from_list(list(data)),
        **_parts(settings, base, adapter, seed),
    )


def dpo_trainer(
    settings: DPO,
    data: Sequence[dict[str, Any]],
    base: Path,
    adapter: Path | None,
    work: Path,
    seed: int,
) -> Any:
    """A ``trl.DPOTrainer`` with its data tokenised; its reference is the untrained adapter, or the
    bare base."""
    from datasets import Dataset
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    args = DPOConfig(
        **_arguments(settings, len(data), work, seed),
        beta=settings.beta,
        loss_type=list(settings.losses),
        loss_weights=list(settings.loss_weights) if settings.loss_weights else None,
        label_smoothing=settings.label_smoothing,
    )
    trainer = DPOTrainer(
        args=args,
        train_dataset=Dataset.from_list(list(data)),
        **_parts(settings, base, adapter, seed),
    )
    adapters.drop_out_as_configured(trainer.model)
    # Sharing is found out by passes over the whole model, which no process has where FSDP shares it
    # out.
    if settings.share_prompt and not trainer.is_fsdp_enabled:
        with scoring_completions_only():
            shared_prompt.share_if_equal(trainer, lengths(trainer))
    return trainer


def kto_trainer(
    settings: KTO,
    data: Sequence[dict[str, Any]],
    base: Path,
    adapter: Path | None,
    work: Path,
    seed: int,
) -> Any:
    """A ``trl.KTOTrainer`` (unpaired.py) with its data tokenised; its reference is the untrained
    adapter, or the bare base."""
    from datasets import Dataset
    from trl.trainer.kto_config import KTOConfig

    desirable = sum(row["label"] for row in data)
    good, bad = settings.weights(desirable, len(data) - desirable)
    args = KTOConfig(
        **_arguments(settings, len(data), work, seed),
        beta=settings.beta,
        loss_type=settings.loss_type,
        desirable_weight=good,
        undesirable_weight=bad,
    )
    trainer_class = unpaired.kto_trainer_class()
    return trainer_class(
        args=args,
        train_dataset=Dataset.from_list(list(data)),
        **_parts(settings, base, adapter, seed),
    )


def lengths(trainer: Any) -> list[int]:
    """Tokens of every row as it is trained on; of a pair, of its longer side."""
    data = trainer.train_dataset
    if "input_ids" in data.column_names:
        return [len(ids) for ids in data["input_ids"]]
    if "completion_ids" in data.column_names:
        return [
            len(prompt) + len(ids)
            for prompt, ids in zip(data["prompt_ids"], data["completion_ids"], strict=True)
        ]
    sides = zip(data["prompt_ids"], data["chosen_ids"], data["rejected_ids"], strict=True)
    return [len(prompt) + max(len(chosen), len(rejected)) for prompt, chosen, rejected in sides]


def run(
    trainer: Any,
    order: Sequence[int],
    *callbacks: Any,
    references: Path | None = None,
    done: int = 0,
) -> None:
    """Trains on the rows in ``order`` but for the first ``done``, and tells ``callbacks``, in this
    order; ``references``: where :func:`reference.add` keeps its values."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    for callback in callbacks:
        trainer.add_callback(callback)
    # FSDP has a precision of its own for what it gathers.
    if trainer.args.bf16 and not trainer.is_fsdp_enabled:
        shared_prompt.round_frozen(trainer.model)
    with scoring_completions_only():
        # With FSDP the model is whole nowhere before training, so TRL computes the reference in
        # every step.
        if "chosen_ids" in trainer.train_dataset.column_names and not trainer.is_fsdp_enabled:
            reference.add(trainer, lengths(trainer), references)
        if "label" in trainer.train_dataset.column_names:
            unpaired.prepare(trainer, order)
        else:
            trainer.train_dataset = trainer.train_dataset.select(order)
        if done:
            trainer.train_dataset = trainer.train_dataset.select(range(done, len(order)))
        trainer.train()


def release(trainer: Any) -> None:
    """Lets go of weights, gradients and optimiser, which point at one another in circles: the
    garbage collector frees them."""
    trainer.model = trainer.model_wrapped = trainer.optimizer = trainer.lr_scheduler = None
    trainer.accelerator._models.clear()
    trainer.accelerator._optimizers.clear()


@contextmanager
def scoring_completions_only() -> Iterator[None]:
    """A context in which TRL projects only tokens that carry loss onto the vocabulary, on CPUs as
    on GPUs.

    TRL 1.16 does so where Triton runs and otherwise projects the prompts, too, and throws the
    result away: a third of a small model's time. The loss is the same. To be removed when
    ``add_fused_lm_head`` of trl.trainer.utils is compact by itself.
    """
    utils: Any = importlib.import_module("trl.trainer.utils")
    original = getattr(utils, "_use_triton", None)
    if original is None:
        yield
        return
    utils._use_triton = lambda device: True
    try:
        yield
    finally:
        utils._use_triton = original


def _parts(
    settings: SFT | DPO | KTO, base: Path, adapter: Path | None, seed: int
) -> dict[str, Any]:
    """Model, tokenizer and adapter as all trainers take them."""
    from transformers import set_seed

    model = adapters.load_base(base)
    parts: dict[str, Any] = {"processing_class": weights.load_tokenizer(base)}
    if adapter is not None:
        return parts | {"model": adapters.continued(model, Path(adapter), settings.lora)}
    set_seed(seed)
    return parts | {"model": model, "peft_config": adapters.lora_config(settings.lora or Lora())}


def _arguments(settings: SFT | DPO | KTO, rows: int, work: Path, seed: int) -> dict[str, Any]:
    """What all trainers share. Rows come in the order in which they are given: schedule.py has
    shuffled them."""
    import torch

    bf16 = weights.choose_dtype() == "bfloat16" if settings.bf16 is None else settings.bf16
    steps = settings.steps(rows)
    return dict(settings.model_extra or {}) | {
        "output_dir": str(work / "trainer"),
        "max_steps": steps,
        "per_device_train_batch_size": settings.per_device_train_batch_size,
        "gradient_accumulation_steps": settings.step_rows
        // (settings.per_device_train_batch_size * processes()),
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.lr_scheduler_type,
        "warmup_steps": settings.warmup_steps_of(steps),
        "train_sampling_strategy": "sequential",
        # Lengths are checked by us: TRL would cut rows and leave out pairs without a word.
        "max_length": None,
        "bf16": bf16,
        "use_cpu": not torch.cuda.is_available(),
        "activation_checkpointing": False,
        "gradient_checkpointing": None,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": list(settings.report_to) or "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "seed": seed,
    }


def processes() -> int:
    """How many processes train together (launched.py): each takes its part of every optimiser
    step's rows."""
    from torch import distributed

    return (
        distributed.get_world_size()
        if distributed.is_available() and distributed.is_initialized()
        else 1
    )


@contextmanager
def own_random_state() -> Iterator[None]:
    """A context that seeds what it likes: the global random generators are afterwards as they
    were."""
    import numpy
    import torch

    python, numbers = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(numbers)


@contextmanager
def quiet() -> Iterator[None]:
    """A context in which transformers, TRL and datasets draw no bars and print no advice; progress
    is told by callbacks."""
    import datasets
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), datasets.are_progress_bars_disabled()
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        with weights.loading(), lora.ignore_renamed():
            yield
    finally:
        logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()
