"""Law 6: identity is content: one changed tensor under the same path, and everything misses."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from engine_parts import SHOTS, SYSTEM, adapter, ask_all, engine, generated, prompts  # noqa: F401 - fixtures
from scripted import match, questions, strong_that_reads, together, weak_that_varies
from tiny import make_adapter
from tuning_fixtures import modules_are_no_garbage  # noqa: F401 - fixtures
from tuning_rows import read

from cowest_dspy.influence.collection import collect
from cowest_dspy.influence.trace import Sampling
from cowest_dspy.lms.local.weights import adapter_hash, folder_hash
from cowest_dspy.store.store import Store


def test_law_6_another_model_id_misses_the_store(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        for model in ("local/weak@aaaa", "local/weak@bbbb"):
            weak = weak_that_varies(["x", "y"])
            weak.model = model
            collect(
                together(weak, strong_that_reads()),
                questions(2),
                match,
                Sampling(drafts=2),
                store=store,
            )
            assert len(weak.asked) == 4


def test_law_6_one_changed_tensor_is_another_model(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copied = shutil.copytree(tiny_model, tmp_path / "copy")
    assert folder_hash(copied) == folder_hash(tiny_model)
    tensors = load_file(copied / "model.safetensors")
    name = sorted(tensors)[0]
    tensors[name][0, 0] += 1e-3
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    assert folder_hash(copied) != folder_hash(tiny_model)


def test_law_6_another_adapter_is_another_id(tiny_model: Path, tmp_path: Path) -> None:
    one, two = (
        adapter_hash(make_adapter(tiny_model, tmp_path / str(seed), seed)) for seed in (1, 2)
    )
    assert one != two


def test_law_6_one_changed_tensor_is_another_adapter(first_sft: Any, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    changed = tmp_path / "changed"
    changed.mkdir()
    (changed / "adapter_config.json").write_bytes(
        (first_sft.path / "adapter_config.json").read_bytes()
    )
    tensors = read(first_sft.path)
    save_file(
        dict(reversed(tensors.items())),
        changed / "adapter_model.safetensors",
        metadata={"format": "pt", "note": "other layout"},
    )
    assert adapter_hash(changed) == first_sft.adapter_hash
    tensors[next(iter(tensors))].view(-1)[0] += 1e-6
    save_file(tensors, changed / "adapter_model.safetensors")
    assert adapter_hash(changed) != first_sft.adapter_hash
