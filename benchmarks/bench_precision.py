"""The strong model's precision: float32, bfloat16 and int8 on this processor, by time, memory and what it answers.

    make bench                                  # or: python benchmarks/bench_precision.py --questions 32

Each precision answers the same questions of the handbook's dev split with the oracle's notes, in a process of its own (so that its
peak of memory is its own), one after another. Loading is not timed. "same text" compares with float32, answer and working.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cowest_dspy import TransformersEngine, recipes
from cowest_dspy.report import wilson_interval

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models/Qwen2.5-Coder-1.5B-Instruct"
PRECISIONS = ("float32", "bfloat16", "int8")


def measure(precision: str, count: int) -> dict[str, Any]:
    """Seconds, peak GiB, answers and which of them are right, for one precision in this process."""
    handbook = recipes.load(f"{ROOT / 'programs/handbook.py'}:examples")
    program = recipes.load(f"{ROOT / 'programs/handbook.py'}:program")()
    engine = TransformersEngine(MODEL, dtype=precision, max_batch=64)
    program = program.bind(strong=engine.lm(temperature=0.0, max_tokens=48))
    rows = handbook("dev")[:count]
    program.refined(rows[0]["notes"], question=rows[0]["question"])
    started = time.perf_counter()
    with ThreadPoolExecutor(count) as pool:
        made = list(pool.map(lambda row: program.refined(row["notes"], question=row["question"]), rows))
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "texts": [f"{one.working} | {one.answer}" for one in made],
        "right": sum(str(one.answer).strip().rstrip(".") == row["answer"] for one, row in zip(made, rows, strict=True)),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--one", choices=PRECISIONS, help="measure this precision only, and print it as JSON")
    given = parser.parse_args()
    if not MODEL.is_dir():
        raise SystemExit(f"{MODEL} is missing: make models")
    if given.one:
        print(json.dumps(measure(given.one, given.questions)))
        return
    found: dict[str, dict[str, Any]] = {}
    for precision in PRECISIONS:
        command = [sys.executable, __file__, "--one", precision, "--questions", str(given.questions)]
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"{precision} ended with {done.returncode}; a negative number is a signal. What it said stands above.")
        found[precision] = json.loads(done.stdout)
    table = Table(title=f"{MODEL.name}: {given.questions} questions with the oracle's notes, one batch")
    for column in ("", "s per answer", "times as fast", "peak GiB", "right", "95 % interval", "same text"):
        table.add_column(column, justify="left" if not column else "right")
    base = found["float32"]
    for precision, one in found.items():
        right = wilson_interval(one["right"], given.questions)
        same = sum(a == b for a, b in zip(one["texts"], base["texts"], strict=True))
        table.add_row(
            precision,
            f"{one['seconds'] / given.questions:.2f}",
            f"{base['seconds'] / one['seconds']:.1f}",
            f"{one['gib']:.1f}",
            f"{one['right']} of {given.questions}",
            f"{100 * right.low:.0f} to {100 * right.high:.0f} %",
            f"{same} of {given.questions}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
