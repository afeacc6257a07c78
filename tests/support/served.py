"""Real servers for tests, as engines: llama.cpp's and vLLM's with SmolLM2 in bfloat16, started when
first asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cowest_dspy.lms import ServerEngine
from cowest_dspy.lms.config import Server

SMOL = "SmolLM2-135M-Instruct"
LLAMA_SERVER = Path(__file__).with_name("llama_server.py")
CONTEXT = 1024
"""Tokens that a prompt and its answer may have together."""


def llama_cpp_engine(
    models: Path, *, parallel: int = 4, threads: int = 1, context: int = CONTEXT
) -> ServerEngine:
    """An engine on a server of llama.cpp that has the weak model of the demo; close() stops it. One
    thread: others may be busy."""
    pytest.importorskip("xllamacpp")
    file = models / f"{SMOL}.BF16.gguf"
    if not file.is_file():
        pytest.skip(f"models/ lacks {file.name}: make models")
    command = ["{python}", str(LLAMA_SERVER), "--model", str(file), "--port", "{port}"]
    command += [
        "--parallel",
        str(parallel),
        "--ctx-size",
        str(parallel * context),
        "--threads",
        str(threads),
    ]
    settings = Server(
        kind="server",
        server="llama_cpp",
        model=f"{SMOL}.BF16",
        command=tuple(command),
        weights=str(models / SMOL),
        startup=120,
        concurrency=32,
    )  # pyright: ignore[reportCallIssue] - pydantic's defaults
    return ServerEngine(settings)


def vllm_engine(models: Path, log: Path) -> ServerEngine:
    """The same for vLLM on the CPU, where `make vllm` has installed it."""
    program = models.parent / ".venv-vllm/bin/python"
    if not program.is_file():
        pytest.skip("vLLM is not installed: make vllm")
    environment = ["env", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True", "VLLM_CPU_KVCACHE_SPACE=1"]
    command = [
        *environment,
        str(program),
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--host",
        "127.0.0.1",
        "--port",
        "{port}",
    ]
    command += ["--model", str(models / SMOL), "--served-model-name", SMOL, "--dtype", "bfloat16"]
    command += ["--max-model-len", str(CONTEXT), "--max-num-seqs", "32"]
    command += ["--enable-lora", "--max-lora-rank", "8", "--max-loras", "2"]
    settings = Server(
        kind="server",
        server="vllm",
        model=SMOL,
        command=tuple(command),
        weights=str(models / SMOL),
        startup=400,
        concurrency=32,
        log=str(log),
    )  # pyright: ignore[reportCallIssue] - pydantic's defaults
    return ServerEngine(settings)


def make_mild_adapter(base: Path, folder: Path, seed: int) -> Path:
    """A LoRA adapter with random weights, small enough that a real model still speaks, large enough
    that it speaks otherwise."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(
            r=4,
            lora_alpha=2,
            target_modules="all-linear",
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
        model: Any = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config
        )
    model.save_pretrained(folder)
    return folder
