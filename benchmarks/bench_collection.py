"""Collecting traces: the framework's own speed and memory, beside what a user would write instead,
with models that cost nothing.

    make bench                                              # 1,000 and 10,000 traces
    python benchmarks/bench_collection.py --full            # and 100,000
    python benchmarks/bench_collection.py --traces 1000     # smaller

The models are functions in this process, so that what is measured is what collect() adds to them.
Beside it stand a loop with `dspy.Parallel` over draft, refine and alone (what one writes first: the
strong model alone is asked for every draft), and DSPy's `bootstrap_trace_data` with as many
rollouts of every example (draft and refine; it knows no alone). Each row is measured in a process
of its own, which also gives its peak memory. Then a strong model that takes 300 ms: seconds beside
the ideal, which is N * (n + 1) * 0.3 / threads. Ratios are what counts: machines differ.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, overload

import dspy
from rich.console import Console
from rich.table import Table

from cowest_dspy.influence.collection import collect
from cowest_dspy.influence.report import InfluenceReport
from cowest_dspy.influence.trace import Sampling
from cowest_dspy.program.adapters import LineAdapter
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.store import serialize
from cowest_dspy.store.store import Store

DRAFTS = 4
LATENCY = 0.3
SIZES, FULL = (1_000, 10_000), 100_000
THREADS = (1, 8, 32)

Measured = dict[str, float]


class Questions(Sequence[dspy.Example]):
    """Examples that are made when they are asked for, so that none of the memory is theirs."""

    def __init__(self, count: int, times: int = 1) -> None:
        self._count, self._times = count, times

    def __len__(self) -> int:
        return self._count * self._times

    @overload
    def __getitem__(self, index: int) -> dspy.Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[dspy.Example]: ...
    def __getitem__(self, index: int | slice) -> dspy.Example | list[dspy.Example]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if index >= len(self):
            raise IndexError(index)
        number = index // self._times
        row = {
            "id": f"q{number}",
            "question": f"What is said of number {number}?",
            "answer": str(number),
        }
        return dspy.Example(**row).with_inputs("question")


class Scripted:
    """An engine that keeps nothing. Weak: a draft for each seed, every second one with the answer,
    so that none is refined twice at the price of one. Strong: what the background begins with,
    after ``seconds``."""

    supports_function_calling = supports_reasoning = supports_response_schema = False
    supported_params = frozenset({"max_tokens", "temperature", "top_p", "stop", "seed"})

    def __init__(self, role: str, seconds: float = 0.0) -> None:
        self.role, self.seconds = role, seconds

    def lm(self) -> dspy.LM:
        """A ``dspy.LM`` on this engine."""
        return dspy.LM(
            f"scripted/{self.role}",
            engine=self,
            cache=False,
            num_retries=0,
            temperature=0.0,
            max_tokens=64,
        )

    def complete(self, request: Any) -> Any:
        """The answer."""
        text = serialize.request_messages(request)[-1]["content"]
        if self.role == "weak":
            seed = request.config.seed or 0
            said = (
                f"{text.rpartition(' ')[2].rstrip('?') if seed % 2 else 'nothing'} (draft {seed})"
            )
        else:
            if self.seconds:
                time.sleep(self.seconds)
            said = text.partition("Background: ")[2].partition(" ")[0] or "unknown"
        return serialize.make_response(request.model, said, "stop", 20, 2, usd=0.0)

    def __deepcopy__(self, memo: dict[int, Any]) -> Scripted:
        return self


class Plain(dspy.Module):
    """What a user writes without us: draft, then refine."""

    def __init__(self) -> None:
        super().__init__()
        self.draft, self.refine = (
            dspy.Predict("question -> background"),
            dspy.Predict("question, background -> answer"),
        )
        self.alone = dspy.Predict("question -> answer")
        self.draft.set_lm(Scripted("weak").lm())
        for strong in (self.refine, self.alone):
            strong.set_lm(Scripted("strong").lm())

    def forward(self, question: str) -> dspy.Prediction:
        """The refined answer."""
        return self.refine(question=question, background=self.draft(question=question).background)


def match(example: dspy.Example, prediction: Any, trace: Any = None) -> float:
    """Whether the answer is the example's."""
    return float(prediction.answer == example.answer)


def ours(given: argparse.Namespace, *, stored: bool, seconds: float = 0.0) -> Measured:
    """collect(), and a pass over its traces."""
    program = Collaboration("question -> answer").bind(
        weak=Scripted("weak").lm(), strong=Scripted("strong", seconds).lm()
    )
    examples = Questions(given.traces // DRAFTS)
    with (
        tempfile.TemporaryDirectory() as folder,
        Store(folder) if stored else nullcontext() as store,
    ):
        started = time.perf_counter()
        traces = collect(
            program, examples, match, Sampling(DRAFTS), store=store, num_threads=given.threads
        )
        report = InfluenceReport.from_traces(traces)
        taken = time.perf_counter() - started
    assert (
        len(report.values) == len(examples) * DRAFTS
        and not report.failed
        and not traces.saved["strong_calls"]
    )
    return {"seconds": taken, "traces": len(report.values)}


def parallel(given: argparse.Namespace) -> Measured:
    """A loop with dspy.Parallel: every rollout drafts, refines and asks alone, and both answers are
    scored."""
    program = Plain()

    def rollout(example: dspy.Example) -> float:
        refined, alone = program(**example.inputs()), program.alone(**example.inputs())
        return match(example, refined) - match(example, alone)

    run = dspy.Parallel(num_threads=given.threads, disable_progress_bar=True)
    started = time.perf_counter()
    with dspy.context(adapter=LineAdapter()):
        made = run([(rollout, (example,)) for example in Questions(given.traces // DRAFTS, DRAFTS)])
    return {"seconds": time.perf_counter() - started, "traces": len(made)}


def bootstrap(given: argparse.Namespace) -> Measured:
    """DSPy's bootstrap_trace_data, every example as often as we make drafts of it."""
    from dspy.teleprompt.bootstrap_trace import bootstrap_trace_data

    examples = list(Questions(given.traces // DRAFTS, DRAFTS))
    started = time.perf_counter()
    with dspy.context(adapter=LineAdapter()):
        made = bootstrap_trace_data(Plain(), examples, match, num_threads=given.threads)
    return {"seconds": time.perf_counter() - started, "traces": len(made)}


CANDIDATES = {
    "collect, in the store": lambda given: ours(given, stored=True),
    "collect, no store": lambda given: ours(given, stored=False),
    "dspy.Parallel loop": parallel,
    "bootstrap_trace_data": bootstrap,
    "latency": lambda given: ours(given, stored=True, seconds=LATENCY),
}


def apart(name: str, traces: int, threads: int) -> Measured | None:
    """Measures one candidate in a process of its own; None when it could not be run, and why on
    stderr."""
    command = [
        sys.executable,
        __file__,
        "--only",
        name,
        "--traces",
        str(traces),
        "--threads",
        str(threads),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traces", type=int, help="only so many traces")
    parser.add_argument("--threads", type=int, help="only so many threads")
    parser.add_argument(
        "--full", action="store_true", help="also 100,000 traces, without the others"
    )
    parser.add_argument("--only", choices=CANDIDATES, help="measure one, print JSON")
    given = parser.parse_args()
    if given.only:
        logging.getLogger("dspy").setLevel(logging.ERROR)
        found = CANDIDATES[given.only](given)
        print(
            json.dumps(
                {**found, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10}
            )
        )
        return
    console = Console()
    threads = (given.threads,) if given.threads else THREADS
    console.print(speed((given.traces,) if given.traces else SIZES, threads, full=given.full))
    console.print(latency(threads))


def speed(sizes: Sequence[int], threads: Sequence[int], *, full: bool) -> Table:
    """Traces per second and peak memory."""
    table = Table(title=f"{DRAFTS} drafts per example, scripted models")
    for column in ("", "threads", "traces", "seconds", "traces/s", "times as fast", "peak MiB"):
        table.add_column(column, justify="left" if not column else "right")
    for many in threads:
        for size in (*sizes, *([FULL] if full else [])):
            names = [
                name
                for name in CANDIDATES
                if name != "latency" and (size < FULL or name.startswith("collect"))
            ]
            measured = {name: apart(name, size, many) for name in names}
            base = measured.get("bootstrap_trace_data")
            for name, one in measured.items():
                if one is None:
                    table.add_row(name, str(many), f"{size:,}", "could not be run")
                    continue
                rate = one["traces"] / one["seconds"]
                times = f"{rate / (base['traces'] / base['seconds']):.1f}" if base else ""
                table.add_row(
                    name,
                    str(many),
                    f"{size:,}",
                    f"{one['seconds']:.1f}",
                    f"{rate:.0f}",
                    times,
                    f"{one['peak']:.0f}",
                )
            table.add_section()
    return table


def latency(threads: Sequence[int]) -> Table:
    """Seconds beside the ideal, with a strong model that takes its time."""
    table = Table(title=f"a strong model that takes {LATENCY * 1000:.0f} ms")
    for column in ("threads", "strong answers", "seconds", "ideal", "of the ideal"):
        table.add_column(column, justify="right")
    for many in threads:
        examples = 5 * many
        calls = examples * (DRAFTS + 1)
        ideal = calls * LATENCY / many
        one = apart("latency", examples * DRAFTS, many)
        cells = (
            ["could not be run"]
            if one is None
            else [f"{one['seconds']:.2f}", f"{ideal:.2f}", f"{ideal / one['seconds']:.0%}"]
        )
        table.add_row(str(many), str(calls), *cells)
    return table


if __name__ == "__main__":
    main()
