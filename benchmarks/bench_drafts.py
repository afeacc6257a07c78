"""Sampling drafts: our engine beside what a user would use instead, on the same prompts, weights,
machine and in one run.

    make bench                                          # 64 prompts x 8 drafts of up to 64 tokens
    python benchmarks/bench_drafts.py --prompts 16      # smaller

Beside it stand transformers' `generate`, one call per draft (what one writes first; on
`--one-by-one` drafts only, since it is slow), llama.cpp's server with parallel slots (xllamacpp
from PyPI, a BF16 file of the same weights) and vLLM for the CPU (from `make vllm`; without it the
row says so). Every one runs in a process of its own, which also gives its peak memory. New tokens
are counted, not assumed. Then the engine alone: under 1, 4, 16 and 64 threads, and what a call
through it costs beside calling the model directly. Ratios are what counts: machines differ.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models/SmolLM2-135M-Instruct"
GGUF = ROOT / "models/SmolLM2-135M-Instruct.BF16.gguf"
VLLM = ROOT / ".venv-vllm/bin/python"
NEW_TOKENS = 64
WORDS = 84  # about 200 tokens of prompt

Measured = dict[str, float]


def prompts(count: int) -> list[list[dict[str, str]]]:
    """Distinct prompts of about 200 tokens: words of the project's own README in a random order
    that a seed decides."""
    words, rng = (ROOT / "README.md").read_text(encoding="utf-8").split(), random.Random(0)
    task = {"role": "system", "content": "You write short notes about a text."}
    texts = [" ".join(rng.sample(words, WORDS)) for _ in range(count)]
    return [
        [task, {"role": "user", "content": f"Text: {text}\nWrite two sentences about it."}]
        for text in texts
    ]


def requests(model: str, count: int, drafts: int) -> list[Any]:
    """What is asked: ``drafts`` samples of every prompt."""
    from cowest_dspy.store import serialize

    return [
        serialize.request_from_messages(
            model, messages, max_tokens=NEW_TOKENS, temperature=1.0, seed=seed
        )
        for messages in prompts(count)
        for seed in range(drafts)
    ]


def ask_all(engine: Any, asked: Sequence[Any], threads: int) -> Measured:
    """Asks from ``threads`` threads: seconds, drafts and new tokens."""
    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        answers = list(pool.map(engine.complete, asked))
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "drafts": len(answers),
        "tokens": sum(answer.usage.output_tokens or 0 for answer in answers),
    }


def engine_of(batch: int) -> Any:
    """Our engine, its weights loaded and warm."""
    from cowest_dspy.lms import TransformersEngine
    from cowest_dspy.store import serialize

    engine = TransformersEngine(MODEL, max_batch=batch)
    engine.complete(
        serialize.request_from_messages(
            engine.model_id, [{"role": "user", "content": "Hello"}], max_tokens=4
        )
    )
    return engine


def ours(given: argparse.Namespace) -> Measured:
    """The engine, with everything asked at once."""
    engine = engine_of(given.batch)
    asked = requests(engine.model_id, given.prompts, given.drafts)
    return ask_all(engine, asked, len(asked))


def under_threads(given: argparse.Namespace) -> Measured:
    """The engine's tokens/s when 1, 4, 16, 64 threads ask one request after another."""
    engine = engine_of(given.batch)
    found: Measured = {}
    for threads in (1, 4, 16, 64):
        asked = requests(engine.model_id, max(1, 2 * threads // given.drafts), given.drafts)[
            : max(4, 2 * threads)
        ]
        one = ask_all(engine, asked, threads)
        found[str(threads)] = one["tokens"] / one["seconds"]
    return found


def overhead(given: argparse.Namespace) -> Measured:
    """Milliseconds of a greedy call of 16 tokens: through `dspy.LM` and the engine, and as a batch
    of one without either."""
    from cowest_dspy.lms.local import generate
    from cowest_dspy.lms.local.sampling import Row

    engine = engine_of(given.batch)
    lm, loaded = engine.lm(max_tokens=16), engine._load()
    tokens = engine._tokens([{"role": "user", "content": "Write about the sea."}])[0]

    def median(call: Callable[[], object]) -> float:
        call()
        taken: list[float] = []
        for _ in range(9):
            started = time.perf_counter()
            call()
            taken.append(time.perf_counter() - started)
        return sorted(taken)[4] * 1000

    return {
        "through dspy.LM": median(lambda: lm("Write about the sea.")),
        "directly": median(lambda: generate.run(loaded.begin(), [Row(tokens, 16)])),
    }


def one_by_one(given: argparse.Namespace) -> Measured:
    """`generate`, one call per draft, for the first few drafts."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from cowest_dspy.lms.local.weights import choose_dtype

    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL)
    model: Any = AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=getattr(torch, choose_dtype())
    ).eval()
    seconds, made, asked = 0.0, 0, prompts(given.one_by_one)
    for seed, messages in enumerate(asked):
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        torch.manual_seed(seed)
        started = time.perf_counter()
        out = model.generate(
            **ids, max_new_tokens=NEW_TOKENS, do_sample=True, temperature=1.0, top_k=0
        )
        seconds += time.perf_counter() - started
        made += out.shape[1] - ids["input_ids"].shape[1]
    return {"seconds": seconds, "drafts": len(asked), "tokens": made}


def llama_cpp(given: argparse.Namespace) -> Measured:
    """llama.cpp's server with parallel slots and all cores, asked from as many threads."""
    slots, context = given.slots, 320
    command = [
        "{python}",
        "-m",
        "cowest_dspy.lms.llama_server",
        "--model",
        str(GGUF),
        "--port",
        "{port}",
    ]
    command += ["--parallel", str(slots), "--ctx-size", str(slots * context)]
    return served("llama_cpp", command, given, slots)


def vllm(given: argparse.Namespace) -> Measured:
    """vLLM's server for the CPU in bfloat16, with as many sequences together as our engine has."""
    command = [
        "env",
        "VLLM_CPU_KVCACHE_SPACE=2",
        str(VLLM),
        "-m",
        "vllm.entrypoints.openai.api_server",
    ]
    command += [
        "--host",
        "127.0.0.1",
        "--port",
        "{port}",
        "--model",
        str(MODEL),
        "--served-model-name",
        "smol",
    ]
    command += ["--dtype", "bfloat16", "--max-model-len", "512", "--max-num-seqs", str(given.batch)]
    # A seeded request that is prefilled in parts ends this version for the CPU: so no prompt is.
    command += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "32768"]
    return served("vllm", command, given, given.batch)


def served(server: str, command: list[str], given: argparse.Namespace, threads: int) -> Measured:
    """A server that is started for it, and asked from ``threads`` threads when it is warm."""
    from cowest_dspy.lms import ServerEngine
    from cowest_dspy.lms.config import Server
    from cowest_dspy.store import serialize

    settings: dict[str, Any] = {
        "server": server,
        "model": "smol",
        "command": command,
        "concurrency": threads,
    }
    engine = ServerEngine(Server.model_validate({"kind": "server", **settings}))
    try:
        engine.complete(
            serialize.request_from_messages(
                engine.model_id, [{"role": "user", "content": "Hello"}], max_tokens=4
            )
        )
        return ask_all(engine, requests(engine.model_id, given.prompts, given.drafts), threads)
    finally:
        engine.close()


CANDIDATES = {
    "cowest_dspy engine": ours,
    "generate, one by one": one_by_one,
    "llama.cpp server": llama_cpp,
    "vLLM server": vllm,
    "threads": under_threads,
    "overhead": overhead,
}


def apart(name: str, arguments: list[str]) -> Measured | None:
    """Measures one candidate in a process of its own; None when it could not be run, and why on
    stderr."""
    done = subprocess.run(
        [sys.executable, __file__, "--only", name, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--drafts", type=int, default=8)
    parser.add_argument(
        "--batch",
        type=int,
        default=128,
        help="sequences that the engine computes together, at most",
    )
    parser.add_argument(
        "--slots", type=int, default=16, help="parallel slots of llama.cpp's server"
    )
    parser.add_argument(
        "--one-by-one", type=int, default=12, help="drafts that generate is timed on"
    )
    parser.add_argument("--only", choices=CANDIDATES, help="measure one, print JSON")
    given = parser.parse_args()
    if not MODEL.is_dir():
        raise SystemExit(f"{MODEL} is missing: make models")
    if given.only:
        found = CANDIDATES[given.only](given)
        peak = max(
            resource.getrusage(who).ru_maxrss
            for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        )
        print(json.dumps({**found, "peak": peak / 2**20}))
        return
    show(given, sys.argv[1:])


def show(given: argparse.Namespace, arguments: list[str]) -> None:
    """Measures everything, and prints the tables."""
    measured = {name: apart(name, arguments) for name in CANDIDATES}
    table = Table(
        title=f"{given.prompts} prompts x {given.drafts} drafts, at most {NEW_TOKENS} new tokens "
        "each"
    )
    for column in (
        "",
        "drafts",
        "seconds",
        "drafts/s",
        "new tokens/s",
        "times as fast",
        "peak GiB",
    ):
        table.add_column(column, justify="left" if not column else "right")
    base = measured["generate, one by one"]
    for name in ("cowest_dspy engine", "vLLM server", "llama.cpp server", "generate, one by one"):
        one = measured[name]
        if one is None or base is None:
            table.add_row(name, "could not be run")
            continue
        rate = one["tokens"] / one["seconds"]
        cells = [
            f"{one['drafts']:.0f}",
            f"{one['seconds']:.1f}",
            f"{one['drafts'] / one['seconds']:.2f}",
            f"{rate:.0f}",
        ]
        table.add_row(
            name, *cells, f"{rate / (base['tokens'] / base['seconds']):.1f}", f"{one['peak']:.2f}"
        )
    console = Console()
    console.print(table)
    for title, name, unit in (
        ("the engine under threads", "threads", "tokens/s"),
        ("a call of 16 tokens", "overhead", "ms"),
    ):
        one = measured[name] or {}
        console.print(
            f"{title}: "
            + ", ".join(f"{key} {value:.0f} {unit}" for key, value in one.items() if key != "peak")
        )


if __name__ == "__main__":
    main()
