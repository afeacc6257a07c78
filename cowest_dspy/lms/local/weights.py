"""Folders of weights and adapters: load them, check them, and name them by their content.

A model's id contains a hash of its weights, so that nothing that was drafted, measured or computed
with other weights can be mistaken for its work. One changed tensor under the same path, and the id
is another.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import hashlib
import json
import math
import os
import re
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cowest_dspy.compat import hub_errors
from cowest_dspy.errors import ModelError, nearest
from cowest_dspy.utils.extras import check_extra
from cowest_dspy.utils.files import file_sha256, workplace
from cowest_dspy.utils.reading import parse_json

WEIGHTS = ("*.safetensors",)
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MEANING = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
HASH_LENGTH = 12
_GGUF = b"GGUF"
# What ends a turn in the chat formats of today's small models; a GGUF file names one of them.
_TURN_ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")
UNREADABLE_GGUF = (
    struct.error,
    ValueError,
    LookupError,
    OverflowError,
    MemoryError,
    NotImplementedError,
    OSError,
)
"""What the readers of GGUF files raise on one that is cut short, garbled, or of a kind of
quantisation that they do not know."""
_loading = threading.RLock()


def folder_hash(folder: Path) -> str:
    """The first 12 hexadecimal digits of the SHA-256 over weights, configuration, tokenizer and
    chat template of a folder."""
    names = sorted(
        {path.name for pattern in WEIGHTS for path in folder.glob(pattern)}
        | {n for n in MEANING if (folder / n).is_file()}
    )
    digest = hashlib.sha256()
    for name in names:
        with (folder / name).open("rb") as file:
            digest.update(name.encode())
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:HASH_LENGTH]


def locate(model: str) -> Path:
    """The folder of ``model``: itself when it is a folder; of a GGUF file the folder that it is
    turned into, once; otherwise the snapshot of that Hub id (downloaded when needed).

    Raises:
        ModelError: no such folder, a folder without ``config.json`` or weights, a GGUF file that
            cannot be read, or a Hub id that cannot be had.
    """
    folder = Path(model).expanduser()
    if folder.is_file() or folder.suffix == ".gguf":
        return _from_gguf(folder)
    if folder.is_dir():
        _check_folder(folder)
        return folder.resolve()
    if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise ModelError(
            f"There is no model folder {model}. Give a folder with config.json and *.safetensors, "
            "a GGUF file, or a Hub id such "
            'as "HuggingFaceTB/SmolLM2-135M-Instruct". `make models` fetches the two of the demo.'
        )
    return _from_hub(model)


def hub_id(folder: Path) -> str | None:
    """The Hub id of a snapshot in the Hub's cache, "OWNER/NAME"; None for any other folder."""
    kind, *name = folder.parent.parent.name.split("--")
    return "/".join(name) if folder.parent.name == "snapshots" and kind == "models" else None


def base_name(folder: Path) -> str:
    """How a model is called elsewhere: by its Hub id, or its folder's name."""
    return hub_id(folder) or folder.name


def cache_folder() -> Path:
    """The folder of converted models: ``COWEST_CACHE``, by default ``~/.cache/cowest_dspy``."""
    return Path(os.environ.get("COWEST_CACHE") or Path.home() / ".cache" / "cowest_dspy")


def _from_gguf(file: Path) -> Path:
    """The folder of a GGUF file, in bfloat16: its quantisation kept less of the weights than
    that."""
    check_gguf(file)
    folder = cache_folder() / "gguf" / f"{file.stem}-{file_sha256(file)[:HASH_LENGTH]}"
    with _loading, workplace(folder) as work:
        if not folder.is_dir():
            convert_gguf(file, work / "model", "bfloat16")
            os.replace(work / "model", folder)
    return folder


def check_gguf(file: Path) -> None:
    """Check that a file is there and begins as a GGUF file.

    Raises:
        ModelError: it is not.
    """
    if not file.is_file():
        raise ModelError(f"There is no GGUF file {file}.")
    with file.open("rb") as opened:
        magic = opened.read(len(_GGUF))
    if magic != _GGUF:
        raise ModelError(
            f"{file} is not a GGUF file: it begins with {magic!r}. Fetch it again; what stands "
            "where a model should be is often an error page or a pointer file."
        )
    check_extra("gguf", f"Reading {file}", ModelError)


def convert_gguf(file: Path, folder: Path, dtype: str) -> None:
    """Write the model in a GGUF file to ``folder`` as ``from_pretrained`` takes it, so that it can
    be loaded, tuned and saved: plain weights in ``dtype``, tokenizer, chat template.

    What the file's quantisation lost stays lost. Peak memory is about twice the written weights.

    Raises:
        ModelError: transformers cannot read the file.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    place: dict[str, Any] = {
        "pretrained_model_name_or_path": str(file.parent),
        "gguf_file": file.name,
    }
    try:
        tokenizer = AutoTokenizer.from_pretrained(**place)
        model: Any = AutoModelForCausalLM.from_pretrained(**place, dtype=dtype)
    except UNREADABLE_GGUF as error:
        raise ModelError(
            f"{file} ({file.stat().st_size:,} bytes) cannot be read: it is damaged, or ends too "
            "early, or transformers does not know its architecture. Fetch it again and compare "
            f"its sha256. The reader said: {error}"
        ) from error
    # The tensors are plain, and the model may be saved and trained again.
    model.hf_quantizer.remove_quantization_config(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    known = tokenizer.get_vocab()
    ends = [tokenizer.eos_token_id, *(known.get(word) for word in _TURN_ENDS)]
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(dict.fromkeys(token for token in ends if token is not None)) or None,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _from_hub(model: str) -> Path:
    from huggingface_hub import snapshot_download

    # Its card says which licence it has.
    wanted = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "README.md"]
    try:
        folder = Path(snapshot_download(model, allow_patterns=wanted))
    except hub_errors() as error:
        raise ModelError(
            f'"{model}" is no folder, and the Hub did not give it: '
            f"{type(error).__name__}.{_near(model)} "
            "Check the id and the network, unset HF_HUB_OFFLINE where it is set, log in with `hf "
            "auth login` if it is gated; "
            "or give a folder, which in a TOML may be relative to it."
        ) from error
    _check_folder(folder)
    return folder


def _near(model: str) -> str:
    """The folder that could have been meant, of those beside it."""
    above = Path(model).parent
    return (
        nearest(model, [str(path) for path in above.iterdir() if path.is_dir()])
        if above.is_dir()
        else ""
    )


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} is no model folder: it has no config.json. A GGUF file is given as the "
            "file itself."
        )
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{folder} has no *.safetensors: save the model with save_pretrained, pickled weights "
            "are not read."
        )


def load_model(
    folder: Path, dtype: str, *, in_floats: Callable[[Any], object] | None = None
) -> Any:
    """The model in ``folder`` for inference, with transformers' usual attention.

    ``dtype``: "auto", "float32", "bfloat16", "float16", or "int8": linear layers in 8-bit integers,
        the rest in float32. ``in_floats`` is called with the model while all of its weights are
        still floats.

    Raises:
        ModelError: "int8" on a GPU.
    """
    import torch
    from transformers import AutoModelForCausalLM

    # For int8 as they are in the file, mapped and not copied: float32 weights would double the peak
    # of memory.
    kind: Any = (
        "auto" if dtype == "int8" else getattr(torch, choose_dtype() if dtype == "auto" else dtype)
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "int8" and device != "cpu":
        raise ModelError('dtype = "int8" is for processors: on this GPU use "auto".')
    with loading():
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=kind)
    # The weights stay mapped from their file, which was read whole when it was hashed: a copy would
    # double the peak of memory.
    model.requires_grad_(False).eval()
    if dtype != "int8":
        fold_linears(model.to(device))
    if in_floats is not None:
        in_floats(model)
    if dtype == "int8":
        from cowest_dspy.lms.local.int8 import quantize

        quantize(model)
        return_memory()
    return model


def fold_linears(model: Any) -> Any:
    """Make every linear layer of ``model`` see its input as a matrix; return ``model``.

    ``torch.nn.functional.linear`` without a bias treats ``[rows, 1, size]`` as a batch of products
    when the strides of the singular axis are unusual, as they are after ``transpose(1, 2)`` in
    attention and after ``[:, -1:]`` before the head: it then copies the weights once per row (seen
    in torch 2.13 on CPU; a head of 150,000 tokens and 64 rows asked for 30 GB).
    """
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.forward = _matrix_product(module)
    return model


def _matrix_product(linear: Any) -> Any:
    from torch.nn.functional import linear as product

    def forward(input: Any) -> Any:
        flat = product(input.reshape(-1, input.shape[-1]), linear.weight, linear.bias)
        return flat.view(*input.shape[:-1], flat.shape[-1])

    return forward


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in ``folder``.

    Raises:
        ModelError: it has no chat template, so chat messages cannot be written in the model's own
            form.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            f"The tokenizer in {folder} has no chat template. Use an instruction-tuned model, or "
            "add chat_template.jinja."
        )
    return tokenizer


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """The ids that end a turn: those of the generation configuration and the tokenizer's own."""
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in [*ids, tokenizer.eos_token_id] if i is not None)


def return_memory() -> None:
    """Return the memory of models that are no longer used to the system, where it takes it
    (glibc).

    A model refers to itself, so that Python alone would free it some time later; and what was
    loaded in one thread would stay reserved for that thread: a second load would stand beside the
    first.
    """
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def choose_dtype() -> str:
    """Choose "bfloat16" where this machine computes faster in it, by what its processor can do;
    otherwise "float32".

    Whether a processor has bfloat16 says little: with AMX, or AVX-512 on AMD, products are more
    than twice as fast in it, with AVX-512 alone on Intel half as fast as in float32 (measured). It
    is not timed: on a busy machine two processes of one run would come to different answers, and so
    to different drafts.
    """
    import torch

    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    return "bfloat16" if fast_in_bfloat16(_cpu_info()) else "float32"


def fast_in_bfloat16(cpu_info: str) -> bool:
    """Whether products are faster in bfloat16 than in float32 on a processor, from the text of
    Linux's /proc/cpuinfo."""
    flags = set(re.findall(r"\b(?:amx_bf16|avx512_bf16)\b", cpu_info))
    return "amx_bf16" in flags or ("avx512_bf16" in flags and "AuthenticAMD" in cpu_info)


@functools.lru_cache(maxsize=1)
def _cpu_info() -> str:
    """Linux's description of its processors; empty elsewhere."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# int8 keeps embeddings and scales in float32 and holds a page of float weights at a time: 3.6 GiB
# were measured at the peak for 1.5 billion parameters.
_BYTES_IN_INT8 = 2.5


def context_length(folder: Path) -> int | None:
    """Tokens of prompt and answer together, as config.json says; None when it does not."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    length = config.get("max_position_embeddings") or config.get("text_config", {}).get(
        "max_position_embeddings"
    )
    return int(length) if length else None


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The tensors that the folder's safetensors hold, each with its shape, from the files'
    headers."""
    return {
        name: tuple(tensor["shape"])
        for file in folder.glob("*.safetensors")
        for name, tensor in _header(file).items()
        if name != "__metadata__"
    }


def count_parameters(folder: Path) -> int:
    """Count the numbers that the folder's safetensors hold."""
    return sum(math.prod(shape) for shape in tensor_shapes(folder).values())


def memory_needed(folder: Path, dtype: str) -> int:
    """About how many bytes the weights take when they are loaded in ``dtype`` ("auto": as this
    machine chooses)."""
    if dtype == "int8":
        return round(count_parameters(folder) * _BYTES_IN_INT8)
    return count_parameters(folder) * _BYTES[choose_dtype() if dtype == "auto" else dtype]


def _header(file: Path) -> dict[str, Any]:
    """A safetensors file begins with the length of a JSON header in 8 bytes, lowest first, and the
    header."""
    with file.open("rb") as opened:
        return json.loads(opened.read(int.from_bytes(opened.read(8), "little")))


def adapter_hash(folder: Path) -> str:
    """The first 12 hexadecimal digits of a SHA-256 over an adapter's tensors (name, type, shape,
    bytes) and what they mean.

    Raises:
        ModelError: the folder holds no PEFT adapter in safetensors, or one that is damaged.
    """
    from safetensors import SafetensorError, safe_open

    config = adapter_config(folder)
    meaning = {
        key: config.get(key)
        for key in ("peft_type", "r", "lora_alpha", "target_modules", "use_rslora", "use_dora")
    }
    # Nothing where they say nothing, as in the adapters of ours, which keep their names.
    meaning |= {
        key: config[key]
        for key in ("alpha_pattern", "fan_in_fan_out", "layers_to_transform")
        if config.get(key)
    }
    if isinstance(meaning["target_modules"], list):
        meaning["target_modules"] = sorted(meaning["target_modules"])
    digest = hashlib.sha256(json.dumps(meaning, sort_keys=True).encode())
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as tensors:
            for name in sorted(tensors.keys()):
                tensor = tensors.get_tensor(name).contiguous()
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.flatten().view(_bytes()).numpy().tobytes())
    except (SafetensorError, OSError) as error:
        raise damaged(folder / ADAPTER_WEIGHTS, error) from error
    return digest.hexdigest()[:HASH_LENGTH]


def adapter_config(folder: Path) -> dict[str, Any]:
    """Read the adapter_config.json of a PEFT adapter.

    Raises:
        ModelError: the folder holds no adapter, or its configuration is damaged.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file() or not (folder / ADAPTER_WEIGHTS).is_file():
        raise ModelError(
            f"{folder} holds no adapter: {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS} were expected."
        )
    try:
        config: Any = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise damaged(path, error) from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise damaged(path, "it is no object with a peft_type")
    modules = config.get("target_modules")
    if isinstance(modules, list) and not all(isinstance(name, str) for name in modules):
        raise damaged(path, "target_modules are no names")
    return config


def damaged(file: Path, why: object) -> ModelError:
    """The error for a file of an adapter that cannot be read."""
    return ModelError(
        f"{file} is damaged: {first_line(why)}. Copy the adapter here again, or train it again."
    )


def first_line(error: object, most: int = 200) -> str:
    """The message of an error of another library, in one line and without its last full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:most].rstrip(". ")


def _bytes() -> Any:
    import torch

    return torch.uint8


class loading:
    """A context for ``from_pretrained``: one model at a time, and no progress bar of transformers'
    own.

    Two loads at once disturb each other: transformers keeps what it is doing (initialising, tying
    weights) in global state.
    """

    def __enter__(self) -> None:
        from transformers.utils import logging

        _loading.acquire()
        self._was = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging

        if self._was:
            logging.enable_progress_bar()
        _loading.release()
