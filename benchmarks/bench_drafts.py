"""Sampling drafts: our engine beside what a user would write first, transformers' generate one prompt after another.

    make bench                                  # or: python benchmarks/bench_drafts.py --prompts 16 --drafts 4

Both run in this process, in one go, on the same weights, precision and threads, from the same prompts; new tokens are counted, not
assumed. The ratio is what counts: machines differ and are shared.
"""

from __future__ import annotations

import argparse
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cowest_dspy import TransformersEngine, recipes
from cowest_dspy.lms import wire
from cowest_dspy.lms.weights import choose_dtype

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models/SmolLM2-135M-Instruct"
NEW_TOKENS = 32


def prompts(count: int) -> list[list[dict[str, str]]]:
    """Questions of the handbook's dev split in the drafter's prompt."""
    rows = recipes.load(f"{ROOT / 'programs/handbook.py'}:examples")("dev")[:count]
    task = recipes.load(f"{ROOT / 'programs/handbook.py'}:DRAFT_TASK")
    return [[{"role": "system", "content": task}, {"role": "user", "content": f"Question: {row['question']}"}] for row in rows]


def ours(asked: list[list[dict[str, str]]], drafts: int) -> tuple[float, int]:
    """Seconds and new tokens of the engine, asked from as many threads as there are drafts."""
    engine = TransformersEngine(MODEL, max_batch=64)
    engine.complete(wire.request_from_messages(engine.model_id, asked[0], max_tokens=2))
    requests = [
        wire.request_from_messages(engine.model_id, messages, max_tokens=NEW_TOKENS, temperature=1.0, seed=seed)
        for messages in asked
        for seed in range(drafts)
    ]
    started = time.perf_counter()
    with ThreadPoolExecutor(len(requests)) as pool:
        answers = list(pool.map(engine.complete, requests))
    return time.perf_counter() - started, sum(answer.usage.output_tokens or 0 for answer in answers)


def one_by_one(asked: list[list[dict[str, str]]], drafts: int) -> tuple[float, int]:
    """Seconds and new tokens of ``generate``, one call per draft."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL)
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=getattr(torch, choose_dtype())).eval()
    seconds, made = 0.0, 0
    for messages in asked:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        for seed in range(drafts):
            torch.manual_seed(seed)
            started = time.perf_counter()
            out = model.generate(**ids, max_new_tokens=NEW_TOKENS, do_sample=True, temperature=1.0, top_k=0)
            seconds += time.perf_counter() - started
            made += out.shape[1] - ids["input_ids"].shape[1]
    return seconds, made


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--drafts", type=int, default=4)
    given = parser.parse_args()
    if not MODEL.is_dir():
        raise SystemExit(f"{MODEL} is missing: make models")
    asked = prompts(given.prompts)
    measured = {"cowest_dspy engine": ours(asked, given.drafts), "generate, one by one": one_by_one(asked, given.drafts)}
    base = measured["generate, one by one"]
    table = Table(title=f"{given.prompts} prompts x {given.drafts} drafts, at most {NEW_TOKENS} new tokens each")
    for column in ("", "seconds", "new tokens", "tokens/s", "times as fast"):
        table.add_column(column, justify="left" if not column else "right")
    for name, (seconds, made) in measured.items():
        ratio = (made / seconds) / (base[1] / base[0])
        table.add_row(name, f"{seconds:.1f}", str(made), f"{made / seconds:.1f}", f"{ratio:.1f}")
    console = Console()
    console.print(table)
    console.print(f"peak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


if __name__ == "__main__":
    main()
