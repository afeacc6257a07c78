"""TRL's trainers: made from settings and rows, watched by callbacks, and given the reference's
log-probabilities.

This is the one place that knows their arguments.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cowest_dspy import compat
from cowest_dspy.errors import TuningError, masked
from cowest_dspy.lms.local import lora, weights
from cowest_dspy.tuning import shared_prompt
from cowest_dspy.tuning.config import DPO, KTO, SFT, Lora
from cowest_dspy.utils import files, interrupts

OnStep = Callable[[int, int, dict[str, float]], None]
"""Called with (step, total, logs): once with no logs when training begins, then after each
optimiser step.

The first step is 0, or that of the checkpoint from which training resumes. An exception that it
raises stops the training and comes out of it.
"""

SAVE_SECONDS = 60.0
"""Seconds between two checkpoints when ``save_steps`` does not say; writing one takes far less than
a hundredth of that."""
REFERENCE_COLUMNS = {
    True: ("ref_chosen_logps", "ref_rejected_logps"),
    False: ("ref_logps", "ref_KL_logps"),
}
"""TRL's names of the reference's log-probabilities, for pairs and for single completions."""
LIBRARIES = ("torch", "transformers", "trl", "peft")
"""Another version of these may round otherwise, so no checkpoint and no reference of it is used."""

UNREPEATABLE = (
    "eval_runtime",
    "eval_samples_per_second",
    "eval_steps_per_second",
    "eval_num_tokens",
)
"""What Trainer and TRL log that differs when the same training runs again."""

_logger = logging.getLogger(__name__)


def make_trainer(
    settings: SFT | DPO | KTO,
    rows: Sequence[dict[str, Any]],
    held_rows: Sequence[dict[str, Any]],
    base: Path,
    adapter: Path | None,
    checkpoints: Path,
    seed: int,
    resumes: bool = False,
) -> Any:
    """TRL's trainer for these settings with its data tokenised, on a fresh copy of ``base``; the
    reference is the untrained adapter, or the bare base."""
    import trl
    from datasets import Dataset
    from transformers import EarlyStoppingCallback, PrinterCallback, set_seed

    config = getattr(trl, settings.library_config)(
        **trainer_arguments(settings, rows, bool(held_rows), checkpoints, seed, resumes)
    )
    model = load_base(base)
    parts: dict[str, Any] = {"model": model, "processing_class": weights.load_tokenizer(base)}
    if adapter is not None:
        parts["model"] = continue_adapter(model, Path(adapter), settings.lora)
    else:
        set_seed(seed)
        parts["peft_config"] = lora_config(settings.lora or Lora())
    with compat.compact_lm_head():
        trainer = getattr(trl, settings.library_config.replace("Config", "Trainer"))(
            args=config,
            train_dataset=Dataset.from_list(list(rows)),
            eval_dataset=Dataset.from_list(list(held_rows)) if held_rows else None,
            **parts,
        )
    trainer.remove_callback(PrinterCallback)
    tolerate_reporters(trainer)
    if settings.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(settings.early_stopping_patience))
    restore_dropout(trainer.model)
    if not any(one.requires_grad for one in trainer.model.parameters()):
        raise TuningError(
            "Nothing in this model can be trained: no parameter of an adapter requires a gradient."
        )
    return trainer


def trainer_arguments(
    settings: SFT | DPO | KTO,
    rows: Sequence[dict[str, Any]],
    evaluating: bool,
    checkpoints: Path,
    seed: int,
    resumes: bool,
) -> dict[str, Any]:
    """The fields of TRL's configuration: what the settings say, then what a training decides."""
    import torch

    own = {"lora", "held_out", "early_stopping_patience", "share_prompt", "save_steps"}
    given = settings.model_dump(exclude=own, exclude_none=True)
    for name in ("loss_type", "loss_weights"):
        if isinstance(given.get(name), tuple):
            given[name] = list(given[name])
    decided: dict[str, Any] = {
        "output_dir": str(checkpoints),
        "gradient_accumulation_steps": settings.gradient_accumulation_steps // count_processes(),
        "bf16": weights.choose_dtype() == "bfloat16" if settings.bf16 is None else settings.bf16,
        # Rows are put in order before; lengths are checked, since TRL would cut rows silently.
        "train_sampling_strategy": "sequential",
        "max_length": None,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": list(settings.report_to) or "none",
        "seed": seed,
        "save_strategy": "no",  # A callback saves; see progress_callback.
        "save_total_limit": 1,
        "load_best_model_at_end": False,
        "restore_callback_states_from_checkpoint": True,
    }
    if settings.warmup_steps < 1:
        # Trainer rounds a share up: the only step of a short training would have no learning rate.
        decided["warmup_steps"] = int(settings.warmup_steps * settings.steps(len(rows)))
    if evaluating:
        decided |= {
            "eval_strategy": "steps",
            "eval_on_start": not resumes,
        }
        if settings.load_best_model_at_end:
            decided |= {"save_strategy": "best", "load_best_model_at_end": True}
    if isinstance(settings, SFT):
        decided["completion_only_loss"] = True
    if isinstance(settings, KTO):
        desirable = sum(row["label"] for row in rows)
        good, bad = settings.weights(desirable, len(rows) - desirable)
        decided |= {"desirable_weight": good, "undesirable_weight": bad}
    else:
        decided["max_steps"] = settings.steps(len(rows))
    gpu = torch.cuda.is_available()
    return {
        "use_cpu": not gpu,
        "dataloader_pin_memory": gpu,
        "disable_tqdm": True,
        "metric_for_best_model": "eval_loss" if evaluating else None,
        "per_device_eval_batch_size": settings.per_device_train_batch_size,
        "activation_checkpointing": False,
        "gradient_checkpointing": None,
        "run_name": checkpoints.name[1:].rsplit(".", 2)[0],
        **given,
        **decided,
    }


def count_processes() -> int:
    """How many processes train together (launch.py)."""
    from torch import distributed

    on = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if on else 1


def progress_callback(settings: SFT | DPO | KTO, on_step: OnStep | None, rows: int) -> Any:
    """A ``transformers.TrainerCallback`` that reports steps, asks for checkpoints, and stops a
    training that diverges or is asked to stop."""
    from transformers import TrainerCallback

    class ReportStep(TrainerCallback):
        def __init__(self) -> None:
            self.saved, self.tokens_before, self.first_step = time.monotonic(), 0, 0

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.first_step = state.global_step
            before = [one["num_tokens"] for one in state.log_history if "num_tokens" in one]
            self.tokens_before = max(before, default=0)
            if on_step:
                on_step(state.global_step, state.max_steps, {})

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            # Ctrl-C waits for the end of the step that is under way, and for its checkpoint.
            interrupts.postpone()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not isinstance(settings, KTO):  # All passes in their order are one to the trainer.
                state.epoch = state.global_step * settings.step_rows / rows
            every, step = settings.save_steps, state.global_step
            if every == 0:
                interrupts.check()
            elif (
                interrupts.stop_requested()
                or (every and step % every == 0)
                or (every is None and time.monotonic() - self.saved >= SAVE_SECONDS)
            ):
                control.should_save = step < state.max_steps

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.saved = time.monotonic()
            interrupts.check()

        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
        ) -> None:
            record = state.log_history[-1]
            for name in UNREPEATABLE:
                record.pop(name, None)
            if "num_tokens" in record:  # TRL counts from 0 again when a training resumes.
                record["num_tokens"] += self.tokens_before
            if isinstance(settings, DPO):
                for prefix in ("", "eval_"):
                    sides = [record.get(f"{prefix}rewards/{side}") for side in SIDES]
                    if None not in sides:
                        record[f"{prefix}kl"] = sum(sides) / 2 / settings.beta
            _check_finite(record)
            if on_step and "loss" in record:
                on_step(state.global_step, state.max_steps, dict(record))

    return ReportStep()


SIDES = ("chosen", "rejected")


def _check_finite(record: Mapping[str, Any]) -> None:
    for key in ("loss", "grad_norm", "eval_loss"):
        if not math.isfinite(record.get(key, 0.0)):
            raise TuningError(
                f"Training diverged at step {record['step']}: {key} is {record[key]}. Lower "
                "learning_rate, raise warmup_steps, or set bf16 = false."
            )


def row_lengths(rows: Any) -> list[int]:
    """Tokens of every tokenised row; of a pair, of its longer side."""
    if "input_ids" in rows.column_names:
        return [len(ids) for ids in rows["input_ids"]]
    if "completion_ids" in rows.column_names:
        pairs = zip(rows["prompt_ids"], rows["completion_ids"], strict=True)
        return [len(prompt) + len(ids) for prompt, ids in pairs]
    sides = zip(rows["prompt_ids"], rows["chosen_ids"], rows["rejected_ids"], strict=True)
    return [len(prompt) + max(len(chosen), len(rejected)) for prompt, chosen, rejected in sides]


# Adapters


def load_base(folder: Path) -> Any:
    """A fresh copy of the model in ``folder``, in float32: training changes a model in place."""
    import torch
    from transformers import AutoModelForCausalLM

    with weights.loading():
        # On a CPU the backward pass of plain attention is faster than that of the fused one: a
        # fifth of a whole step.
        attention = None if torch.cuda.is_available() else "eager"
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=attention
        )


def lora_config(settings: Lora) -> Any:
    """``settings`` as peft.LoraConfig."""
    from peft import LoraConfig

    given = settings.model_dump()
    if not isinstance(settings.target_modules, str):
        given["target_modules"] = list(settings.target_modules)
    return LoraConfig(**given, task_type="CAUSAL_LM")


def continue_adapter(base: Any, adapter: Path, settings: Lora | None) -> Any:
    """``base`` with the adapter in ``adapter``, to be trained further.

    Raises:
        ModelError: the folder holds no adapter that fits the base.
        TuningError: ``settings`` are given and ask for another size than the adapter has.
    """
    model = lora.attach(base, adapter, is_trainable=True)
    has: Any = model.peft_config["default"]
    if settings and (settings.r, settings.lora_alpha) != (has.r, has.lora_alpha):
        raise TuningError(
            f"lora asks for r = {settings.r}, lora_alpha = {settings.lora_alpha}, but training "
            f"goes on from the adapter in {adapter}, which has r = {has.r}, lora_alpha = "
            f"{has.lora_alpha}. Leave lora out, or start without an adapter."
        )
    return model


def restore_dropout(model: Any) -> None:
    """Give adapters the dropout of their configuration again: TRL takes every dropout out of a
    model that it tunes on pairs, which is meant for the base, and would leave ``lora_dropout``
    without any effect."""
    import torch

    for module in model.modules():
        for name, dropout in getattr(module, "lora_dropout", {}).items():
            if isinstance(dropout, torch.nn.Dropout):
                dropout.p = model.peft_config[name].lora_dropout


# Logs


def tolerate_reporters(trainer: Any) -> None:
    """Have the training go on when a place of its logs fails: MLflow, for one, raises at its end
    when its server is gone, before the adapter is saved."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, tuple(INTEGRATION_TO_CALLBACK.values())):
            for event in [name for name in dir(callback) if name.startswith("on_")]:
                setattr(callback, event, _tolerated(callback, getattr(callback, event)))


def _tolerated(callback: Any, call: Callable[..., Any]) -> Callable[..., Any]:
    def tolerate(*arguments: Any, **options: Any) -> Any:
        if getattr(callback, "failed", False):
            return None
        try:
            return call(*arguments, **options)
        except Exception as error:
            callback.failed = True
            _logger.error(
                "report_to: %s failed, and training goes on without it: %s",
                type(callback).__name__,
                masked(f"{error}"),
            )
            return None

    return tolerate


# The reference of DPO and KTO


def add_references(trainer: Any, cache: Path | None) -> None:
    """Add the reference's log-probabilities to the trainer's rows, so that no step has to compute
    them.

    TRL can do so itself (``precompute_ref_log_probs``), but without the shared prompt, and anew for
    each training.
    """
    trainer.train_dataset = with_reference(trainer, trainer.train_dataset, cache)
    if trainer.eval_dataset is not None:
        trainer.eval_dataset = with_reference(trainer, trainer.eval_dataset, cache)
    trainer.precompute_ref_logps = True
    _drop_reference_adapter(trainer.model)


def with_reference(trainer: Any, rows: Any, cache: Path | None) -> Any:
    """``rows`` with the reference's log-probabilities, from ``cache`` if they are there. They
    depend on the weights that training starts from and on the tokens of the rows, not on beta, the
    loss or the learning rate."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    columns = REFERENCE_COLUMNS["chosen_ids" in rows.column_names]
    if "chosen_ids" not in rows.column_names and "KL_completion_ids" not in rows.column_names:
        columns = columns[:1]
    path = cache / f"{reference_id(trainer, rows)}.safetensors" if cache else None
    values = None
    if path and path.is_file():
        try:
            values = load_file(path)["logps"]
        except (SafetensorError, OSError, KeyError):
            _logger.warning("%s is damaged: the reference is computed again.", path)
    if values is None or tuple(values.shape) != (len(rows), len(columns)):
        values = compute_reference(trainer, rows, len(columns))
        if path and trainer.is_world_process_zero() and bool(values.isfinite().all()):
            with files.workplace(path) as work:
                save_file({"logps": values}, work / path.name)
                (work / path.name).replace(path)
    for place, column in enumerate(columns):
        rows = rows.add_column(column, values[:, place].tolist())
    return rows


def compute_reference(trainer: Any, rows: Any, columns: int) -> Any:
    """A float64 tensor [rows, columns] of summed log-probabilities: of chosen and of rejected, or
    of a completion and, for KTO's KL term, of the other completion. Rows of like length go
    together."""
    import torch

    lengths, size = row_lengths(rows), trainer.args.per_device_train_batch_size
    by_length = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    values = torch.empty((len(rows), columns), dtype=torch.float64)
    trainer.model.eval()
    for first in range(0, len(by_length), size):
        indices = by_length[first : first + size]
        batch = shared_prompt.collate(trainer, rows, indices)
        found = trainer.compute_ref_log_probs(trainer.model, batch)[:columns]
        values[indices] = torch.stack(list(found), dim=1).double().cpu()
    return values


def reference_id(trainer: Any, rows: Any) -> str:
    """12 hexadecimal digits of everything but the weights that decides the values, down to how they
    are rounded."""
    args = trainer.args
    how = [
        *map(importlib.metadata.version, LIBRARIES),
        args.per_device_train_batch_size,
        args.bf16,
        str(trainer.model.dtype),
        str(trainer.accelerator.device),
    ]
    digest = hashlib.sha256(json.dumps(how).encode())
    for column in sorted(name for name in rows.column_names if name.endswith("_ids")):
        digest.update(json.dumps([column, *rows[column]]).encode())
    return digest.hexdigest()[:12]


def _drop_reference_adapter(model: Any) -> None:
    """Take away the frozen copy of the adapter that TRL adds as the reference, once it is not
    needed; Trainer would load it from a checkpoint in the place of the trained one."""
    if "ref" in model.peft_config:
        model.delete_adapter("ref")
