"""A training whose loss does not move is stopped: hours of steps would give the adapter that it
began with."""

from __future__ import annotations

from typing import Any

from cowest_dspy.errors import TuningError
from cowest_dspy.tuning import trainers

AFTER = 20
"""Optimiser steps after the warm-up after which the loss must have moved; a shorter training is not
checked."""
LEAST = 1e-4
"""The part of its value by which the loss must have changed, up or down."""
LEARNT = 1e-2
"""A loss that is this low at the start has nowhere to go: it is not checked."""


def callback(trainer: Any, warmup_steps: int) -> Any:
    """A ``transformers.TrainerCallback`` that compares the loss of the same rows before the first
    step and after some.

    The rows are those of the first forward pass, so that it is not confused by batches that differ,
    and costs two passes without gradients. ``AFTER`` steps after the warm-up the loss must have
    changed by ``LEAST`` of its value. Honest trainings change it far more (a model of two layers:
    DPO at 3e-4 by 0.9 of it, at 1e-5 by 0.07; SFT by 0.1 and 0.004); what does not is one with a
    learning rate that is a mistake, with a gradient of 0, or with rows that contradict each other.
    A training that goes on from a checkpoint was checked before, or is too far on to be.

    Raises:
        TuningError: out of the training, when the loss has not moved.
    """
    from transformers import TrainerCallback

    class Stalling(TrainerCallback):
        def __init__(self) -> None:
            self.before: float | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 0 and state.max_steps >= warmup_steps + AFTER:
                self.before = _loss(trainer)

        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
        ) -> None:
            if (
                self.before is None
                or state.global_step != warmup_steps + AFTER
                or not logs
                or "loss" not in logs
            ):
                return
            before, after = self.before, _loss(trainer)
            if abs(before) > LEARNT and abs(after - before) <= LEAST * abs(before):
                raise TuningError(
                    f"The loss does not move: of the rows of the first batch it was {before:.6f}, "
                    f"and after {state.global_step} "
                    f"steps it is {after:.6f}. Raise learning_rate ({args.learning_rate:g}; an "
                    "adapter takes 1e-4 to 1e-3, more "
                    "than full fine-tuning), or see whether the rows contradict each other."
                )

    return Stalling()


def _loss(trainer: Any) -> float:
    """The loss of the first forward pass's rows with the weights as they are; nothing of the
    training is changed by it."""
    data, model = trainer.train_dataset, trainer.model
    batch = trainer._prepare_inputs(
        trainer.data_collator(
            [data[row] for row in range(trainer.args.per_device_train_batch_size)]
        )
    )
    training = model.training
    model.eval()
    try:
        with trainers.own_random_state():
            if "label" in data.column_names:
                trainer.estimate([batch])
            loss, _, _ = trainer.prediction_step(model, batch, prediction_loss_only=True)
    finally:
        model.train(training)
        trainer._metrics["eval"].clear()
    return float(loss)
