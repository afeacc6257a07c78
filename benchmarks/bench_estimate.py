"""What a training was said to take before it began, beside what it took: memory at its peak, and
seconds.

    make bench                                       # or: python benchmarks/bench_estimate.py
    python benchmarks/bench_estimate.py --only 0 4   # some of the cases

Models of several shapes with random numbers for weights, which take as long and as much as trained
ones. Each case trains in a process of its own, after a training of nothing much, so that what is
imported and built once is in neither number. Memory is what the process's resident memory rose by;
time is that of training, with loading the weights.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marked import publish
from rich.console import Console
from rich.table import Table

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORD = "bar "
STEPS = 3


@dataclass(frozen=True)
class Case:
    """A shape (hidden, inner, layers, heads, key-value heads, vocabulary), and rows of so many
    tokens of prompt and completion."""

    kind: str
    shape: tuple[int, int, int, int, int, int]
    prompt: int
    completion: int
    micro: int
    precision: str = "fp32"


CASES = (
    Case("sft", (256, 512, 4, 4, 2, 300), 200, 200, 16),
    Case("sft", (256, 2048, 4, 4, 2, 300), 200, 200, 8),
    Case("dpo", (256, 512, 4, 4, 2, 300), 200, 200, 8),
    Case("dpo", (256, 512, 4, 4, 2, 300), 200, 200, 8, "bf16"),
    Case("sft", (512, 1024, 4, 8, 2, 40_000), 60, 60, 2),
    Case("dpo", (576, 1536, 12, 9, 3, 49_152), 100, 60, 2),
    Case("dpo", (576, 1536, 30, 9, 3, 49_152), 120, 80, 2, "bf16"),
)
SMALL = Case("sft", (64, 128, 1, 4, 2, 300), 20, 20, 2)


def make_model(folder: Path, case: Case) -> Path:
    """A Llama with random weights, and a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    marks = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    known = [*marks, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(
        models.BPE(vocab={word: number for number, word in enumerate(known)}, merges=[])
    )
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tokenizer.add_special_tokens(marks)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=marks[0], eos_token=marks[2]
    )
    fast.chat_template = TEMPLATE
    hidden, inner, layers, heads, pairs, words = case.shape
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=max(words, len(known)),
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=pairs,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def rows(case: Case, count: int, kind: str | None = None) -> list[dict[str, Any]]:
    """Rows of about the case's tokens; a byte is one."""

    def said(tokens: int, letter: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": (letter + WORD) * (tokens // (len(WORD) + 1))}]

    made: list[dict[str, Any]] = []
    for number in range(count):
        asked = [{"role": "user", "content": f"{number:03d}" + WORD * (case.prompt // len(WORD))}]
        completions = {"completion": said(case.completion, "a")}
        if (kind or case.kind) == "dpo":
            completions = {
                "chosen": said(case.completion, "a"),
                "rejected": said(case.completion, "b"),
            }
        made.append({"prompt": asked, **completions})
    return made


def measure(case: Case) -> dict[str, float]:
    """Estimates and trains in this process."""
    import psutil

    from cowest_dspy.lms.local import weights
    from cowest_dspy.tuning import DPO, SFT, Lengths, estimate, train_dpo, train_sft

    train: Any
    make: Any
    train, make = (train_sft, SFT) if case.kind == "sft" else (train_dpo, DPO)
    how: dict[str, Any] = {
        "batch_size": case.micro,
        "micro_batch_size": case.micro,
        "precision": case.precision,
        "checkpoint_steps": 0,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, small = make_model(folder / "model", case), make_model(folder / "small", SMALL)
        train(
            make(max_steps=1, **how),
            rows(SMALL, 4, case.kind),
            base=str(small),
            output=folder / "first",
        )
        data, settings = rows(case, case.micro * STEPS), make(epochs=1, **how)
        expected = estimate(settings, Lengths.of(data, model), model)
        gc.collect()
        weights.return_memory()
        before, started = psutil.Process().memory_info().rss, time.perf_counter()
        tuned = train(settings, data, base=str(model), output=folder / "second")
        return {
            "expected_mib": expected.memory.own / 2**20,
            "mib": (tuned.peak_memory_bytes - before) / 2**20,
            "expected_seconds": expected.seconds or float("nan"),
            "seconds": time.perf_counter() - started,
        }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", type=int, nargs="+", default=list(range(len(CASES))), help="numbers of cases"
    )
    parser.add_argument(
        "--one", type=int, help="measure this case in this process; the last line is JSON"
    )
    given = parser.parse_args()
    if given.one is not None:
        print(json.dumps(measure(CASES[given.one])))
        return
    table = Table(title=f"{STEPS} optimiser steps")
    for column in (
        "case",
        "hidden, inner, layers",
        "tokens",
        "rows at once",
        "MiB said",
        "MiB",
        "ratio",
        "s said",
        "s",
        "ratio",
    ):
        table.add_column(column, justify="left" if column == "case" else "right")
    for number in given.only:
        case = CASES[number]
        command = [sys.executable, __file__, "--one", str(number)]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"TRANSFORMERS_VERBOSITY": "error"},
        )
        if done.returncode:
            raise SystemExit(f"case {number} ended with {done.returncode}\n{done.stderr[-2000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        shape, cells = ", ".join(map(str, case.shape[:3])), [f"{case.kind} {case.precision}"]
        cells += [shape, f"{case.prompt}+{case.completion}", str(case.micro)]
        cells += [
            f"{found['expected_mib']:.0f}",
            f"{found['mib']:.0f}",
            f"{found['expected_mib'] / found['mib']:.2f}",
        ]
        cells += [
            f"{found['expected_seconds']:.1f}",
            f"{found['seconds']:.1f}",
            f"{found['expected_seconds'] / found['seconds']:.2f}",
        ]
        table.add_row(*cells)
    Console(width=140).print(table)
    publish("estimate", [table])


if __name__ == "__main__":
    main()
