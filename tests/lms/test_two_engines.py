"""Weak and strong model are loaded in one process, and often at the same moment."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tiny import make_tiny_model

from cowest_dspy.lms import LocalEngine
from cowest_dspy.store import serialize


def test_models_that_are_first_asked_at_the_same_moment_load_whole(
    tiny_model: Path, tmp_path: Path
) -> None:
    folders = [make_tiny_model(tmp_path / f"model-{seed}", seed=seed) for seed in range(4)]

    def ask(engine: LocalEngine) -> str:
        return serialize.response_text(
            engine.complete(
                serialize.request_from_messages(
                    engine.model_id, [{"role": "user", "content": "hi"}], max_tokens=8
                )
            )
        )

    one_by_one = [ask(LocalEngine(folder, dtype="float32")) for folder in folders]
    with ThreadPoolExecutor(4) as pool:
        at_once = list(pool.map(ask, [LocalEngine(folder, dtype="float32") for folder in folders]))
    assert at_once == one_by_one and len(set(at_once)) > 1
