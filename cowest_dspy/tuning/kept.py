"""Tensors and plain facts in one safetensors file: written whole or not at all, and read only if
every bit is as it was written.

    keep(path, {"logps": tensor}, {"rows": 61})
    kept(path)        # ({"logps": tensor}, {"rows": 61}); None if there is no such file, or it was
                      damaged

Nothing is pickled. Numbers in the facts come back with the same bits: JSON has as many digits of a
float as it takes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cowest_dspy.utils.files import discard_of_ended


def keep(path: Path, tensors: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Writes ``tensors`` (at least one, on any device) and ``facts`` (JSON-able) to ``path``, in
    place of what was there.

    What processes have left that were killed while they wrote to the same path goes.
    """
    from safetensors.torch import save_file

    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    written = json.dumps(facts)
    path.parent.mkdir(parents=True, exist_ok=True)
    discard_of_ended(path.parent, re.compile(rf"{re.escape(path.name)}\.(\d+)\.partial"))
    # A folder, since safetensors puts a file with a name of its own choice beside the one it is
    # told (0.8); and the process's number, so that two writers do not write into one file.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.mkdir(exist_ok=True)
    try:
        save_file(
            on_cpu,
            partial / path.name,
            metadata={"facts": written, "sha256": _digest(on_cpu, written)},
        )
        with (partial / path.name).open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial / path.name, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def kept(path: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Tensors, on the CPU, and facts of a file that :func:`keep` wrote; None when it is missing,
    cut short, or changed."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            noted = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the file is no mapping
    except (SafetensorError, OSError):
        return None
    if noted.get("sha256") != _digest(tensors, noted.get("facts", "")):
        return None
    return tensors, json.loads(noted["facts"])


def _digest(tensors: Mapping[str, Any], facts: str) -> str:
    import torch

    digest = hashlib.sha256(facts.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
