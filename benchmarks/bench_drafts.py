"""Sampling drafts: the in-process engine beside what a user would use instead, on the same prompts,
weights and machine and in one run; and what each of the engine's optimisations is worth.

    make bench                                              # 16 prompts x 8 drafts of 64 tokens
    python benchmarks/bench_drafts.py --prompts 8 --tokens 32   # smaller

The fair peer is transformers' batched `generate`: prompts sorted by length, padded on the left,
`num_return_sequences` drafts of each, as many sequences together as the engine has. Beside it stand
one call per draft (what one writes first; timed on `--one-by-one` drafts, since it is slow),
llama.cpp's server (its `llama-server` must be on the PATH) and vLLM for the CPU (from `make vllm`).
Each runs in a process of its own, which also gives its peak memory. New tokens are counted, not
assumed.

`--without` prints the second table instead: the engine, then the same with one optimisation
switched off, taking turns in one process, by seconds of processor in one thread, which other work
on the machine disturbs less. Ratios are what counts: machines differ.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models/SmolLM2-135M-Instruct"
GGUF = ROOT / "models/SmolLM2-135M-Instruct.BF16.gguf"
VLLM = ROOT / ".venv-vllm/bin/python"
WORDS = 84  # about 200 tokens; 270 are about 650

Measured = dict[str, float]


def prompts(given: argparse.Namespace, share: float = 0) -> list[list[dict[str, str]]]:
    """Distinct prompts: ``given.words`` words of the project's own README in a random order that a
    seed decides. ``share`` of them, from 0 to 1, are instructions that all prompts begin with."""
    words, rng = (ROOT / "README.md").read_text(encoding="utf-8").split(), random.Random(0)
    own = round(given.words * (1 - share))
    shared = rng.sample(words, given.words - own)
    task = " ".join(["You write short notes about a text.", *shared])
    texts = [" ".join(rng.sample(words, own)) for _ in range(given.prompts)]
    return [
        [
            {"role": "system", "content": task},
            {"role": "user", "content": f"Text: {text}\nWrite two sentences about it."},
        ]
        for text in texts
    ]


def requests(model: str, given: argparse.Namespace, share: float = 0) -> list[Any]:
    """What is asked: ``given.drafts`` samples of every prompt."""
    from cowest_dspy.store import serialize

    return [
        serialize.request_from_messages(
            model, messages, max_tokens=given.tokens, temperature=1.0, seed=seed
        )
        for messages in prompts(given, share)
        for seed in range(given.drafts)
    ]


def ask_all(engine: Any, asked: Sequence[Any], threads: int) -> Measured:
    """Asks from ``threads`` threads: seconds, drafts and new tokens."""
    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        answers = list(pool.map(engine.complete, asked))
    seconds = time.perf_counter() - started
    tokens = sum(answer.usage.output_tokens or 0 for answer in answers)
    return {"seconds": seconds, "drafts": len(answers), "tokens": tokens}


def warm(engine: Any) -> Any:
    """The engine after a first short answer, with its weights loaded."""
    from cowest_dspy.store import serialize

    hello = [{"role": "user", "content": "Hello"}]
    engine.complete(serialize.request_from_messages(engine.model_id, hello, max_tokens=4))
    return engine


def local_engine(given: argparse.Namespace) -> Any:
    """The in-process engine, its weights loaded."""
    from cowest_dspy.lms import LocalEngine

    return warm(LocalEngine(MODEL, max_batch=given.batch))


def in_process(given: argparse.Namespace) -> Measured:
    """The engine, with everything asked at once."""
    engine = local_engine(given)
    asked = requests(engine.model_id, given)
    return ask_all(engine, asked, len(asked))


def under_threads(given: argparse.Namespace) -> Measured:
    """The engine's tokens/s when 1, 4, 16, 64 threads ask one request after another."""
    engine = local_engine(given)
    found: Measured = {}
    for threads in (1, 4, 16, 64):
        asked = requests(engine.model_id, given)[: max(4, 2 * threads)]
        one = ask_all(engine, asked, threads)
        found[str(threads)] = one["tokens"] / one["seconds"]
    return found


# The peers


@functools.cache
def stock() -> tuple[Any, Any]:
    """Tokenizer and model as transformers loads them, in the precision that the engine chooses."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from cowest_dspy.lms.local.weights import choose_dtype

    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL, padding_side="left")
    dtype = getattr(torch, choose_dtype())
    return tokenizer, AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype).eval()


def generate(texts: Sequence[str], given: argparse.Namespace, drafts: int, seed: int) -> Measured:
    """One call of transformers' `generate`; new tokens are counted up to each draft's end."""
    import torch

    tokenizer, model = stock()
    ids = tokenizer(list(texts), return_tensors="pt", padding=True, add_special_tokens=False)
    torch.manual_seed(seed)
    started = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            **ids,
            max_new_tokens=given.tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            num_return_sequences=drafts,
            pad_token_id=tokenizer.pad_token_id,
        )
    seconds = time.perf_counter() - started
    ended = (out[:, ids["input_ids"].shape[1] :] == tokenizer.eos_token_id).long().cumsum(1)
    tokens = int((ended == 0).sum() + (ended[:, -1] > 0).sum())
    return {"seconds": seconds, "drafts": len(out), "tokens": tokens}


def written_out(given: argparse.Namespace, share: float = 0) -> list[str]:
    """The prompts as texts in the model's own form."""
    template = stock()[0].apply_chat_template
    return [
        template(messages, add_generation_prompt=True, tokenize=False)
        for messages in prompts(given, share)
    ]


def batched(given: argparse.Namespace, share: float = 0) -> Measured:
    """Batched `generate`: prompts sorted by length, all drafts of a prompt in one batch."""
    texts = sorted(written_out(given, share), key=lambda text: len(stock()[0](text)[0]))
    size = max(1, given.batch // given.drafts)
    calls = [
        generate(texts[start : start + size], given, given.drafts, seed=start)
        for start in range(0, len(texts), size)
    ]
    return {name: sum(call[name] for call in calls) for name in calls[0]}


def one_by_one(given: argparse.Namespace) -> Measured:
    """`generate`, one call per draft, for the first few drafts."""
    texts = written_out(given)[: given.one_by_one]
    calls = [generate([text], given, 1, seed) for seed, text in enumerate(texts)]
    return {name: sum(call[name] for call in calls) for name in calls[0]}


def llama_cpp(given: argparse.Namespace) -> Measured:
    """llama.cpp's server with parallel slots and all cores, asked from as many threads."""
    slots, context = given.slots, 256 + given.tokens
    command = ["llama-server", "--model", str(GGUF), "--port", "{port}"]
    command += ["--parallel", str(slots), "--ctx-size", str(slots * context)]
    return served("llama_cpp", command, given, slots)


def vllm(given: argparse.Namespace) -> Measured:
    """vLLM's server for the CPU in bfloat16, with as many sequences together as our engine has."""
    command = ["env", "VLLM_CPU_KVCACHE_SPACE=2", str(VLLM)]
    command += ["-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1"]
    command += ["--port", "{port}", "--model", str(MODEL), "--served-model-name", "smol"]
    command += ["--dtype", "bfloat16", "--max-model-len", "512", "--max-num-seqs", str(given.batch)]
    # A seeded request that is prefilled in parts ends this version for the CPU: so no prompt is.
    command += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "32768"]
    return served("vllm", command, given, given.batch)


def served(server: str, command: list[str], given: argparse.Namespace, threads: int) -> Measured:
    """A server that is started for it, and asked from ``threads`` threads when it is warm."""
    from cowest_dspy.lms import ServerEngine
    from cowest_dspy.lms.config import Server

    program = next(word for word in command if word != "env" and "=" not in word)
    if shutil.which(program) is None:
        raise SystemExit(f"{program} is not installed")
    settings: dict[str, Any] = {
        "server": server,
        "model": "smol",
        "command": command,
        "concurrency": threads,
    }
    engine = ServerEngine(Server.model_validate({"kind": "server", **settings}))
    try:
        return ask_all(warm(engine), requests(engine.model_id, given), threads)
    finally:
        engine.close()


# What the optimisations are worth


@contextmanager
def unshared_prompts(engine: Any) -> Iterator[None]:
    """Every draft computes and keeps its prompt alone."""
    from cowest_dspy.lms.local import generate as generating
    from cowest_dspy.lms.local import scheduler

    with (
        mock.patch.object(generating, "_key", id),
        mock.patch.object(scheduler.PendingRequest, "prompt", property(id)),
    ):
        yield


@contextmanager
def unshared_beginnings(engine: Any) -> Iterator[None]:
    """Every prompt computes and keeps its instructions alone."""
    alone = mock.patch.object(engine._chat, "split", lambda asked: (engine._chat.prompt(asked), 0))
    with alone:
        yield


@contextmanager
def usual_attention(engine: Any) -> Iterator[None]:
    """transformers' attention and cache: every distinct prompt computed once, and its keys and
    values copied to each of its drafts."""
    from cowest_dspy.lms.local import attention
    from cowest_dspy.lms.local.generate import PlainSession

    class Copied(PlainSession):
        def admit(self, rows: Sequence[Any]) -> Any:
            import torch
            from transformers import DynamicCache

            if not rows:
                return []
            first: dict[Any, int] = {}
            order = [first.setdefault(tuple(row.tokens), len(first)) for row in rows]
            ids, real = attention.left_padded(list(first), self._device)
            self._rows = [generating_draws(row) for row in rows]
            cache: Any = DynamicCache(config=self._config)
            logits: list[Any] = []
            with torch.inference_mode():
                out = self._select([row.adapter for row in rows])(
                    input_ids=ids,
                    attention_mask=real.long(),
                    position_ids=(real.long().cumsum(1) - 1).clamp(min=0),
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
                where = torch.tensor(order, device=ids.device)
                cache.batch_select_indices(where)
                self._cache, self._real = cache, real[where]
                logits.append(out.logits[where, -1].float())
            return self._settled(logits[0])

    from cowest_dspy.lms.local.sampling import Draws as generating_draws

    with used(engine, Copied):
        yield


@contextmanager
def batches_run_to_their_end(engine: Any) -> Iterator[None]:
    """A batch takes no new rows before it has ended."""
    loaded = engine._loaded
    engine._loaded = dataclasses.replace(loaded, joinable=False)
    try:
        yield
    finally:
        engine._loaded = loaded


@contextmanager
def used(engine: Any, kind: Any) -> Iterator[None]:
    """The engine with another kind of batch and transformers' own attention."""
    loaded = engine._loaded
    model = loaded.lora.model
    begin = functools.partial(kind, model, loaded.tokenizer, loaded.end_tokens, loaded.lora.select)
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    engine._loaded = dataclasses.replace(loaded, begin=begin, joinable=False)
    try:
        yield
    finally:
        engine._loaded = loaded
        model.set_attn_implementation(before)


@contextmanager
def plain(engine: Any) -> Iterator[None]:
    """All of these switched off: padded prompts, transformers' attention and cache."""
    from cowest_dspy.lms.local.generate import PlainSession

    with used(engine, PlainSession):
        yield


WITHOUT: dict[str, Callable[[Any], Any]] = {
    "shared prompts": unshared_prompts,
    "shared beginnings": unshared_beginnings,
    "attention in parts": usual_attention,
    "joining on the way": batches_run_to_their_end,
    "any of them": plain,
}


def show_without(given: argparse.Namespace) -> None:
    """The second table: tokens/s with one optimisation less, the candidates taking turns."""
    import torch

    torch.set_num_threads(1)
    engine, console = local_engine(given), Console()
    for share in (0, given.share):
        rates: dict[str, list[float]] = {}

        def note(
            name: str, measure: Callable[[], Measured], rates: dict[str, list[float]] = rates
        ) -> None:
            before = time.process_time()
            tokens = measure()["tokens"]
            rates.setdefault(name, []).append(tokens / (time.process_time() - before))
            print(f"{name}: {rates[name][-1]:.1f} tokens/CPU s", file=sys.stderr, flush=True)

        asked = requests(engine.model_id, given, share)
        ask = functools.partial(ask_all, engine, asked, len(asked))
        for _ in range(given.rounds):
            note("the engine", ask)
            for name, without in WITHOUT.items():
                with without(engine):
                    engine._batcher.forget()
                    note(f"without {name}", ask)
                engine._batcher.forget()
            note("batched generate", functools.partial(batched, given, share))
        title = f"{share:.0%} of each prompt's words shared"
        table = Table(title=f"{given.prompts} x {given.drafts} drafts, {title}")
        for column in ("", "new tokens/CPU s", "the engine is times as fast"):
            table.add_column(column, justify="left" if not column else "right")
        best = {name: max(found) for name, found in rates.items()}
        for name, rate in best.items():
            table.add_row(name, f"{rate:.1f}", f"{best['the engine'] / rate:.2f}")
        console.print(table)


CANDIDATES = {
    "in-process engine": in_process,
    "batched generate": batched,
    "vLLM server": vllm,
    "llama.cpp server": llama_cpp,
    "generate, one by one": one_by_one,
    "threads": under_threads,
}


def apart(name: str, arguments: list[str]) -> Measured | None:
    """Measures one candidate in a process of its own; None when it could not be run, and why on
    stderr."""
    command = [sys.executable, __file__, "--only", name, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def arguments() -> argparse.Namespace:
    """What was typed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--prompts", type=int, default=16)
    add("--drafts", type=int, default=8)
    add("--tokens", type=int, default=64, help="new tokens of a draft, at most")
    add("--batch", type=int, default=128, help="sequences computed together, at most")
    add("--slots", type=int, default=16, help="parallel slots of llama.cpp's server")
    add("--words", type=int, default=WORDS, help="words of a prompt; 84 are about 200 tokens")
    add("--share", type=float, default=0.75, help="of the words, in the second of --without")
    add("--one-by-one", type=int, default=12, help="drafts that generate is timed on")
    add("--only", choices=CANDIDATES, help="measure one, print JSON")
    add("--without", action="store_true", help="what each optimisation is worth")
    add("--rounds", type=int, default=2, help="of --without; the fastest of each counts")
    return parser.parse_args()


def main() -> None:
    """The command line."""
    given = arguments()
    if not MODEL.is_dir():
        raise SystemExit(f"{MODEL} is missing: make models")
    if given.without:
        show_without(given)
    elif given.only:
        found = CANDIDATES[given.only](given)
        peak = max(
            resource.getrusage(who).ru_maxrss
            for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        )
        print(json.dumps({**found, "peak": peak / 2**20}))
    else:
        show(given, sys.argv[1:])


def show(given: argparse.Namespace, typed: list[str]) -> None:
    """Measures everything, and prints the first table."""
    measured = {name: apart(name, typed) for name in CANDIDATES}
    threads, base = measured.pop("threads"), measured["batched generate"]
    title = f"{given.prompts} prompts x {given.drafts} drafts, at most {given.tokens} new tokens"
    table = Table(title=title)
    for column in ("", "drafts", "seconds", "new tokens/s", "times as fast", "peak GiB"):
        table.add_column(column, justify="left" if not column else "right")
    for name, one in measured.items():
        if one is None or base is None:
            table.add_row(name, "could not be run")
            continue
        rate = one["tokens"] / one["seconds"]
        cells = (f"{one['drafts']:.0f}", f"{one['seconds']:.1f}", f"{rate:.0f}")
        times = f"{rate / (base['tokens'] / base['seconds']):.2f}"
        table.add_row(name, *cells, times, f"{one['peak']:.2f}")
    console = Console()
    console.print(table)
    rates = {key: value for key, value in (threads or {}).items() if key != "peak"}
    said = ", ".join(f"{value:.0f} with {key}" for key, value in rates.items())
    console.print(f"tokens/s of the engine by threads that ask: {said}")


if __name__ == "__main__":
    main()
