"""Collecting in shards on Ray, beside the ordinary collect in this process: how many calls a second
are answered and kept, and what they cost the driver.

    python benchmarks/bench_cluster.py                        # 4,000 calls each, three times
    python benchmarks/bench_cluster.py --calls 1000 --times 1

The models are functions that answer at once, so that what is measured is everything but them: the
program, the stores, the messages about a budget, merging. The cluster is on this machine, and its
processes are up before the clock runs. With a core for each shard it shows what a shard adds; on
fewer cores than shards, what they share. Medians.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
from typing import Any

from bench_collection import Questions, Scripted, match
from marked import publish
from rich.console import Console
from rich.table import Table

from cowest_dspy.influence.collection import collect
from cowest_dspy.influence.trace import Sampling
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.scale import Cluster, RayRules
from cowest_dspy.store.budget import Budget
from cowest_dspy.store.store import Store

DRAFTS, THREADS = 4, 8


def build() -> tuple[Collaboration, Any]:
    """The program and the metric, in every process."""
    weak, strong = Scripted("weak").lm(), Scripted("strong").lm()
    return Collaboration("question -> answer").bind(weak=weak, strong=strong), match


def measured(calls: int, shards: int, budget: Budget | None = None) -> tuple[float, float]:
    """Calls a second of one collection, and CPU seconds of this process for one; 0 shards: without
    Ray."""
    rows, sampling = Questions(calls // (2 * DRAFTS + 1)), Sampling(DRAFTS)
    with tempfile.TemporaryDirectory() as folder, Store(folder, budget=budget) as store:
        started, cpu = time.perf_counter(), time.process_time()
        if shards:
            rules = RayRules(num_shards=shards)  # pyright: ignore[reportCallIssue]
            traces = Cluster(rules).collect(build, rows, sampling, store=store, num_threads=THREADS)
        else:
            program, metric = build()
            traces = collect(program, rows, metric, sampling, store=store, num_threads=THREADS)
        seconds, used = time.perf_counter() - started, time.process_time() - cpu
        assert not any(trace.error for trace in traces)
        return store.calls() / seconds, used / store.calls()


def table(calls: int, times: int) -> Table:
    """Local, one shard, two shards, and two with a budget: in turn, so that whatever else the
    machine does is in all of them."""
    plenty = Budget(strong_calls=10**9)  # pyright: ignore[reportCallIssue]
    cases: dict[str, tuple[int, Budget | None]] = {
        "collect in this process": (0, None),
        "1 shard": (1, None),
        "2 shards": (2, None),
        "2 shards and a budget": (2, plenty),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    measured(200, 2)
    for _ in range(times):
        for name, (shards, budget) in cases.items():
            found[name].append(measured(calls, shards, budget))
    made = Table(title="models that answer at once")
    for column in ("", "calls/s", "of local", "spread", "CPU ms here"):
        made.add_column(column, justify="right" if column else "left")
    medians = {name: statistics.median(rate for rate, _ in each) for name, each in found.items()}
    for name, each in found.items():
        rates = sorted(rate for rate, _ in each)
        made.add_row(
            name,
            f"{medians[name]:.0f}",
            f"{medians[name] / medians['collect in this process']:.2f}",
            f"{rates[0]:.0f}-{rates[-1]:.0f}",
            f"{1000 * statistics.median(used for _, used in each):.2f}",
        )
    return made


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=4000, help="of each collection")
    parser.add_argument("--times", type=int, default=3, help="of which the median is shown")
    given = parser.parse_args()
    logging.getLogger("dspy").setLevel(logging.ERROR)
    # Ray runs tasks at a lower priority than this process, which would compare unlike things.
    os.environ.setdefault("RAY_worker_niceness", "0")
    with Cluster(RayRules()) as cluster:  # pyright: ignore[reportCallIssue]
        cluster.connect()  # One for all of it.
        made = table(given.calls, given.times)
    Console(width=120).print(made)
    publish("cluster", [made])


if __name__ == "__main__":
    main()
