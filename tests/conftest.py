"""What holds for every test: no network, one torch thread, no cache shared with the user's own
work; and what is made once for all.

Tests without the mark `slow` are what `make test` runs; `make test-all` runs every one (README.md
beside this file).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings

MODELS = Path(__file__).parents[1] / "models"

# Before anything imports torch, transformers or dspy. One thread: tiny models are faster so, and
# results repeat.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["DSPY_CACHEDIR"] = tempfile.mkdtemp(prefix="cowest-test-cache-")
os.environ.setdefault("COWEST_CACHE", os.environ["DSPY_CACHEDIR"])

# How long an example takes is the machine's affair, and it may be busy.
settings.register_profile(
    "any machine", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")

MakeOnce = Callable[[str, Callable[[Path], None]], Path]


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> MakeOnce:
    """Give the folder of a name, made by the first process that asks for it; others wait, and
    nobody may change what is in it."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def make_or_wait(name: str, make: Callable[[Path], None]) -> Path:
        folder, whole = root / "once" / name, root / "once" / f"{name}.whole"
        folder.parent.mkdir(exist_ok=True)
        with FileLock(root / "once" / f"{name}.lock"):
            if not whole.exists():
                folder.mkdir()
                make(folder)
                whole.touch()
        return folder

    return make_or_wait


@pytest.fixture(autouse=True)
def no_key_is_known_from_another_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are remembered for the life of a process, and one of another test's could be part of
    this one's text."""
    monkeypatch.setattr("cowest_dspy.utils.masking._known", set())


@pytest.fixture(scope="session")
def real_models() -> Path:
    """The folder of the demo's two models; a test that asks for it is skipped when they are not
    there."""
    missing = [
        name
        for name in ("SmolLM2-135M-Instruct", "Qwen2.5-Coder-1.5B-Instruct")
        if not (MODELS / name).is_dir()
    ]
    if missing:
        pytest.skip(f"models/ lacks {' and '.join(missing)}: make models")
    return MODELS


@pytest.fixture(scope="session")
def tiny_model(make_once: MakeOnce) -> Path:
    """The folder of a real model of two layers (support/tiny.py). Who asks for it uses torch, which
    gets one thread."""
    import torch
    from tiny import make_tiny_model

    torch.set_num_threads(1)
    return make_once("tiny", lambda folder: make_tiny_model(folder) and None)


@pytest.fixture(scope="session")
def first_sft(tiny_model: Path, make_once: MakeOnce) -> Any:
    """A short SFT of the tiny model, to go on from: a ``cowest_dspy.tuning.Tuned``."""
    from tuning_rows import LORA, quick, sft_rows

    from cowest_dspy.tuning import SFT, Tuned, train_adapter

    def make(folder: Path) -> None:
        settings = SFT(**quick(num_train_epochs=4), lora=LORA)
        made = train_adapter(
            settings, sft_rows(), base=str(tiny_model), output=folder / "adapter", seed=3
        )
        (folder / "tuned.json").write_text(json.dumps(asdict(made), default=str))

    record = json.loads((make_once("first_sft", make) / "tuned.json").read_text())
    return Tuned(**{**record, "path": Path(record["path"])})


@pytest.fixture(scope="session")
def finished_toy(tiny_model: Path, make_once: MakeOnce) -> Path:
    """The toy task as files (toy.py, toy.toml, backend.toml), and its finished cycle in `run`: copy
    it to open it."""
    from toy_experiment import finish_toy

    return make_once("finished_toy", lambda folder: finish_toy(folder, tiny_model))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first: of two processes that take test after test, none is left with the longest
    at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
