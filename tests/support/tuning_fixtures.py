"""A fixture that the tests of tuning share: import it by name."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def modules_are_no_garbage() -> Iterator[None]:
    """Every training collects garbage twice; with TRL's modules set aside that takes no time."""
    for name in ("dpo_trainer", "kto_trainer", "sft_trainer"):
        importlib.import_module(f"trl.trainer.{name}")
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
