"""A GGUF file -> an ordinary Hugging Face folder that can be loaded, trained and saved; or a GGUF
of plain BF16 weights.

A GGUF holds quantised weights, the tokenizer and the chat template in one file. Tuning needs plain
tensors, so the file is turned, once, into a folder that ``from_pretrained`` takes like any other;
and a server of llama.cpp that is to speak with the same weights gets them as BF16. The weights are
those of the quantised file: what its quantisation lost stays lost.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cowest_dspy.errors import ModelError

MAGIC = b"GGUF"
DTYPES = ("float32", "bfloat16", "float16")
SOURCE = "source.json"
_BLOCK = 1 << 20
# What ends a turn in the chat formats of today's small models. A GGUF names one end token only.
_TURN_ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")
# What the reader raises, as seen, on files that are cut short or garbled; it has no error of its
# own. NotImplementedError is its answer to a kind of quantisation that it does not know.
_UNREADABLE = (
    struct.error,
    ValueError,
    KeyError,
    IndexError,
    OverflowError,
    MemoryError,
    NotImplementedError,
    OSError,
)


def dequantize(gguf: Path, folder: Path, dtype: str = "float32") -> Path:
    """Write the model in ``gguf`` to the new ``folder`` and give that folder back.

    The folder holds config, ``dtype`` weights (safetensors), tokenizer with chat template, a
    generation config that stops at every end-of-turn token of the vocabulary, and ``source.json``
    (see :func:`source`). It appears complete or not at all. Peak memory is about twice the size of
    the weights in ``dtype`` (1.5 billion parameters in
    bfloat16: 5.7 GB).

    Args:
        gguf: one whole GGUF file, of an architecture that transformers can read.
        folder: where to; must not exist or be empty.
        dtype: of the written weights: float32 (to train on a CPU), bfloat16 or float16.

    Raises:
        ModelError: the file is missing, not a GGUF, truncated or of an unknown architecture; the
            folder is taken; the dtype is unknown; the package ``gguf`` is not installed.
    """
    gguf, folder = Path(gguf), Path(folder)
    if dtype not in DTYPES:
        raise ModelError(f'dtype "{dtype}" is unknown: write one of {", ".join(DTYPES)}.')
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError(
            f"{folder} exists already. Name a new folder, or delete this one first: rm -r {folder}"
        )
    check(gguf)
    with _appears_whole(folder) as staging:
        _convert(gguf, staging, dtype)
        lineage = {
            "gguf": gguf.name,
            "bytes": gguf.stat().st_size,
            "sha256": sha256(gguf),
            "dtype": dtype,
        }
        (staging / SOURCE).write_text(json.dumps(lineage, indent=2) + "\n", encoding="utf-8")
    return folder


def to_bf16(gguf: Path, target: Path) -> Path:
    """Write the model in ``gguf`` with plain BF16 matrices to the new file ``target``, and give
    that file back.

    Metadata (tokenizer, chat template) are kept; vectors, such as the weights of norms, become
    float32, as llama.cpp's own conversion has them. Why: a server of llama.cpp computes small
    quantised models in 8-bit integers, and a model of 135 million parameters then answers easy
    questions with nonsense; in BF16 it answers as transformers does. The file appears whole or not
    at all.

    Raises:
        ModelError: the file is missing, no GGUF or damaged; the target is taken; the package
            ``gguf`` is not installed.
    """
    gguf, target = Path(gguf), Path(target)
    if target.exists():
        raise ModelError(
            f"{target} exists already. Name a new file, or delete this one first: rm {target}"
        )
    check(gguf)
    _require_package()
    staging = target.with_name(f".{target.name}.partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        _rewrite(gguf, staging)
        staging.rename(target)
    except _UNREADABLE as error:
        raise ModelError(
            f"{gguf} cannot be read: it is damaged or ends too early. Fetch it again. It said: "
            f"{error}"
        ) from error
    finally:
        staging.unlink(missing_ok=True)
    return target


def _rewrite(gguf: Path, target: Path) -> None:
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
    from gguf.quants import dequantize as plain
    from gguf.quants import quantize

    reader = GGUFReader(gguf)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        # These the writer writes itself.
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], inner)
    writer.add_file_type(LlamaFileType.MOSTLY_BF16)
    for tensor in reader.tensors:
        values = plain(tensor.data, tensor.tensor_type).astype(np.float32)
        if values.ndim < 2:
            writer.add_tensor(tensor.name, values)
        else:
            kind = GGMLQuantizationType.BF16
            writer.add_tensor(tensor.name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def source(folder: Path) -> dict[str, Any] | None:
    """Where a folder written by :func:`dequantize` came from (gguf, bytes, sha256, dtype), or None
    for any other folder."""
    file = Path(folder) / SOURCE
    if not file.is_file():
        return None
    try:
        lineage = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(
            f"{file} is damaged. Delete the folder and make it again: rm -r {folder}"
        ) from error
    return lineage if isinstance(lineage, dict) else None


def check(gguf: Path) -> None:
    """See that ``gguf`` is a GGUF file. Whether it is whole shows when it is read, or by its
    :func:`sha256`.

    Raises:
        ModelError: the file is missing or does not begin with ``GGUF``.
    """
    if not gguf.is_file():
        raise ModelError(f"There is no GGUF file {gguf}.")
    with gguf.open("rb") as file:
        magic = file.read(len(MAGIC))
    if magic != MAGIC:
        raise ModelError(
            f"{gguf} is not a GGUF file: it begins with {magic!r}, not with {MAGIC!r}. Delete it "
            "and fetch it again; "
            "what stands where a model should be is often an error page or a pointer file."
        )


def sha256(file: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def _appears_whole(folder: Path) -> Iterator[Path]:
    """A staging folder that takes ``folder``'s name when the block ends well, and is deleted when
    it does not."""
    staging = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        if folder.exists():
            folder.rmdir()
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _require_package() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(
            'Reading GGUF files needs the package gguf: pip install "cowest-dspy[gguf]"'
        )


def _convert(gguf: Path, staging: Path, dtype: str) -> None:
    _require_package()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place: dict[str, Any] = {
        "pretrained_model_name_or_path": str(gguf.parent),
        "gguf_file": gguf.name,
    }
    try:
        tokenizer = AutoTokenizer.from_pretrained(**place)
        quantised = AutoModelForCausalLM.from_pretrained(**place, dtype=dtype)
    except _UNREADABLE as error:
        raise ModelError(
            f"{gguf} ({gguf.stat().st_size:,} bytes) cannot be read: it is damaged, or ends too "
            "early, or transformers "
            "does not know its architecture. Fetch it again and compare its sha256. The reader "
            f"said: {error}"
        ) from error
    model = _washed(quantised)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.generation_config = _generation(tokenizer)
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)


def _washed(quantised: Any) -> Any:
    """The same weights in a model that may be saved and trained; shares the tensors.

    transformers (5.23) marks what came from a GGUF as quantised, and refuses to save or train it
    although its tensors are plain. Goes when ``save_pretrained`` of such a model works.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(quantised.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=quantised.dtype)
    model.load_state_dict(quantised.state_dict(), assign=True, strict=True)
    model.tie_weights()
    return model


def _generation(tokenizer: Any) -> Any:
    """Greedy generation that stops at the tokenizer's end token and at every other end-of-turn
    token that it knows."""
    from transformers import GenerationConfig

    known = tokenizer.get_vocab()
    ends = [tokenizer.eos_token_id, *(known.get(word) for word in _TURN_ENDS)]
    ends = list(dict.fromkeys(token for token in ends if token is not None))
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends or None,
        pad_token_id=tokenizer.pad_token_id,
    )
