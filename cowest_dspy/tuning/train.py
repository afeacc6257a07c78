"""``train_sft``, ``train_dpo`` and ``train_kto``: rows in, an adapter out. TRL's trainers and PEFT's
LoRA on a freshly loaded base.

    tuned = train_dpo(DPO(beta=0.1), pairs.rows(), base="models/SmolLM2-135M-Instruct",
                      adapter=None, output=Path("adapters/r1"))
    tuned.adapter_hash        # "5f2c09a1b3de"
    tuned.history[0]          # {"step": 1, "epoch": 0.13, "loss": 0.6931, "rewards/margins": 0.0}

Only the adapter is trained, and only the completion's tokens carry loss. The same seed on one CPU
thread gives the same bits. Checkpoints, evaluation, early stopping and logs are those of
transformers' Trainer.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import math
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cowest_dspy import compat
from cowest_dspy.errors import TuningError, masked
from cowest_dspy.lms.local import lora, weights
from cowest_dspy.lms.local.weights import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from cowest_dspy.tuning import data, shared_prompt
from cowest_dspy.tuning.config import DPO, KTO, SFT, Lora
from cowest_dspy.utils import files, interrupts

OnStep = Callable[[int, int, dict[str, float]], None]
"""Called with (step, total, logs): once with no logs when training begins, then after each
optimiser step.

The first step is 0, or that of the checkpoint from which training resumes. An exception that it
raises stops the training and comes out of it.
"""

ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
SAVE_SECONDS = 60.0
"""Seconds between two checkpoints when ``save_steps`` does not say; writing one takes far less than
a hundredth of that."""
LIBRARIES = ("torch", "transformers", "trl", "peft")
"""Another version of these may round otherwise, so no checkpoint and no reference of it is used."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tuned:
    """What a training gave.

    path: the adapter's folder. adapter_hash: 12 hexadecimal digits of its content.
    base_id: name and content hash of the base that it belongs to.
    history: the trainer's log, one record per optimiser step: step, epoch, loss, learning_rate,
        grad_norm, and of DPO and KTO rewards/margins, ...; and one per evaluation of held-out rows:
        step, epoch, eval_loss, ... Of DPO also kl: the mean over completions of log p - log p_ref
        in nats, on the data's completions, so that it may be negative.
    seconds, peak_memory_bytes: of this process's part of the training, loading included.
    tokens: read by the model, all passes together. trained_rows: a row of two passes counts twice.
    settings: as they were given.
    best_step: of the lowest held-out loss; None when nothing is held out.
    stopped_early: the patience was over before the last step.
    """

    path: Path
    adapter_hash: str
    base_id: str
    history: list[dict[str, float]]
    seconds: float
    tokens: int
    trained_rows: int
    peak_memory_bytes: int
    settings: dict[str, Any] = field(default_factory=dict)
    best_step: int | None = None
    stopped_early: bool = False


def train_sft(
    settings: SFT,
    rows: Iterable[data.Row],
    *,
    base: str,
    adapter: Path | None = None,
    output: Path,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> Tuned:
    """Fine-tune on ``{"prompt": [...], "completion": [...]}`` rows; the loss is that of the
    completions' tokens.

    ``base`` is a model folder or Hub id; ``adapter`` an adapter to train further, or None for a new
    one; ``output`` the folder of the result, written at the end and whole.

    A training that was stopped or killed resumes from its last checkpoint (``save_steps``) when it
    is started again with the same arguments, and gives what it would have given; checkpoints stand
    beside ``output`` until then.

    Raises:
        TuningError: rows that cannot be trained on, a row longer than ``max_length`` or the model's
            context, a loss that is no number, an output folder that holds something else.
        ModelError: a base or an adapter that cannot be used.
    """
    given = list(rows)
    return _train(
        settings, data.sft_rows(given), _example_ids(given), base, adapter, output, seed, on_step
    )


def train_dpo(
    settings: DPO,
    rows: Iterable[data.Row],
    *,
    base: str,
    adapter: Path | None = None,
    output: Path,
    seed: int = 0,
    on_step: OnStep | None = None,
    cache: Path | None = None,
) -> Tuned:
    """Tune on ``{"prompt": [...], "chosen": [...], "rejected": [...]}`` rows, towards the chosen
    and away from the rejected.

    The reference is the model as it is at the start: the base, or the base with ``adapter``. Its
    log-probabilities are computed once, before the first step; with ``cache``, a folder, they are
    stored there for the next training that starts from the same weights with the same pairs,
    whatever its settings. Everything else is as in :func:`train_sft`.
    """
    given = list(rows)
    checked, ids = data.preference_rows(given), _example_ids(given)
    return _train(settings, checked, ids, base, adapter, output, seed, on_step, cache)


def train_kto(
    settings: KTO,
    rows: Iterable[data.Row],
    *,
    base: str,
    adapter: Path | None = None,
    output: Path,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> Tuned:
    """Tune on ``{"prompt": [...], "completion": [...], "label": bool}`` rows, towards those
    labelled True, away from the others.

    The reference is the model as it is at the start: the base, or the base with ``adapter``. Both
    labels must occur. Everything else is as in :func:`train_sft`.
    """
    given = list(rows)
    checked, ids = data.unpaired_rows(given), _example_ids(given)
    return _train(settings, checked, ids, base, adapter, output, seed, on_step)


def _train(
    settings: SFT | DPO | KTO,
    rows: Sequence[dict[str, Any]],
    example_ids: Sequence[Any],
    base: str,
    adapter: Path | None,
    output: Path,
    seed: int,
    on_step: OnStep | None,
    cache: Path | None = None,
) -> Tuned:
    started = time.monotonic()
    _check_reporters(settings.report_to)
    folder, output = weights.locate(base), Path(output)
    _check_output(output)
    start = _start_id(folder, adapter)
    checkpoints = _checkpoint_folder(settings, rows, start, seed, output)
    split = data.split_rows(rows, settings.held_out, seed, example_ids)
    train_ids, held_ids = map(list, split)
    if isinstance(settings, KTO):
        # TRL pairs each prompt with the completion of its neighbour, so rows are shuffled before.
        random.Random(seed).shuffle(train_ids)
    parts = [rows[index] for index in train_ids], [rows[index] for index in held_ids]
    with PeakMemory() as memory, _quiet(), _own_random_state(), _clean_up(checkpoints):
        trainer = _make_trainer(settings, *parts, folder, adapter, checkpoints, seed)
        lengths = _lengths(trainer.train_dataset)
        held_lengths = _lengths(trainer.eval_dataset) if held_ids else []
        _check_lengths(
            dict(zip(train_ids + held_ids, lengths + held_lengths, strict=True)),
            settings.max_length,
            trainer.model.config,
        )
        trainer.add_callback(_progress(trainer, settings, on_step, len(train_ids)))
        with compat.compact_lm_head():
            if not trainer.is_fsdp_enabled:  # FSDP has the model whole nowhere, until it trains.
                if isinstance(settings, DPO) and settings.share_prompt:
                    shared_prompt.share_if_equal(trainer, lengths)
                if trainer.args.bf16:
                    shared_prompt.round_frozen(trainer.model)
                if isinstance(settings, DPO):
                    _add_references(trainer, cache / start if cache else None)
            if not isinstance(settings, KTO):
                steps = trainer.args.max_steps
                order = data.training_order(lengths, steps, settings.step_rows, seed)
                trainer.train_dataset = trainer.train_dataset.select(order)
            trainer.train(resume_from_checkpoint=_last_checkpoint(checkpoints))
        digest = _save(trainer, output, folder.name)
        if trainer.is_world_process_zero():
            _move_event_files(checkpoints, output)
            _delete_checkpoints(output)
        state = trainer.state
        _release(trainer)
    del trainer
    weights.return_memory()
    history = [one for one in state.log_history if "loss" in one or "eval_loss" in one]
    return Tuned(
        path=output,
        adapter_hash=digest,
        base_id=f"{folder.name}@{start.split('-')[0]}",
        history=history,
        seconds=time.monotonic() - started,
        tokens=int(max((one.get("num_tokens", 0) for one in history), default=0)),
        trained_rows=state.global_step * settings.step_rows,
        peak_memory_bytes=memory.peak_bytes,
        settings=settings.model_dump(mode="json"),
        best_step=state.best_global_step,
        stopped_early=state.global_step < state.max_steps,
    )


def _example_ids(rows: Iterable[Any]) -> list[Any]:
    """The ``example_id`` of each row, None where it has none."""
    return [row.get("example_id") if isinstance(row, Mapping) else None for row in rows]


# The trainer


def _make_trainer(
    settings: SFT | DPO | KTO,
    rows: Sequence[dict[str, Any]],
    held_rows: Sequence[dict[str, Any]],
    base: Path,
    adapter: Path | None,
    checkpoints: Path,
    seed: int,
) -> Any:
    """TRL's trainer for these settings with its data tokenised, on a fresh copy of ``base``; the
    reference is the untrained adapter, or the bare base."""
    import trl
    from datasets import Dataset
    from transformers import EarlyStoppingCallback, PrinterCallback, set_seed

    config = getattr(trl, settings.library_config)(
        **_arguments(settings, rows, bool(held_rows), checkpoints, seed)
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
    _tolerate_reporters(trainer)
    if settings.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(settings.early_stopping_patience))
    if isinstance(settings, KTO) and trainer.precompute_ref_logps:
        _drop_reference_adapter(trainer.model)
    _restore_dropout(trainer.model)
    if not any(one.requires_grad for one in trainer.model.parameters()):
        raise TuningError(
            "Nothing in this model can be trained: no parameter of an adapter requires a gradient."
        )
    return trainer


def _arguments(
    settings: SFT | DPO | KTO,
    rows: Sequence[dict[str, Any]],
    evaluating: bool,
    checkpoints: Path,
    seed: int,
) -> dict[str, Any]:
    """The fields of TRL's configuration: what the settings say, then what a training decides."""
    import torch

    own = {"lora", "held_out", "early_stopping_patience", "share_prompt"}
    given = settings.model_dump(exclude=own, exclude_none=True)
    for name in ("loss_type", "loss_weights"):
        if isinstance(given.get(name), tuple):
            given[name] = list(given[name])
    processes = count_processes()
    decided: dict[str, Any] = {
        "output_dir": str(checkpoints),
        "gradient_accumulation_steps": settings.gradient_accumulation_steps // processes,
        "bf16": weights.choose_dtype() == "bfloat16" if settings.bf16 is None else settings.bf16,
        # Rows are put in order before; lengths are checked, since TRL would cut rows silently.
        "train_sampling_strategy": "sequential",
        "max_length": None,
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": list(settings.report_to) or "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "seed": seed,
        "save_steps": 500,  # A callback saves; see _progress.
        "save_strategy": "no",
        "save_total_limit": 1,
        "load_best_model_at_end": False,
        "restore_callback_states_from_checkpoint": True,
    }
    if evaluating:
        decided |= {
            "eval_strategy": "steps",
            "eval_on_start": _last_checkpoint(checkpoints) is None,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": False,
        }
        if settings.load_best_model_at_end:
            decided |= {"save_strategy": "best", "load_best_model_at_end": True}
    if isinstance(settings, SFT):
        decided["completion_only_loss"] = True
    if isinstance(settings, KTO):
        desirable = sum(row["label"] for row in rows)
        good, bad = settings.weights(desirable, len(rows) - desirable)
        decided |= {"desirable_weight": good, "undesirable_weight": bad}
        decided["precompute_ref_log_probs"] = not compat.fsdp_is_on()
    else:
        decided["max_steps"] = settings.steps(len(rows))
    return {
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


def _progress(trainer: Any, settings: SFT | DPO | KTO, on_step: OnStep | None, rows: int) -> Any:
    """A ``transformers.TrainerCallback`` that reports steps, asks for checkpoints, and stops a
    training that diverges or is asked to stop."""
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
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
            interrupts.check()
            interrupts.postpone()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            # The rows in their order count as one pass to the trainer.
            state.epoch = state.global_step * settings.step_rows / rows
            every, step = settings.save_steps, state.global_step
            if every != 0 and (
                interrupts.asked_to_stop()
                or (every and step % every == 0)
                or (every is None and time.monotonic() - self.saved >= SAVE_SECONDS)
            ):
                control.should_save = step < state.max_steps

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.saved = time.monotonic()

        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
        ) -> None:
            record = state.log_history[-1]
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

    return Progress()


SIDES = ("chosen", "rejected")


def _check_finite(record: Mapping[str, Any]) -> None:
    for key in ("loss", "grad_norm", "eval_loss"):
        if not math.isfinite(record.get(key, 0.0)):
            raise TuningError(
                f"Training diverged at step {record['step']}: {key} is {record[key]}. Lower "
                "learning_rate, raise warmup_steps, or set bf16 = false."
            )


def _lengths(rows: Any) -> list[int]:
    """Tokens of every tokenised row; of a pair, of its longer side."""
    if "input_ids" in rows.column_names:
        return [len(ids) for ids in rows["input_ids"]]
    if "completion_ids" in rows.column_names:
        pairs = zip(rows["prompt_ids"], rows["completion_ids"], strict=True)
        return [len(prompt) + len(ids) for prompt, ids in pairs]
    sides = zip(rows["prompt_ids"], rows["chosen_ids"], rows["rejected_ids"], strict=True)
    return [len(prompt) + max(len(chosen), len(rejected)) for prompt, chosen, rejected in sides]


def _check_lengths(lengths: Mapping[int, int], allowed: int | None, config: Any) -> None:
    """A row that is too long is named, never cut or left out silently, which is what TRL would
    do."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    limit = min(limit for limit in (allowed, context, 1 << 40) if limit)
    long = sorted(index for index, length in lengths.items() if length > limit)
    if not long:
        return
    named = ", ".join(f"row {index} has {lengths[index]}" for index in long[:5]) + (
        ", ..." if len(long) > 5 else ""
    )
    whose = "max_length" if limit == allowed else "the model's context"
    raise TuningError(
        f"{len(long)} of {len(lengths)} rows are longer than {whose}, {limit} tokens: {named}. "
        f"{'Raise max_length (or leave it out)' if limit == allowed else 'Shorten them'}, or take "
        "these rows out."
    )


# The reference of DPO


def _add_references(trainer: Any, cache: Path | None) -> None:
    """Add the reference's log-probabilities to the trainer's pairs, so that no step has to compute
    them."""
    trainer.train_dataset = _with_reference(trainer, trainer.train_dataset, cache)
    if trainer.eval_dataset is not None:
        trainer.eval_dataset = _with_reference(trainer, trainer.eval_dataset, cache)
    trainer.precompute_ref_logps = True
    _drop_reference_adapter(trainer.model)


def _with_reference(trainer: Any, pairs: Any, cache: Path | None) -> Any:
    """``pairs`` with the reference's log-probabilities of both sides, from ``cache`` if they are
    there. They depend on the weights that training starts from and on the tokens of the pairs, not
    on beta, the loss or the learning rate.

    TRL can do so itself (``precompute_ref_log_probs``), but without the shared prompt, and anew for
    each training.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    path = cache / f"{_reference_id(trainer, pairs)}.safetensors" if cache else None
    values = None
    if path and path.is_file():
        try:
            values = load_file(path)["logps"]
        except (SafetensorError, OSError, KeyError):
            _logger.warning("%s is damaged: the reference is computed again.", path)
    if values is None or tuple(values.shape) != (len(pairs), 2):
        values = _compute_reference(trainer, pairs)
        if path and trainer.is_world_process_zero() and bool(values.isfinite().all()):
            with files.workplace(path) as work:
                save_file({"logps": values}, work / path.name)
                (work / path.name).replace(path)
    pairs = pairs.add_column("ref_chosen_logps", values[:, 0].tolist())
    return pairs.add_column("ref_rejected_logps", values[:, 1].tolist())


def _compute_reference(trainer: Any, pairs: Any) -> Any:
    """A float64 tensor [pairs, 2]: the summed log-probability of chosen and of rejected. Rows of
    like length go together."""
    import torch

    lengths, size = _lengths(pairs), trainer.args.per_device_train_batch_size
    by_length = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    values = torch.empty((len(pairs), 2), dtype=torch.float64)
    trainer.model.eval()
    for first in range(0, len(by_length), size):
        indices = by_length[first : first + size]
        batch = shared_prompt.collate(trainer, pairs, indices)
        chosen, rejected = trainer.compute_ref_log_probs(trainer.model, batch)
        values[indices] = torch.stack([chosen, rejected], dim=1).double().cpu()
    return values


def _reference_id(trainer: Any, pairs: Any) -> str:
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
    for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
        digest.update(json.dumps([column, *pairs[column]]).encode())
    return digest.hexdigest()[:12]


def _drop_reference_adapter(model: Any) -> None:
    """Take away the frozen copy of the adapter that TRL adds as the reference, once it is not
    needed; Trainer would load it from a checkpoint in the place of the trained one."""
    if "ref" in model.peft_config:
        model.delete_adapter("ref")


# Checkpoints


def _start_id(folder: Path, adapter: Path | None) -> str:
    """The weights that training starts from: hashes of the base and of the adapter,
    "5f2c09a1b3de-new" without one."""
    return f"{weights.folder_hash(folder)}-{lora.identify(adapter, folder) if adapter else 'new'}"


def _checkpoint_folder(
    settings: SFT | DPO | KTO,
    rows: Sequence[dict[str, Any]],
    start: str,
    seed: int,
    output: Path,
) -> Path:
    """Where the checkpoints of a training are: beside its output, named by everything that decides
    the result, so that those of another training are never taken."""
    identity = {
        "kind": type(settings).__name__,
        "settings": settings.decisive(),
        "rows": rows,
        "start": start,
        "seed": seed,
        "bf16": weights.choose_dtype() if settings.bf16 is None else settings.bf16,
        "processes": count_processes(),
        "versions": [*map(importlib.metadata.version, LIBRARIES)],
    }
    text = json.dumps(identity, sort_keys=True, ensure_ascii=False)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return output.absolute().with_name(f".{output.name}.{digest}.checkpoints")


def _last_checkpoint(checkpoints: Path) -> str | None:
    """The newest checkpoint that was written whole: Trainer writes its state last."""
    found: dict[int, str] = {}
    for path in checkpoints.glob("checkpoint-*/trainer_state.json"):
        try:
            found[json.loads(path.read_text(encoding="utf-8"))["global_step"]] = str(path.parent)
        except (ValueError, OSError):
            continue
    return found[max(found)] if found else None


def _delete_checkpoints(output: Path) -> None:
    """Delete the checkpoints of every training into this output: its adapter is there now, or never
    will be."""
    for path in output.absolute().parent.glob(f".{output.name}.*.checkpoints"):
        files.discard(path)


@contextmanager
def _clean_up(checkpoints: Path) -> Iterator[None]:
    """A context whose end by a TuningError deletes the checkpoints, since resuming would only fail
    again; any other error keeps what can be resumed from."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, TuningError) or _last_checkpoint(checkpoints) is None:
            files.discard(checkpoints)
        raise


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


def _restore_dropout(model: Any) -> None:
    """Give adapters the dropout of their configuration again: TRL takes every dropout out of a
    model that it tunes on pairs, which is meant for the base, and would leave ``lora_dropout``
    without any effect."""
    import torch

    for module in model.modules():
        for name, dropout in getattr(module, "lora_dropout", {}).items():
            if isinstance(dropout, torch.nn.Dropout):
                dropout.p = model.peft_config[name].lora_dropout


def _check_output(output: Path) -> None:
    if output.exists() and not (
        output.is_dir() and {path.name for path in output.iterdir()} <= set(ADAPTER_FILES)
    ):
        raise TuningError(
            f"{output} exists and is not an adapter of ours: it is not overwritten. Give another "
            "output folder."
        )


def _save(trainer: Any, output: Path, base_name: str) -> str:
    """Write the trained adapter into ``output``, all of it or nothing; gives its content hash.

    The configuration names the base by ``base_name``, not by its path on this machine, and does not
    depend on hash order. Of several processes each has to call it; the first writes.
    """
    state_dict = _gather_sharded(trainer.model)
    if trainer.is_world_process_zero():
        with files.workplace(output) as work:
            staged = work / "adapter"
            trainer.model.save_pretrained(
                staged,
                state_dict=state_dict,
                selected_adapters=["default"],
                save_embedding_layers=False,
            )
            for path in staged.iterdir():
                if path.name not in ADAPTER_FILES:
                    path.unlink()
            config = json.loads((staged / ADAPTER_CONFIG).read_text(encoding="utf-8"))
            config["base_model_name_or_path"] = base_name
            if isinstance(config.get("target_modules"), list):
                config["target_modules"] = sorted(config["target_modules"])
            (staged / ADAPTER_CONFIG).write_text(
                json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8"
            )
            files.replace_folder(staged, output)
    trainer.accelerator.wait_for_everyone()
    return weights.adapter_hash(output)


def _gather_sharded(model: Any) -> dict[str, Any] | None:
    """The adapter's tensors put together again where FSDP has shared them out, on the CPU; None
    where it has not. Only the adapter is gathered: the base stays where it is, however large."""
    from torch.distributed.tensor import DTensor

    named = {name: one for name, one in model.named_parameters() if one.requires_grad}
    if not any(isinstance(one, DTensor) for one in named.values()):
        return None
    return {
        name: (one.full_tensor() if isinstance(one, DTensor) else one).detach().cpu()
        for name, one in named.items()
    }


def _release(trainer: Any) -> None:
    """Let go of weights, gradients and optimiser, which point at one another in circles."""
    trainer.model = trainer.model_wrapped = trainer.optimizer = trainer.lr_scheduler = None
    trainer.accelerator.free_memory()


# Logs


def _check_reporters(report_to: Sequence[str]) -> None:
    missing = [name for name in report_to if importlib.util.find_spec(name) is None]
    if missing:
        raise TuningError(
            f'report_to has "{missing[0]}", which is not installed. '
            f"Type pip install {' '.join(missing)}, or take it out of report_to."
        )


def _tolerate_reporters(trainer: Any) -> None:
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


def _move_event_files(checkpoints: Path, output: Path) -> None:
    """TensorBoard's files, which Trainer writes beside the checkpoints, go to ``<output>.logs``."""
    if (checkpoints / "runs").is_dir():
        logs = output.with_name(f"{output.name}.logs")
        shutil.copytree(checkpoints / "runs", logs, dirs_exist_ok=True)


# The process


class PeakMemory:
    """A context that samples this process's resident memory; ``peak_bytes`` is the largest value
    seen, from its start on.

    On a GPU it says what the process takes of the machine's memory, not of the card's.
    """

    def __init__(self, interval: float = 0.05) -> None:
        import psutil

        self._process, self._interval = psutil.Process(), interval
        self._done = threading.Event()
        self.peak_bytes = 0

    def __enter__(self) -> PeakMemory:
        self._sample()
        self._thread = threading.Thread(target=self._watch, name="cowest peak memory", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._sample()

    def _watch(self) -> None:
        while not self._done.wait(self._interval):
            self._sample()

    def _sample(self) -> None:
        self.peak_bytes = max(self.peak_bytes, self._process.memory_info().rss)


@contextmanager
def _own_random_state() -> Iterator[None]:
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
def _quiet() -> Iterator[None]:
    """A context in which transformers, TRL and datasets draw no bars and print no advice; progress
    is told by callbacks."""
    import datasets
    from transformers.utils import logging as transformers_logging

    level, bars = transformers_logging.get_verbosity(), datasets.are_progress_bars_disabled()
    transformers_logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        with weights.loading(), lora.ignore_renamed():
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()
