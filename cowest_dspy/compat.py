"""Every reach into private names of other libraries, each with the version that it was read in.

tests/test_compat.py tells when one of them is gone.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import dspy


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


def count_mipro_trials(predictors: int, zero_shot: bool, candidates: int) -> int:
    """The trials of ``dspy.MIPROv2(auto=...)`` for a program with so many predictors.

    DSPy 3.4.1, ``MIPROv2._set_num_trials_from_num_candidates``: it looks at the number of the
    program's predictors only.
    """
    program = SimpleNamespace(predictors=lambda: range(predictors))
    find: Any = dspy.MIPROv2._set_num_trials_from_num_candidates
    return find(None, program, zero_shot, candidates)
