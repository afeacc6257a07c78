"""``train_adapter``: rows in, an adapter out, by TRL's trainers and PEFT's LoRA on a freshly loaded
base.

    tuned = train_adapter(DPO(beta=0.1), pairs.rows(), base="models/SmolLM2-135M-Instruct",
                          output=Path("adapters/r1"))
    tuned.adapter_hash        # "5f2c09a1b3de"
    tuned.history[0]          # {"step": 1, "epoch": 0.13, "loss": 0.6931, "rewards/margins": 0.0}

What decided the training stands beside the adapter, in training.json, with what it gave: the same
call gives that again, and trains nothing.

Only the adapter is trained, and only the completion's tokens carry loss. The same seed on one CPU
thread gives the same bits. Checkpoints, evaluation, early stopping and logs are those of
transformers' Trainer.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import random
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cowest_dspy import compat
from cowest_dspy.errors import TuningError
from cowest_dspy.lms.local import lora, weights
from cowest_dspy.lms.local.weights import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from cowest_dspy.store.serialize import digest
from cowest_dspy.tuning import data, shared_prompt, trainers
from cowest_dspy.tuning.config import DPO, KTO, SFT
from cowest_dspy.tuning.trainers import OnStep
from cowest_dspy.utils import files
from cowest_dspy.utils.extras import EXTRAS, check_extra

if TYPE_CHECKING:
    from transformers import TrainerCallback

ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
RECORD = "training.json"
"""The file beside an adapter that says what it was trained on, and what the training gave."""


@dataclass(frozen=True)
class Tuned:
    """What a training gave.

    path: the adapter's folder. adapter_hash: 12 hexadecimal digits of its content.
    base_id: name and content hash of the base that it belongs to.
    history: the trainer's log, one record per optimiser step: step, epoch, loss, learning_rate,
        grad_norm, and of DPO and KTO rewards/margins, ...; and one per evaluation of held-out rows:
        step, epoch, eval_loss, ... Of DPO also kl: the mean over completions of log p - log p_ref
        in nats, on the data's completions, so that it may be negative.
    seconds: of the training, loading included. peak_memory_bytes: of all its processes together.
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


def train_adapter(
    settings: SFT | DPO | KTO,
    rows: Iterable[data.Row],
    *,
    base: str,
    adapter: Path | None = None,
    output: Path,
    seed: int = 0,
    on_step: OnStep | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    cache: Path | None = None,
) -> Tuned:
    """Train an adapter on rows, by the trainer that the settings are of.

    - ``SFT`` on ``{"prompt": [...], "completion": [...]}``; the loss is that of the completions'
      tokens.
    - ``DPO`` on ``{"prompt": [...], "chosen": [...], "rejected": [...]}``, towards the chosen and
      away from the rejected.
    - ``KTO`` on ``{"prompt": [...], "completion": [...], "label": bool}``, towards those labelled
      True and away from the others; both labels must occur.

    Args:
        settings: what to train, in TRL's names.
        rows: lists of chat messages; an ``example_id`` keeps rows of one example together.
        base: a model folder or Hub id.
        adapter: one to train further, or None for a new one. The reference of DPO and KTO is the
            model as it is at the start: the base, or the base with this adapter.
        output: the folder of the result, written at the end and whole. Where this very training
            (settings, rows, starting weights, seed) is done there already, its result is given and
            nothing is trained; where another one is, that is an error.
        seed: of the new adapter, the order of rows and dropout.
        on_step: hears of every optimiser step (:data:`OnStep`).
        callbacks: of transformers' Trainer, called after the library's own.
        cache: a folder for the reference's log-probabilities, which are computed once, before the
            first step: the next training that starts from the same weights with the same rows reads
            them, whatever its settings.

    A training that was stopped or killed resumes from its last checkpoint (``save_steps``) when it
    is started again with the same arguments, and gives what it would have given; checkpoints stand
    beside ``output`` until then.

    Raises:
        TuningError: rows that cannot be trained on, a row longer than ``max_length`` or the model's
            context, a loss that is no number, an output folder that holds another training or
            something else.
        ModelError: a base or an adapter that cannot be used.
    """
    plan, output = plan_training(settings, rows, base, adapter, seed), Path(output)
    done = find_training(plan, output)
    return done or _train(settings, plan, output, seed, on_step, callbacks, cache)


@dataclass(frozen=True)
class TrainingPlan:
    """What a training is of: checked rows, the ids of their examples, the base's folder, an adapter
    to train further, hashes of the weights that it starts from.

    identity: everything that decides the result, but for rounding; JSON values.
    """

    rows: Sequence[dict[str, Any]]
    example_ids: Sequence[Any]
    base: Path
    adapter: Path | None
    start: str
    identity: dict[str, Any]


def plan_training(
    settings: SFT | DPO | KTO,
    rows: Iterable[data.Row],
    base: str,
    adapter: Path | None,
    seed: int,
) -> TrainingPlan:
    """The plan of a training by :func:`train_adapter`.

    Raises:
        TuningError: rows that cannot be trained on, a place of logs that is not installed.
        ModelError: a base or an adapter that cannot be used.
    """
    rows = list(rows)
    checked, ids = data.check_rows(rows, type(settings).__name__), _example_ids(rows)
    _check_reporters(settings.report_to)
    folder = weights.locate(base)
    start = _start_id(folder, adapter)
    identity = {
        "tuner": type(settings).__name__,
        "settings": settings.decisive(),
        "rows": digest([checked, ids if settings.held_out else None]),
        "starting weights": start,
        "seed": seed,
    }
    return TrainingPlan(checked, ids, folder, adapter, start, identity)


def _train(
    settings: SFT | DPO | KTO,
    plan: TrainingPlan,
    output: Path,
    seed: int,
    on_step: OnStep | None,
    callbacks: Sequence[TrainerCallback],
    cache: Path | None,
) -> Tuned:
    from accelerate.utils import gather_object

    started, rows = time.monotonic(), plan.rows
    checkpoints = _checkpoint_folder(settings, plan, output)
    split = data.split_rows(rows, settings.held_out, seed, plan.example_ids)
    train_ids, held_ids = map(list, split)
    if isinstance(settings, KTO):
        # TRL pairs each prompt with the completion of its neighbour, so rows are shuffled before.
        random.Random(seed).shuffle(train_ids)
    parts = [rows[index] for index in train_ids], [rows[index] for index in held_ids]
    checkpoint = last_checkpoint(checkpoints)
    with (
        PeakMemory() as memory,
        _quiet(),
        _own_random_state(),
        _own_wandb_run(),
        _clean_up(checkpoints),
    ):
        trainer = trainers.make_trainer(
            settings, *parts, plan.base, plan.adapter, checkpoints, seed, checkpoint is not None
        )
        _check_lengths(trainer, train_ids + held_ids, settings.max_length)
        trainer.add_callback(trainers.progress_callback(settings, on_step, len(train_ids)))
        for callback in callbacks:
            trainer.add_callback(callback)
        with compat.compact_lm_head():
            _prepare(trainer, settings, seed, cache / plan.start if cache else None)
            trainer.train(resume_from_checkpoint=checkpoint)
        state = trainer.state
        history = [one for one in state.log_history if "loss" in one or "eval_loss" in one]
        tuned = Tuned(
            path=output,
            adapter_hash="",  # Known when it is written.
            base_id=f"{weights.base_name(plan.base)}@{plan.start.split('-')[0]}",
            history=history,
            seconds=time.monotonic() - started,
            tokens=int(max((one.get("num_tokens", 0) for one in history), default=0)),
            trained_rows=round(state.epoch * len(train_ids)),
            peak_memory_bytes=sum(gather_object([memory.peak_bytes])),
            settings=settings.model_dump(mode="json"),
            best_step=state.best_global_step,
            stopped_early=state.global_step < state.max_steps,
        )
        _save(trainer, tuned, plan)
        if trainer.is_world_process_zero():
            _keep_logs(checkpoints, output)
            _delete_checkpoints(output)
        _release(trainer)
    del trainer
    weights.return_memory()
    return read_record(output)[1]


def _prepare(trainer: Any, settings: SFT | DPO | KTO, seed: int, cache: Path | None) -> None:
    """Share prompts, round frozen weights, add the reference, and put the rows in order."""
    lengths = trainers.row_lengths(trainer.train_dataset)
    if not trainer.is_fsdp_enabled:  # FSDP has the model whole nowhere, until it trains.
        if isinstance(settings, DPO | SFT) and settings.share_prompt:
            shared_prompt.share_if_equal(trainer, lengths)
        if trainer.args.bf16:
            shared_prompt.round_frozen(trainer.model)
        if not isinstance(settings, SFT):
            trainers.add_references(trainer, cache)
    if not isinstance(settings, KTO):
        steps = trainer.args.max_steps
        order = data.training_order(lengths, steps, settings.step_rows, seed)
        trainer.train_dataset = trainer.train_dataset.select(order)


def _example_ids(rows: Iterable[Any]) -> list[Any]:
    """The ``example_id`` of each row, None where it has none."""
    return [row.get("example_id") if isinstance(row, Mapping) else None for row in rows]


def _check_lengths(trainer: Any, ids: Sequence[int], allowed: int | None) -> None:
    """A row that is too long is named, never cut or left out silently, which is what TRL would do.
    ``ids``: what the rows to train on and then the held-out ones were given as."""
    parts = [one for one in (trainer.train_dataset, trainer.eval_dataset) if one is not None]
    found = [length for part in parts for length in trainers.row_lengths(part)]
    context = getattr(trainer.model.config.get_text_config(), "max_position_embeddings", None)
    limit = min(limit for limit in (allowed, context, 1 << 40) if limit)
    long = sorted((row, length) for row, length in zip(ids, found, strict=True) if length > limit)
    if not long:
        return
    named = ", ".join(f"row {row} has {length}" for row, length in long[:5])
    whose = "max_length" if limit == allowed else "the model's context"
    raise TuningError(
        f"{len(long)} of {len(found)} rows are longer than {whose}, {limit} tokens: {named}"
        f"{', ...' if len(long) > 5 else ''}. "
        f"{'Raise max_length (or leave it out)' if limit == allowed else 'Shorten them'}, or take "
        "these rows out."
    )


# Checkpoints


def _start_id(folder: Path, adapter: Path | None) -> str:
    """The weights that training starts from: hashes of the base and of the adapter,
    "5f2c09a1b3de-new" without one."""
    return f"{weights.folder_hash(folder)}-{lora.identify(adapter, folder) if adapter else 'new'}"


def _checkpoint_folder(settings: SFT | DPO | KTO, plan: TrainingPlan, output: Path) -> Path:
    """Where the checkpoints of a training are: beside its output, named by everything that decides
    the result, so that those of another training are never taken."""
    identity = {
        **plan.identity,
        "bf16": weights.choose_dtype() if settings.bf16 is None else settings.bf16,
        "processes": trainers.count_processes(),
        "versions": [*map(importlib.metadata.version, trainers.LIBRARIES)],
    }
    return output.absolute().with_name(f".{output.name}.{digest(identity)}.checkpoints")


def last_checkpoint(checkpoints: Path) -> str | None:
    """The newest checkpoint that was written whole: Trainer writes its state last."""
    found: dict[int, str] = {}
    for path in checkpoints.glob("checkpoint-*/trainer_state.json"):
        try:
            found[json.loads(path.read_text(encoding="utf-8"))["global_step"]] = str(path.parent)
        except (ValueError, OSError):
            continue
    return found[max(found)] if found else None


def _keep_logs(checkpoints: Path, output: Path) -> None:
    """Copy TensorBoard's files, which Trainer writes beside checkpoints, to ``<output>.logs``."""
    if (checkpoints / "runs").is_dir():
        logs = output.with_name(f"{output.name}.logs")
        shutil.copytree(checkpoints / "runs", logs, dirs_exist_ok=True)


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
        if isinstance(error, TuningError) or last_checkpoint(checkpoints) is None:
            files.discard(checkpoints)
        raise


# The output


def find_training(plan: TrainingPlan, output: Path) -> Tuned | None:
    """What a training gave that is done in ``output`` already; None where nothing is there.

    Raises:
        TuningError: another training, an adapter that was changed since, or something else.
    """
    names = {path.name for path in output.iterdir()} if output.is_dir() else set[str]()
    if not names and not output.is_file():
        return None
    again = "It is not overwritten: give another output folder, or delete this one."
    if not names or not names <= {*ADAPTER_FILES, RECORD}:
        raise TuningError(f"{output} exists and is not an adapter of ours. {again}")
    try:
        identity, tuned = read_record(output)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise TuningError(
            f"{output} holds an adapter, but no {RECORD} that says how it was trained "
            f"({type(error).__name__}). {again}"
        ) from error
    if identity != plan.identity:
        raise TuningError(
            f"{output} holds another training: {_differences(identity, plan.identity)}. {again}"
        )
    if weights.adapter_hash(output) != tuned.adapter_hash:
        raise TuningError(
            f"{output} holds an adapter that was changed since it was trained. {again}"
        )
    # Those of a process that was killed when the adapter had been written.
    _delete_checkpoints(output)
    return tuned


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What two trainings differ in, such as "other settings (beta), other rows"."""
    one, other = before["settings"], now["settings"]
    keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    named = {"settings": f" ({', '.join(keys)})"} if keys else {}
    return ", ".join(
        f"other {name}{named.get(name, '')}" for name in now if before.get(name) != now[name]
    )


def read_record(folder: Path) -> tuple[dict[str, Any], Tuned]:
    """The identity of the training whose result stands in a folder, and that result."""
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    return record["identity"], Tuned(**{**record["tuned"], "path": folder})


def _save(trainer: Any, tuned: Tuned, plan: TrainingPlan) -> None:
    """Write the trained adapter into ``tuned.path``, with the record of its training beside it, all
    of it or nothing.

    The configuration names the base as ``from_pretrained`` finds it, and does not depend on hash
    order. Of several processes each has to call it; the first writes.
    """
    output = tuned.path
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
            config["base_model_name_or_path"] = weights.hub_id(plan.base) or str(plan.base)
            if isinstance(config.get("target_modules"), list):
                config["target_modules"] = sorted(config["target_modules"])
            (staged / ADAPTER_CONFIG).write_text(
                json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8"
            )
            made = replace(tuned, adapter_hash=weights.adapter_hash(staged))
            record = {"identity": plan.identity, "tuned": {**asdict(made), "path": None}}
            (staged / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            files.replace_folder(staged, output)
    trainer.accelerator.wait_for_everyone()


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
    for name in report_to:
        if name in EXTRAS:
            check_extra(name, f"report_to {name}", TuningError)
    missing = [name for name in report_to if importlib.util.find_spec(name) is None]
    if missing:
        raise TuningError(
            f'report_to has "{missing[0]}", which is not installed. '
            f"Type pip install {' '.join(missing)}, or take it out of report_to."
        )


@contextmanager
def _own_wandb_run() -> Iterator[None]:
    """A context whose W&B run, if one begins in it, ends with it: otherwise the next training's
    logs would go into the run of this one."""

    def running() -> bool:
        return getattr(sys.modules.get("wandb"), "run", None) is not None

    before = running()
    try:
        yield
    finally:
        if not before and running():
            sys.modules["wandb"].finish()


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
