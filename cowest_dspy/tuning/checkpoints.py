"""Checkpoints: a training that was killed goes on where it was, and ends with the same bits as one
that nobody has killed.

    checkpoint = Checkpoint(output, {"kind": "dpo", "rows": [...], "seed": 0}, every=None)
    checkpoint.step             # optimiser steps that an earlier process has done: 0, or those of
    its checkpoint checkpoint.callback(trainer, history)

A checkpoint is one safetensors file beside the output: the adapter's weights, the optimiser's
moments, the places of schedule and random generators, the history, and what evaluations have found,
with the best adapter's weights. It is named by everything that the result depends on, so one of
another training is never taken; it is written whole or not at all, and nothing in it is pickled.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import random
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cowest_dspy.tuning.evaluation import Evaluation
from cowest_dspy.tuning.kept import keep, kept
from cowest_dspy.utils import interrupts
from cowest_dspy.utils.files import discard

# Seconds between two checkpoints when no number of steps is asked for: writing one takes far less
# than a hundredth of that.
SECONDS = 60.0
# A training goes on with what it was begun with: another version of these may round otherwise.
LIBRARIES = ("torch", "transformers", "trl", "peft")


class Checkpoint:
    """What is kept of one training, and when.

    Args:
        output: the folder of the adapter that is trained; checkpoints stand beside it.
        identity: JSON-able; everything that decides the result.
        every: optimiser steps between two checkpoints; None: about a minute; 0: none is written,
            and none is read.

    ``step`` is how many optimiser steps have been done already, ``seconds`` how long they took.
    """

    def __init__(self, output: Path, identity: Mapping[str, Any], every: int | None) -> None:
        self._output, self._every = output, every
        self.path = output.with_name(f".{output.name}.{_name(identity)}.checkpoint")
        found = kept(self.path) if every != 0 else None
        self._tensors, self._facts = found or ({}, {})
        self.step: int = self._facts.get("step", 0)
        self.seconds: float = self._facts.get("seconds", 0.0)
        self._started = self._last = time.monotonic()

    def callback(
        self, trainer: Any, history: list[dict[str, float]], evaluating: Evaluation | None = None
    ) -> Any:
        """A ``transformers.TrainerCallback`` that puts the training where it was, and keeps where
        it is; to be added first.

        The trainer's data must be what is left to train on: without the rows of the first ``step``
        batches. ``history`` is filled with the records of these, and ``evaluating`` with what it
        had found.
        """
        from transformers import TrainerCallback

        checkpoint = self

        class Keeping(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if checkpoint.step:
                    checkpoint._restore(trainer, history, evaluating)

            # Here, not at the end of a step: by now the step's record is in the history, and it was
            # evaluated.
            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step == checkpoint.step:
                    # Here, not when training begins: a loader of batches draws a random number when
                    # it is made.
                    if checkpoint.step:
                        _restore_chance(checkpoint._tensors, checkpoint._facts["chance"])
                    checkpoint._tensors = {}
                elif checkpoint._due(state.global_step):
                    checkpoint._keep(trainer, history, evaluating)
                # Ctrl-C waits for the end of the step that is under way, and of what is done with
                # the last one.
                interrupts.check()
                interrupts.postpone()

        return Keeping()

    @contextmanager
    def given_up_on(self, error: type[Exception]) -> Iterator[None]:
        """A context whose end by ``error`` deletes the checkpoints: going on would only fail again.
        Any other keeps them."""
        try:
            yield
        except error:
            self.delete()
            raise

    def delete(self) -> None:
        """Deletes the checkpoints of every training into this output: its adapter is there now, or
        never will be."""
        name = re.compile(
            rf"\.{re.escape(self._output.name)}\.[0-9a-f]{{12}}\.checkpoint(\.\d+\.partial)?"
        )
        for path in self._output.parent.glob(".*"):
            if name.fullmatch(path.name):
                discard(path)

    def _due(self, step: int) -> bool:
        if interrupts.asked_to_stop() and self._every != 0:
            return True
        if self._every is None:
            return time.monotonic() - self._last >= SECONDS
        return self._every > 0 and step % self._every == 0

    def _keep(
        self, trainer: Any, history: list[dict[str, float]], evaluating: Evaluation | None
    ) -> None:
        import torch

        optimizer, scheduler = trainer.optimizer.state_dict(), trainer.lr_scheduler.state_dict()
        tensors = {f"weight.{name}": value for name, value in _trainable(trainer).items()}
        numbers: dict[str, dict[str, Any]] = {}
        for index, state in optimizer["state"].items():
            for name, value in state.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"optimizer.{index}.{name}"] = value
                else:
                    numbers.setdefault(str(index), {})[name] = value
        chance, places = _chance()
        best, found = evaluating.kept() if evaluating else ({}, None)
        tensors |= {f"best.{name}": value for name, value in best.items()}
        facts = {
            "step": trainer.state.global_step,
            "seconds": self.seconds + time.monotonic() - self._started,
            "history": history,
            "tokens": getattr(trainer, "_total_train_tokens", 0),
            "optimizer": {"numbers": numbers, "groups": optimizer["param_groups"]},
            "scheduler": {
                key: scheduler[key] for key in ("base_lrs", "last_epoch", "_step_count", "_last_lr")
            },
            "chance": places,
            "evaluation": found,
        }
        keep(self.path, tensors | chance, facts)
        self._last = time.monotonic()

    def _restore(
        self, trainer: Any, history: list[dict[str, float]], evaluating: Evaluation | None
    ) -> None:
        import torch

        facts = self._facts
        with torch.no_grad():
            for name, parameter in _trainable(trainer).items():
                parameter.copy_(self._tensors[f"weight.{name}"])
        states: dict[int, dict[str, Any]] = {
            int(index): dict(one) for index, one in facts["optimizer"]["numbers"].items()
        }
        for key, value in self._tensors.items():
            kind, index, *name = key.split(".", 2)
            if kind == "optimizer":
                states.setdefault(int(index), {})[name[0]] = value
        trainer.optimizer.load_state_dict(
            {"state": states, "param_groups": facts["optimizer"]["groups"]}
        )
        trainer.lr_scheduler.load_state_dict(trainer.lr_scheduler.state_dict() | facts["scheduler"])
        history[:] = facts["history"]
        if evaluating:
            best = {
                name.removeprefix("best."): value
                for name, value in self._tensors.items()
                if name.startswith("best.")
            }
            evaluating.go_on(best, facts["evaluation"])
        trainer._total_train_tokens = facts["tokens"]
        trainer.state.global_step = self.step
        # Of transformers' Trainer: the loss that it logs is the sum since then, divided by the
        # steps since then.
        trainer._globalstep_last_logged = trainer._initial_global_step = self.step


def _name(identity: Mapping[str, Any]) -> str:
    versions = {library: importlib.metadata.version(library) for library in LIBRARIES}
    text = json.dumps({**identity, "versions": versions}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _trainable(trainer: Any) -> dict[str, Any]:
    return {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}


def _chance() -> tuple[dict[str, Any], dict[str, Any]]:
    """Where the random generators are: torch's as tensors, Python's and NumPy's as JSON."""
    import numpy
    import torch

    tensors = {"chance.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {
            f"chance.cuda.{device}": state
            for device, state in enumerate(torch.cuda.get_rng_state_all())
        }
    python, numbers = random.getstate(), numpy.random.get_state(legacy=False)
    numbers = {
        **numbers,
        "state": {"key": numbers["state"]["key"].tolist(), "pos": numbers["state"]["pos"]},
    }
    return tensors, {"python": python, "numpy": numbers}


def _restore_chance(tensors: Mapping[str, Any], places: Mapping[str, Any]) -> None:
    import numpy
    import torch

    torch.set_rng_state(tensors["chance.cpu"])
    for device in range(torch.cuda.device_count()):
        if f"chance.cuda.{device}" in tensors:
            torch.cuda.set_rng_state(tensors[f"chance.cuda.{device}"], device)
    version, place, gauss = places["python"]
    random.setstate((version, tuple(place), gauss))
    numbers = places["numpy"]
    key = numpy.array(numbers["state"]["key"], dtype=numpy.uint32)
    numpy.random.set_state({**numbers, "state": {**numbers["state"], "key": key}})
