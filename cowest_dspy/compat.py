"""Every reach into private names of other libraries, each with the version that it was read in.

tests/test_compat.py tells when one of them is gone.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def compact_lm_head() -> Iterator[None]:
    """A context in which TRL projects only tokens that carry loss onto the vocabulary, on CPUs as
    on GPUs. The loss is the same.

    TRL 1.16, ``trl.trainer.utils._use_triton``: it does so where Triton runs and otherwise projects
    the prompts, too, and throws the result away: a third of a small model's time.
    """
    utils: Any = importlib.import_module("trl.trainer.utils")
    original = getattr(utils, "_use_triton", None)
    if original is None:
        yield
        return
    utils._use_triton = lambda device: True
    try:
        yield
    finally:
        utils._use_triton = original


def fsdp_is_on() -> bool:
    """Whether ``accelerate launch`` has turned FSDP on for this process.

    Accelerate 1.15, the variable ``ACCELERATE_USE_FSDP``: needed before the trainer, which knows
    it, is made.
    """
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")
