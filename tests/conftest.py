"""What holds for every test: no network, one torch thread, no cache shared with the user's own work."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

MODELS = Path(__file__).parents[1] / "models"

# Before anything imports torch, transformers or dspy. One thread: tiny models are faster so, and results repeat.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["DSPY_CACHEDIR"] = tempfile.mkdtemp(prefix="cowest-test-cache-")
os.environ.setdefault("COWEST_CACHE", os.environ["DSPY_CACHEDIR"])

# How long an example takes is the machine's affair, and it may be busy.
settings.register_profile("any machine", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def real_models() -> Path:
    """The folder of the demo's two models; a test that asks for it is skipped when they are not there."""
    missing = [name for name in ("SmolLM2-135M-Instruct", "Qwen2.5-Coder-1.5B-Instruct") if not (MODELS / name).is_dir()]
    if missing:
        pytest.skip(f"models/ lacks {' and '.join(missing)}: make models")
    return MODELS


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a real model of two layers (tiny.py). Who asks for it uses torch, which gets one thread."""
    import torch
    from tiny import make_tiny_model

    torch.set_num_threads(1)
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: of two processes that take file after file, none is left with the longest at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="module")
def first_sft(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A short SFT of the tiny model, to go on from: a ``cowest_dspy.tuning.Tuned``."""
    from tuning_rows import LORA, quick, sft_rows

    from cowest_dspy.tuning import SFT, train_sft

    settings = SFT(**quick(epochs=4), lora=LORA)
    return train_sft(settings, sft_rows(), base=str(tiny_model), output=tmp_path_factory.mktemp("sft") / "first", seed=3)
