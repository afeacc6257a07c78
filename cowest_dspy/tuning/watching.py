"""Watching a training while it runs: peak memory, progress, and a stop when the loss is no
number."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

from cowest_dspy.errors import TuningError

OnStep = Callable[[int, int, dict[str, float]], None]
"""Called with (step, total, logs): once with no logs when training begins, then after each
optimiser step.

The first step is 0, or that of the checkpoint from which training goes on.

An exception that it raises stops the training and comes out of it.
"""


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


def step_callback(
    on_step: OnStep | None, history: list[dict[str, float]], batches_per_epoch: float
) -> Any:
    """A ``transformers.TrainerCallback`` that fills ``history``, tells ``on_step``, and stops a
    training that diverges."""
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if on_step:
                on_step(state.global_step, state.max_steps, {})

        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
        ) -> None:
            if not logs or "loss" not in logs:
                return
            record = {
                key: float(value) for key, value in logs.items() if isinstance(value, (int, float))
            }
            record |= {"step": state.global_step, "epoch": state.global_step / batches_per_epoch}
            history.append(record)
            _check_finite(record)
            if on_step:
                on_step(state.global_step, state.max_steps, record)

    return Steps()


def _check_finite(record: dict[str, float]) -> None:
    for key in ("loss", "grad_norm"):
        if not math.isfinite(record.get(key, 0.0)):
            raise TuningError(
                f"Training diverged at step {record['step']}: {key} is {record[key]} "
                f"at learning rate {record.get('learning_rate')}. "
                'Lower learning_rate, raise warmup, or set precision = "fp32".'
            )
