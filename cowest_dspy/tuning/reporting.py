"""Where a training's logs go besides its result: TensorBoard, MLflow, W&B, trackio; on this machine unless told otherwise."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cowest_dspy.errors import TuningError

# The environment variable that says where each of them writes, and what is said in the folder of the logs.
_PLACES = {
    "mlflow": ("MLFLOW_TRACKING_URI", "sqlite:///{}/mlflow.db"),
    "tensorboard": ("TENSORBOARD_LOGGING_DIR", "{}/tensorboard"),
    "trackio": ("TRACKIO_DIR", "{}/trackio"),
    "wandb": ("WANDB_DIR", "{}"),
}


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
    """A context in which each of them writes into :func:`folder_of` the output, or where its environment variable has it write.

    A W&B run that begins in it ends with it: otherwise the next training's logs would go into the run of this one.

    Raises:
        TuningError: a package is not installed.
    """
    check(report_to)
    folder = folder_of(output.absolute())
    said = {name: place.format(folder) for name, place in (_PLACES[reporter] for reporter in report_to) if name not in os.environ}
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
