"""What a model folder says of itself before it is loaded: its context, and about how much memory
its weights will take."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from cowest_dspy.lms.local.weights import choose_dtype

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# int8 keeps embeddings and scales in float32 and holds a page of float weights at a time: 3.6 GiB
# were measured at the peak for 1.5 billion parameters.
BYTES_IN_INT8 = 2.5


def context_length(folder: Path) -> int | None:
    """Tokens of prompt and answer together, as config.json says; None when it does not."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    length = config.get("max_position_embeddings") or config.get("text_config", {}).get(
        "max_position_embeddings"
    )
    return int(length) if length else None


def tensors(folder: Path) -> dict[str, tuple[int, ...]]:
    """The tensors that the folder's safetensors hold, each with its shape, from the files'
    headers."""
    return {
        name: tuple(tensor["shape"])
        for file in folder.glob("*.safetensors")
        for name, tensor in _header(file).items()
        if name != "__metadata__"
    }


def parameters(folder: Path) -> int:
    """How many numbers the folder's safetensors hold."""
    return sum(math.prod(shape) for shape in tensors(folder).values())


def memory_needed(folder: Path, dtype: str) -> int:
    """About how many bytes the weights take when they are loaded in ``dtype`` ("auto": as this
    machine chooses)."""
    if dtype == "int8":
        return round(parameters(folder) * BYTES_IN_INT8)
    return parameters(folder) * BYTES[choose_dtype() if dtype == "auto" else dtype]


def _header(file: Path) -> dict[str, Any]:
    """A safetensors file begins with the length of a JSON header in 8 bytes, lowest first, and the
    header."""
    with file.open("rb") as opened:
        return json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
