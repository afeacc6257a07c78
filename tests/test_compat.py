"""Private names of other libraries that the library reaches into are there, and do what it takes
them for."""

from __future__ import annotations

import importlib
import os
from typing import Any

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


def test_accelerate_reads_the_variable_that_turns_fsdp_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import inspect

    from accelerate import state

    assert "ACCELERATE_USE_FSDP" in inspect.getsource(state)
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    assert not compat.fsdp_is_on()
    monkeypatch.setitem(os.environ, "ACCELERATE_USE_FSDP", "true")
    assert compat.fsdp_is_on()
