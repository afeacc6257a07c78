"""Private names of other libraries that the library reaches into are there, and do what it takes
them for."""

from __future__ import annotations

import importlib
from typing import Any

import dspy
import pytest

from cowest_dspy import compat


def test_trl_looks_up_use_triton_when_it_projects_onto_the_vocabulary() -> None:
    utils: Any = importlib.import_module("trl.trainer.utils")
    original = utils._use_triton
    assert "_use_triton" in utils.add_fused_lm_head.__code__.co_names or any(
        "_use_triton" in getattr(one, "co_names", ())
        for one in utils.add_fused_lm_head.__code__.co_consts
    )
    with pytest.raises(KeyError), compat.compact_lm_head():  # noqa: PT012
        assert utils._use_triton is not original and utils._use_triton("cpu")
        raise KeyError
    assert utils._use_triton is original


@pytest.mark.parametrize("zero_shot", [True, False])
def test_miprov2_looks_at_the_number_of_predictors_for_its_trials(zero_shot: bool) -> None:
    program = dspy.ChainOfThought("question -> answer")
    lm = dspy.utils.DummyLM([])
    optimizer: Any = dspy.MIPROv2(metric=lambda *_: 1.0, prompt_model=lm, task_model=lm)
    found = optimizer._set_num_trials_from_num_candidates(program, zero_shot, 6)
    assert compat.count_mipro_trials(1, zero_shot, 6) == found > 0
