"""Collecting on a Ray cluster: how it grows with workers, beside the same calls made by this
process alone.

    python benchmarks/bench_cluster.py                       # 1, 2, 4, 8 workers of 8 calls each,
    300 ms, three times python benchmarks/bench_cluster.py --workers 1 2 --times 1

The strong model is a server on loopback, in a process of its own, that takes 300 ms for every
answer; the weak one answers at once, so that what is measured is the way of the strong calls:
prompt, store, message to a worker, HTTP, answer, commit, score. Workers are up before the clock
runs. Ideal are workers * calls at once / 0.3 answers a second; linear is so many times one worker.
Then a model that answers at once: the most that one driver sustains. Everything shares this
machine's cores: where it bends, the CPU that a call takes says why. Medians; ratios are what
counts.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import dspy
import psutil
from bench_collection import Questions, Scripted, match
from marked import publish
from rich.console import Console
from rich.table import Table

from cowest_dspy.influence.collection import collect
from cowest_dspy.influence.trace import Sampling
from cowest_dspy.lms.config import Api, Engine
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.scale import Cluster, connection
from cowest_dspy.scale.config import RayRules, Shares
from cowest_dspy.store.store import Store
from cowest_dspy.testing import OpenAIServer

LATENCY, AT_ONCE, DRAFTS, ROUNDS = 0.3, 8, 2, 20
"""Seconds of an answer; calls at once of one worker; drafts of an example; answers that each place
of a worker gives in turn."""


KEY = "BENCH_CLUSTER_KEY"


@dataclass(frozen=True)
class Measured:
    """Strong answers a second, and CPU seconds that one of them takes: of this process, and of the
    workers."""

    rate: float
    here: float
    workers: float


def serve() -> None:
    """The strong model: prints its address, and answers until its input ends."""

    def answer(request: dict[str, Any]) -> str:
        time.sleep(LATENCY)
        return (
            request["messages"][-1]["content"].partition("Background: ")[2].partition(" ")[0]
            or "unknown"
        )

    with OpenAIServer(answer) as server:
        print(server.api_base, flush=True)
        sys.stdin.read()


def instant() -> Scripted:
    """An engine that answers at once."""
    return Scripted("strong")


def measured(strong: dspy.LM, threads: int, calls: int) -> Measured:
    """One collection of about so many strong calls, in a store of its own."""
    program = Collaboration("question -> answer").bind(weak=Scripted("weak").lm(), strong=strong)
    before = {process.pid: _cpu(process) for process in _workers()}
    with tempfile.TemporaryDirectory() as folder, Store(folder) as store:
        started, cpu = time.perf_counter(), time.process_time()
        traces = collect(
            program,
            Questions(calls // (DRAFTS + 1)),
            match,
            Sampling(DRAFTS),
            store=store,
            num_threads=threads,
        )
        seconds, here = time.perf_counter() - started, time.process_time() - cpu
        asked = store.calls() - len(traces)
        assert not any(trace.error for trace in traces)
    there = sum(_cpu(process) - before.get(process.pid, 0.0) for process in _workers())
    return Measured(asked / seconds, here / asked, there / asked)


def _workers() -> list[psutil.Process]:
    return [
        one
        for one in psutil.Process().children(recursive=True)
        if one.name().startswith("ray::Worker")
    ]


def _cpu(process: psutil.Process) -> float:
    try:
        used = process.cpu_times()
    except psutil.Error:
        return 0.0
    return used.user + used.system


def on_ray(settings: Api | Engine, workers: int, calls: int, times: int) -> list[Measured]:
    """Measurements with so many workers, after a first one that only warms up."""
    with Cluster(RayRules()) as cluster:  # pyright: ignore[reportCallIssue]
        lm = cluster.lm(settings, Shares(workers=workers, cpus=0.1))  # pyright: ignore[reportCallIssue]
        threads = workers * settings.concurrency
        started = time.perf_counter()
        while cluster.ready < workers:
            measured(lm, threads, 3 * threads)
        print(
            f"{workers} workers were ready after {time.perf_counter() - started:.0f} s",
            file=sys.stderr,
        )
        return [measured(lm, threads, calls) for _ in range(times)]


def median(found: Sequence[Measured]) -> Measured:
    """That with the median rate."""
    return next(
        one for one in found if one.rate == statistics.median_low([one.rate for one in found])
    )


def latency(base: str, workers: Sequence[int], times: int) -> Table:
    """A strong model of 300 ms."""
    from cowest_dspy.lms import build_lm

    table = Table(
        title=f"a strong model that takes {LATENCY * 1000:.0f} ms, {AT_ONCE} calls at once for "
        "each worker"
    )
    for column in (
        "workers",
        "ideal/s",
        "local/s",
        "ray/s",
        "ray of ideal",
        "ray of linear",
        "spread",
        "CPU ms here",
        "CPU ms workers",
    ):
        table.add_column(column, justify="right")
    one = None
    for many in workers:
        at_once = AT_ONCE * many
        settings = Api(
            kind="api", model="openai/scripted", api_base=base, api_key_env=KEY, concurrency=AT_ONCE
        )  # pyright: ignore[reportCallIssue]
        calls = ROUNDS * at_once
        local = median([measured(build_lm(settings), at_once, calls) for _ in range(times)])
        found = on_ray(settings, many, calls, times)
        ray = median(found)
        one = one or ray.rate / many
        rates = sorted(each.rate for each in found)
        table.add_row(
            str(many),
            f"{at_once / LATENCY:.0f}",
            f"{local.rate:.1f}",
            f"{ray.rate:.1f}",
            f"{ray.rate * LATENCY / at_once:.2f}",
            f"{ray.rate / many / one:.2f}",
            f"{rates[0]:.0f}-{rates[-1]:.0f}",
            f"{ray.here * 1000:.1f} ({local.here * 1000:.1f})",
            f"{ray.workers * 1000:.1f}",
        )
    return table


def ceiling(times: int) -> Table:
    """A model that answers at once: what one driver sustains."""
    table = Table(title="a model that answers at once: the driver's own limit")
    for column in ("", "calls/s", "CPU ms here", "CPU ms workers"):
        table.add_column(column, justify="left" if not column else "right")
    settings = Engine(
        kind="engine", engine=f"{__file__}:instant", model="scripted/strong", concurrency=16
    )  # pyright: ignore[reportCallIssue]
    local = median([measured(Scripted("strong").lm(), 32, 4000) for _ in range(times)])
    ray = median(on_ray(settings, 2, 4000, times))
    for name, one in (("local, 32 threads", local), ("ray, 2 workers of 16", ray)):
        table.add_row(
            name, f"{one.rate:.0f}", f"{one.here * 1000:.2f}", f"{one.workers * 1000:.2f}"
        )
    return table


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument(
        "--times", type=int, default=3, help="measurements, of which the median is shown"
    )
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve()
        return
    logging.getLogger("dspy").setLevel(logging.ERROR)
    console = Console(width=150)
    os.environ[KEY] = "opens-nothing"
    command = [sys.executable, __file__, "--serve"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        connection.join(None)  # One cluster for all of it.
        try:
            made = [
                latency(server.stdout.readline().strip(), given.workers, given.times),
                ceiling(given.times),
            ]
            for table in made:
                console.print(table)
            publish("cluster", made)
        finally:
            connection.leave()
            server.communicate("")


if __name__ == "__main__":
    main()
