"""Where a training's logs go besides its result: TensorBoard, MLflow, W&B, trackio; on this machine
unless told otherwise."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from cowest_dspy.errors import TuningError, masked

# The environment variable that says where each of them writes, and what is said in the folder of
# the logs.
_PLACES = {
    "mlflow": ("MLFLOW_TRACKING_URI", "sqlite:///{}/mlflow.db"),
    "tensorboard": ("TENSORBOARD_LOGGING_DIR", "{}/tensorboard"),
    "trackio": ("TRACKIO_DIR", "{}/trackio"),
    "wandb": ("WANDB_DIR", "{}"),
}


_logger = logging.getLogger(__name__)
_called: ContextVar[tuple[str, str] | None] = ContextVar("called", default=None)


@contextmanager
def called(names: tuple[str, str] | None) -> Iterator[None]:
    """A context in which trainings report as this project and this run; None: as their output's
    folder is called."""
    token = _called.set(names)
    try:
        yield
    finally:
        _called.reset(token)


def name(arguments: Any, output: Path) -> None:
    """Names the run of a trainer's arguments."""
    names = _called.get()
    arguments.run_name = output.name
    if names is not None:
        arguments.project, arguments.run_name = names


def guard(trainer: Any) -> None:
    """Has the training go on when a place of its logs fails: what it raises is logged once, and it
    is told no more.

    Logs are not worth a training: MLflow, for one, raises at its end when its server is gone,
    before the adapter is saved.
    """
    from transformers import TrainerCallback
    from transformers.integrations import integration_utils

    known = tuple(integration_utils.INTEGRATION_TO_CALLBACK.values())

    class Guarded(TrainerCallback):
        def __init__(self, inner: Any) -> None:
            self.inner, self.failed = inner, False

        def __getattribute__(self, event: str) -> Any:
            own = object.__getattribute__(self, event)
            return _surviving(self, own, event) if event.startswith("on_") else own

    handler = trainer.callback_handler
    handler.callbacks = [
        Guarded(one) if isinstance(one, known) else one for one in handler.callbacks
    ]


def _surviving(guarded: Any, own: Any, event: str) -> Any:
    def told(*arguments: Any, **options: Any) -> Any:
        if guarded.failed:
            return None
        try:
            return getattr(guarded.inner, event)(*arguments, **options)
        except Exception as error:
            guarded.failed = True
            place = type(guarded.inner).__name__
            _logger.error(
                "report_to: %s failed, and training goes on without it: %s",
                place,
                masked(f"{error}"),
            )
            return None

    return told


def folder_of(output: Path) -> Path:
    """Where the logs of the training of ``output`` are: ``<output>.logs``, beside it."""
    return output.with_name(f"{output.name}.logs")


def check(report_to: Sequence[str]) -> None:
    """Looks for the packages without importing them.

    Raises:
        TuningError: one is not installed.
    """
    missing = [name for name in report_to if importlib.util.find_spec(name) is None]
    if missing:
        raise TuningError(
            f'report_to has "{missing[0]}", which is not installed. '
            f"Type pip install {' '.join(missing)}, or take it out of report_to."
        )


@contextmanager
def places(report_to: Sequence[str], output: Path) -> Iterator[None]:
    """A context in which each of them writes into :func:`folder_of` the output, or where its
    environment variable has it write.

    A W&B run that begins in it ends with it: otherwise the next training's logs would go into the
    run of this one.

    Raises:
        TuningError: a package is not installed.
    """
    check(report_to)
    folder = folder_of(output.absolute())
    said = {
        name: place.format(folder)
        for name, place in (_PLACES[reporter] for reporter in report_to)
        if name not in os.environ
    }
    if said:
        folder.mkdir(parents=True, exist_ok=True)
    wandb_ran = _wandb_runs()
    os.environ.update(said)
    try:
        yield
    finally:
        for name in said:
            os.environ.pop(name, None)
        if "wandb" in report_to and not wandb_ran and _wandb_runs():
            sys.modules["wandb"].finish()


def _wandb_runs() -> bool:
    return getattr(sys.modules.get("wandb"), "run", None) is not None
