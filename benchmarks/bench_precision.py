"""The strong model's precision: float32, bfloat16 and int8 on this processor, by time, memory and
what it answers.

    make bench                                  # or: python benchmarks/bench_precision.py
        --questions 32

Each precision answers the same questions of the handbook's dev split with the oracle's notes, in a
process of its own (so that its peak of memory is its own), one after another. Loading is not timed.
"same text" compares with float32, answer and working. A second table has one layer by itself, in
float32 and in the two ways of int8: which of them is taken depends on the processor
(lms/local/int8.py).
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from cowest_dspy.influence.statistics import wilson_interval
from cowest_dspy.lms import LocalEngine
from cowest_dspy.utils import importing

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models/Qwen2.5-Coder-1.5B-Instruct"
PRECISIONS = ("float32", "bfloat16", "int8")


def measure(precision: str, count: int) -> dict[str, Any]:
    """Seconds, peak GiB, answers and which of them are right, for one precision in this process."""
    handbook = importing.load(f"{ROOT / 'programs/handbook.py'}:examples")
    program = importing.load(f"{ROOT / 'programs/handbook.py'}:program")()
    engine = LocalEngine(MODEL, dtype=precision, max_batch=64)
    program = program.bind(strong=engine.lm(temperature=0.0, max_tokens=48))
    rows = handbook("dev")[:count]
    program.ask_refine(rows[0]["notes"], question=rows[0]["question"])
    started = time.perf_counter()
    with ThreadPoolExecutor(count) as pool:
        made = list(
            pool.map(lambda row: program.ask_refine(row["notes"], question=row["question"]), rows)
        )
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "texts": [f"{one.working} | {one.answer}" for one in made],
        "right": sum(
            str(one.answer).strip().rstrip(".") == row["answer"]
            for one, row in zip(made, rows, strict=True)
        ),
    }


def layer(tokens: int, size: tuple[int, int] = (1536, 8960), times: int = 5) -> dict[str, float]:
    """Median milliseconds of a layer of this size (the model's widest) for so many tokens, on one
    thread, by how it computes."""
    import torch

    from cowest_dspy.lms.local import int8

    torch.set_num_threads(1)
    weight, inputs = torch.randn(size[1], size[0]), torch.randn(tokens, size[0])
    ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "float32": lambda given: given @ weight.T
    }
    packs = int8.packs
    for name, packed in (("int8, torch._int_mm", False), ("int8, FBGEMM", True)):
        if packed and "fbgemm" not in torch.backends.quantized.supported_engines:
            continue
        int8.packs = lambda packed=packed: packed
        ways[name] = int8.int8_product(weight)
    int8.packs = packs
    found: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        for _ in range(times):
            for name, way in ways.items():
                started = time.perf_counter()
                way(inputs)
                found[name].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def show_layers() -> None:
    """The second table."""
    rows = {tokens: layer(tokens) for tokens in (1, 32, 128)}
    table = Table(title="One layer, 1536 to 8960, one thread: milliseconds")
    table.add_column("tokens", justify="right")
    for name in rows[1]:
        table.add_column(name, justify="right")
    for tokens, found in rows.items():
        table.add_row(str(tokens), *(f"{milliseconds:.1f}" for milliseconds in found.values()))
    Console().print(table)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--layers", action="store_true", help="only the table of one layer")
    parser.add_argument(
        "--one", choices=PRECISIONS, help="measure this precision only, and print it as JSON"
    )
    given = parser.parse_args()
    if given.layers:
        show_layers()
        return
    if not MODEL.is_dir():
        raise SystemExit(f"{MODEL} is missing: make models")
    if given.one:
        print(json.dumps(measure(given.one, given.questions)))
        return
    show_precisions({precision: apart(precision, given.questions) for precision in PRECISIONS})
    show_layers()


def apart(precision: str, questions: int) -> dict[str, Any]:
    """What :func:`measure` gives in a process of its own."""
    command = [sys.executable, __file__, "--one", precision, "--questions", str(questions)]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(
            f"{precision} ended with {done.returncode}; a negative number is a signal. What it "
            "said stands above."
        )
    return json.loads(done.stdout)


def show_precisions(found: dict[str, dict[str, Any]]) -> None:
    """The first table."""
    questions = len(found["float32"]["texts"])
    table = Table(title=f"{MODEL.name}: {questions} questions with the oracle's notes, one batch")
    for column in (
        "",
        "s per answer",
        "times as fast",
        "peak GiB",
        "right",
        "95 % interval",
        "same text",
    ):
        table.add_column(column, justify="left" if not column else "right")
    base = found["float32"]
    for precision, one in found.items():
        right = wilson_interval(one["right"], questions)
        same = sum(a == b for a, b in zip(one["texts"], base["texts"], strict=True))
        table.add_row(
            precision,
            f"{one['seconds'] / questions:.2f}",
            f"{base['seconds'] / one['seconds']:.1f}",
            f"{one['gib']:.1f}",
            f"{one['right']} of {questions}",
            f"{100 * right.low:.0f} to {100 * right.high:.0f} %",
            f"{same} of {questions}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
