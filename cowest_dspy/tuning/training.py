"""``train_sft``, ``train_dpo`` and ``train_kto``: rows in, an adapter out. TRL's trainers and
PEFT's LoRA on a freshly loaded base.

    tuned = train_dpo(DPO(beta=0.1), pairs.rows(), base="models/SmolLM2-135M-Instruct",
    adapter=None, output=Path("adapters/r1"))
    tuned.adapter_hash        # "5f2c09a1b3de"
    tuned.history[0]          # {"step": 1, "epoch": 0.13, "loss": 0.6931, "rewards/margins": 0.0,
                              ...}

Only the adapter is trained, and only the completion's tokens carry loss. The same seed on one CPU
thread gives the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cowest_dspy.errors import TuningError
from cowest_dspy.lms.local import lora, weights
from cowest_dspy.tuning import adapters, evaluation, reporting, rows, schedule, stalling, trainers
from cowest_dspy.tuning.checkpoints import Checkpoint
from cowest_dspy.tuning.config import DPO, KTO, SFT
from cowest_dspy.tuning.watching import OnStep, PeakMemory, step_callback


@dataclass(frozen=True)
class Tuned:
    """What a training gave.

    path: the adapter's folder. adapter_hash: 12 hexadecimal digits of its content; another tensor,
        another hash.
    base_id: name and content hash of the base that it belongs to.
    history: one record per optimiser step: step, epoch, loss, learning_rate, grad_norm, and of DPO
        and KTO rewards/margins, ... seconds, peak_memory_bytes: of the whole training, loading
        included. tokens: read by the model, all passes together.
    trained_rows: rows that were seen, a row of two passes counted twice. settings: as they were
        given.
    best_step: of the lowest held-out loss; None when nothing is held out. stopped_early: patience
        was over before the last step. With held-out rows, history has records of their own for
        them: step, epoch, eval_loss, eval_kl, ...; see evaluation.py.
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
    data: Iterable[rows.Row],
    *,
    base: str,
    adapter: Path | None = None,
    output: Path,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> Tuned:
    """Fine-tunes on ``{"prompt": [...], "completion": [...]}`` rows; the loss is that of the
    completions' tokens.

    ``base`` is a model folder or Hub id; ``adapter`` an adapter to train further, or None for a new
    one; ``output`` the folder of the result, written at the end and whole. ``on_step`` is told of
    every optimiser step.

    A training whose process was killed goes on from its last checkpoint (``checkpoint_steps``) when
    it is started again with the same arguments, and gives what it would have given; checkpoints
    stand beside ``output`` until then.

    Raises:
        TuningError: rows that cannot be trained on, a row longer than ``max_length`` or the model's
            context, a loss that is no number, an output folder that holds something else.
        ModelError: a base or an adapter that cannot be used.
    """
    data = list(data)
    checked, examples = rows.sft_rows(data), evaluation.example_ids(data)
    return _train(
        settings, checked, trainers.sft_trainer, base, adapter, output, seed, on_step, examples
    )


def train_dpo(
    settings: DPO,
    data: Iterable[rows.Row],
    *,
    base: str,
    adapter: Path | None = None,
    output: Path,
    seed: int = 0,
    on_step: OnStep | None = None,
    cache: Path | None = None,
) -> Tuned:
    """Tunes on ``{"prompt": [...], "chosen": [...], "rejected": [...]}`` rows, towards the chosen
    and away from the rejected.

    The reference is the model as it is at the start: the base, or the base with ``adapter``. Its
    log-probabilities are computed once, before the first step; with ``cache``, a folder, they are
    kept there for the next training that starts from the same weights with the same pairs, whatever
    its settings. Everything else is as in :func:`train_sft`.
    """
    data = list(data)
    checked, examples = rows.preference_rows(data), evaluation.example_ids(data)
    return _train(
        settings,
        checked,
        trainers.dpo_trainer,
        base,
        adapter,
        output,
        seed,
        on_step,
        examples,
        cache,
    )


def train_kto(
    settings: KTO,
    data: Iterable[rows.Row],
    *,
    base: str,
    adapter: Path | None = None,
    output: Path,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> Tuned:
    """Tunes on ``{"prompt": [...], "completion": [...], "label": bool}`` rows, towards those
    labelled True, away from the others.

    The reference is the model as it is at the start: the base, or the base with ``adapter``. Both
    labels must occur. Everything else is as in :func:`train_sft`.
    """
    data = list(data)
    checked, examples = rows.unpaired_rows(data), evaluation.example_ids(data)
    return _train(
        settings, checked, trainers.kto_trainer, base, adapter, output, seed, on_step, examples
    )


def _train(
    settings: Any,
    data: Sequence[dict[str, Any]],
    make_trainer: Callable[..., Any],
    base: str,
    adapter: Path | None,
    output: Path,
    seed: int,
    on_step: OnStep | None,
    examples: Sequence[Any] | None = None,
    cache: Path | None = None,
) -> Tuned:
    started = time.monotonic()
    reporting.check(settings.report_to)
    folder, output = weights.locate(base), Path(output)
    start = _start(folder, adapter)
    split = evaluation.split(data, settings.held_out, seed, examples)
    steps, history, evaluating = settings.steps(len(split.kept)), [], None
    per_epoch = len(split.kept) / settings.step_rows
    callbacks = [step_callback(on_step, history, per_epoch)]
    with _surroundings(settings, output) as (work, memory):
        # All rows go through the trainer's tokenisation; the steps are of those that are kept.
        trainer = make_trainer(
            settings.model_copy(update={"max_steps": steps}), data, folder, adapter, work, seed
        )
        reporting.name(trainer.args, output)
        reporting.guard(trainer)
        lengths = trainers.lengths(trainer)
        _check_lengths(lengths, settings.max_length, trainer.model.config)
        adapters.count_trainable(trainer.model)
        if split.held:
            evaluating = evaluation.Evaluation(trainer, settings, split.held, history, per_epoch)
            callbacks.append(evaluating.callback())
            trainer.train_dataset = trainer.train_dataset.select(split.kept)
        order = schedule.order(
            [lengths[index] for index in split.kept], steps, settings.step_rows, seed
        )
        evaluation.log_kl(trainer, order, settings)
        checkpoint = Checkpoint(
            output, _identity(settings, data, start, seed, trainer), settings.save_steps
        )
        callbacks = [checkpoint.callback(trainer, history, evaluating), *callbacks]
        callbacks.append(stalling.callback(trainer, settings.warmup_steps_of(steps)))
        done, references = checkpoint.step * settings.step_rows, cache / start if cache else None
        with checkpoint.given_up_on(TuningError):
            trainers.run(trainer, order, *callbacks, references=references, done=done)
        if evaluating:
            evaluating.finish()
        digest = adapters.save(trainer.model, work, output, folder.name)
        checkpoint.delete()
        trainers.release(trainer)
    del trainer
    weights.return_memory()
    return Tuned(
        path=output,
        adapter_hash=digest,
        base_id=f"{folder.name}@{start.split('-')[0]}",
        history=history,
        seconds=checkpoint.seconds + time.monotonic() - started,
        tokens=int(max((record.get("num_tokens", 0) for record in history), default=0)),
        trained_rows=int(history[-1]["step"]) * settings.step_rows,
        peak_memory_bytes=memory.peak_bytes,
        settings=settings.model_dump(mode="json"),
        best_step=evaluating.best_step if evaluating else None,
        stopped_early=bool(evaluating and evaluating.stopped_early),
    )


@contextmanager
def _surroundings(settings: Any, output: Path) -> Iterator[tuple[Path, PeakMemory]]:
    """A folder to work in, and the memory that is taken; nothing is printed, random generators are
    ours, and logs have a place."""
    with (
        adapters.workplace(output) as work,
        PeakMemory() as memory,
        trainers.quiet(),
        trainers.own_random_state(),
        reporting.places(settings.report_to, output),
    ):
        yield work, memory


def _start(folder: Path, adapter: Path | None) -> str:
    """The weights that training starts from: hashes of the base and of the adapter,
    "5f2c09a1b3de-new" without one."""
    return f"{weights.folder_hash(folder)}-{lora.identify(Path(adapter), folder) if adapter else 'new'}"


def _identity(
    settings: Any, data: Sequence[dict[str, Any]], start: str, seed: int, trainer: Any
) -> dict[str, Any]:
    """What the trained adapter depends on; ``bf16`` is what precision "auto" has become on this
    machine."""
    return {
        "kind": type(settings).__name__,
        "settings": settings.model_dump(mode="json", exclude={"save_steps", "report_to"}),
        "rows": data,
        "start": start,
        "seed": seed,
        "bf16": bool(trainer.args.bf16),
    }


def _check_lengths(lengths: Sequence[int], allowed: int | None, config: Any) -> None:
    """A row that is too long is named, never cut or left out silently, which is what TRL would
    do."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    limit = min(limit for limit in (allowed, context, 1 << 40) if limit)
    long = [index for index, length in enumerate(lengths) if length > limit]
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
