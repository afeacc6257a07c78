"""Trainings by several processes, and that none of them is left."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import toy
import toy_experiment
from tuning_rows import LORA, quick, sft_rows

from cowest_dspy.tuning import SFT, launch

OF_PASSES = ("logits/", "entropy", "mean_token_accuracy")
"""What TRL logs as averages over the tokens of those forward passes that run at once, so that two
processes have other ones."""


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No process that a test has started is there after it: launchers, and trainers in sessions of
    their own."""
    yield
    deadline = time.monotonic() + 5
    while left() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left() == []


def left() -> list[list[str]]:
    """The command lines of the processes that train for this one."""
    return [process.cmdline() for process in trainers()]


def trainers() -> list[psutil.Process]:
    """The processes that this one has started, known by the mark in their environment: launchers
    and those that they started."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
            ours = process.environ().get("COWEST_TEST") == str(os.getpid())
            if (
                ours
                and "cowest_dspy.tuning.launch" in command
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture(autouse=True)
def marked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is started here inherits a mark, so that no one else's processes are taken for ours."""
    monkeypatch.setenv("COWEST_TEST", str(os.getpid()))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def compared(record: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in record.items() if not name.startswith(OF_PASSES)}


def launched(base: Path, output: Path, **changes: Any) -> Any:
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    settings = {"num_train_epochs": 500, "lora": LORA, **parts, **changes.pop("settings", {})}
    return launch(SFT(**quick(**settings)), sft_rows(), 2, base=str(base), output=output, **changes)


@pytest.fixture
def task(tmp_path: Path, tiny_model: Path) -> list[str]:
    """The toy task of toy_experiment.py as the command line takes it."""
    (tmp_path / "toy.py").write_text(toy_experiment.RECIPE)
    (tmp_path / "toy.toml").write_text(toy_experiment.TASK)
    weak = f'[weak]\nkind = "in_process"\nmodel = "{tiny_model}"\nmax_tokens = 12\n'
    (tmp_path / "backend.toml").write_text(weak + toy.engine("strong"))
    return [
        str(tmp_path / "toy.toml"),
        str(tmp_path / "backend.toml"),
        "--run",
        str(tmp_path / "run"),
    ]
