"""How a run grows: service times measured here, a simulation that has to reproduce measured points
first, then 10 million examples.

    python benchmarks/simulate.py                # measures (some minutes), simulates, writes
        docs/scale.md and docs/scale.svg
    python benchmarks/simulate.py --dry          # measures less, and writes nothing
    python benchmarks/simulate.py --again        # simulates anew from the measured times in
        docs/scale.json

Measured here: collect() on scripted models that answer at once (the driver's own time), the store,
a commit, bytes on the disk, and collect() with a strong model that takes 300 ms. What was measured
without a store, and in it with 1 and 8 threads, fixes the simulation's times; the rest it has to
come out at, and the error stands beside it. What GPUs and an API do is assumed, and said so.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bench_collection import DRAFTS, LATENCY, Questions, Scripted, apart, match
from bench_store import kept, requests
from simulate_page import Column, Page, tables, write
from simulation import Load, Times, simulate

from cowest_dspy.influence.collection import collect, under_way
from cowest_dspy.influence.trace import Sampling
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.store.store import Store

ROOT = Path(__file__).resolve().parent.parent
CALLS = 2 + 1 / DRAFTS
"""Calls of a trace: a draft, its refinement, a part of the answer alone."""
NODES = (1, 10, 100, 1000)
EXAMPLES = (10_000, 100_000, 1_000_000, 10_000_000)
WINDOW = 6
"""Examples that are simulated for each that is under way at once; what is more is the same again.
"""
STEPS = (1, 8, 128, 512)
"""Threads at which the driver's own time is measured; between them it is interpolated over the
logarithm."""


@dataclass(frozen=True)
class Measured:
    """What was measured here: seconds of a call without a store, at each of ``STEPS`` threads,
    seconds of keeping an answer without its commit, of one thread and where several want the
    processor (a thread that comes back from the disk then waits for its turn), of a commit, bytes
    of a trace on the disk; and the points to be reproduced."""

    call: list[float]
    keep: list[float]
    sync: float
    bytes: float
    points: list[dict[str, float]]

    def times(self, threads: int, strong: float = 0.0) -> Times:
        """The simulation's times of collect() with so many threads."""
        return Times(self.call_with(threads), self.keep[threads > 1], self.sync, 0.0, strong)

    def call_with(self, threads: int) -> float:
        """Seconds of a call with so many threads; above the most that were measured, as with
        these."""
        place = math.log2(max(1, threads))
        steps = [math.log2(step) for step in STEPS]
        for (low, first), (high, second) in itertools.pairwise(zip(steps, self.call, strict=True)):
            if place <= high:
                return first + (second - first) * (place - low) / (high - low)
        return self.call[-1]


@dataclass(frozen=True)
class Assumed:
    """What nobody could measure here. Of each node: drafts a second (on a GPU), strong calls under
    way. Of the strong model: seconds of an answer and their spread, calls a minute that are
    allowed; tokens of a call in and out, and USD per million of them. ``by_processor`` was measured
    elsewhere: drafts a second on two processor cores (README.md here)."""

    drafts: float = 100.0
    by_processor: float = 12.0
    slots: int = 16
    latency: float = 2.0
    spread: float = 0.5
    limit: float = 10_000.0
    tokens: tuple[float, float] = (400.0, 100.0)
    usd: tuple[float, float] = (0.4, 1.6)


def measure(traces: int, times: int, points: Sequence[int]) -> Measured:
    """Measures the driver, the store and the points.

    Each number is the median of so many runs in processes of their own, which take turns, so that
    other work on the machine slows all of them alike.
    """
    plain = [("collect, no store", traces, threads) for threads in STEPS]
    stored = [("collect, in the store", traces, threads) for threads in (1, 8, 32)]
    slow = [("latency", 5 * threads * DRAFTS, threads) for threads in points]
    seconds: dict[tuple[str, int, int], list[float]] = {one: [] for one in (*plain, *stored, *slow)}
    off: list[float] = []
    for _ in range(times):
        for one, taken in seconds.items():
            found = apart(*one)
            if found is None:
                raise SystemExit(f"{one[0]} could not be run with {one[2]} threads")
            taken.append(found["seconds"])
        off.append(kept(requests(2000), "OFF") / 1000)
    median = {one: statistics.median(taken) for one, taken in seconds.items()}
    calls = traces * CALLS
    call = [median[one] / calls for one in plain]
    # Without its sync the store only computes. What else the store adds to a run of one thread is
    # waiting for the disk.
    added = max(0.0, median[stored[0]] / calls - call[0])
    keep = min(statistics.median(off), added)
    several = max(keep, median[stored[1]] / calls - call[1])
    latency = {"latency": LATENCY}
    found_points = [
        {
            "threads": one[2],
            "latency": latency.get(one[0], 0.0),
            "traces": one[1],
            "seconds": median[one],
        }
        for one in (*stored[2:], *slow)
    ]
    return Measured(call, [keep, several], added - keep, bytes_of(traces), found_points)


def bytes_of(traces: int) -> float:
    """Bytes on the disk for each trace: the run's folder, prompts and answers as they are in the
    benchmark of collecting."""
    program = Collaboration("question -> answer").bind(
        weak=Scripted("weak").lm(), strong=Scripted("strong").lm()
    )
    with tempfile.TemporaryDirectory() as folder:
        with Store(folder) as store:
            collect(
                program,
                Questions(traces // DRAFTS),
                match,
                Sampling(DRAFTS),
                store=store,
                num_threads=8,
            )
        return (
            sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file()) / traces
        )


def reproduced(found: Measured, seed: int) -> list[dict[str, float]]:
    """The measured points with what the simulation makes of them."""
    rows: list[dict[str, float]] = []
    for point in found.points:
        threads = int(point["threads"])
        weak, ahead = under_way(threads, DRAFTS)
        load = Load(int(point["traces"]) // DRAFTS, DRAFTS, threads, weak, ahead=ahead)
        made = simulate(load, found.times(threads, point["latency"]), seed)
        rows.append(
            {
                **point,
                "simulated": made.seconds,
                "error": made.seconds / point["seconds"] - 1,
                "busy": made.busy["driver"],
            }
        )
    return rows


@dataclass(frozen=True)
class Case:
    """A way to run: its name, what a node's weak model does, strong calls under way for each node,
    the limit of calls a second, and nodes for each driver (None: one driver for all)."""

    name: str
    drafts: float
    slots: int
    limit: float | None = None
    nodes_of_a_driver: int | None = None

    def outcome(self, found: Measured, given: Assumed, nodes: int, seed: int) -> Column:
        """The case on so many nodes."""
        strong, rate = self.slots * nodes, self.drafts * nodes
        # Drafts are made in batches: as many slots as give the rate when a batch takes as long as a
        # strong answer half.
        weak = max(1, round(rate * given.latency / 2))
        drivers = max(1, nodes // self.nodes_of_a_driver) if self.nodes_of_a_driver else 1
        times = replace(
            found.times(strong // drivers, given.latency), weak=weak / rate, spread=given.spread
        )
        load = Load(0, DRAFTS, strong, weak, self.limit, drivers)
        made = simulate(replace(load, examples=max(400, WINDOW * load.room)), times, seed)
        return Column(self.name, drivers, nodes, made)


def columns(
    found: Measured, given: Assumed, seed: int, nodes: Sequence[int] = NODES
) -> list[Column]:
    """Throughput by nodes: with a rate limit, without one, with the weak model on processors, and
    with several drivers."""
    cases = [
        Case(
            f"one driver, an API of {given.limit:,.0f} calls a minute",
            given.drafts,
            given.slots,
            given.limit / 60,
        ),
        Case("one driver, no limit", given.drafts, given.slots),
        Case(
            "one driver, no limit, the weak model on two cores a node",
            given.by_processor,
            2 * given.slots,
        ),
        Case(
            "a driver for every 25 nodes, no limit", given.drafts, given.slots, nodes_of_a_driver=25
        ),
    ]
    return [case.outcome(found, given, count, seed) for case in cases for count in nodes]


def page(found: Measured, given: Assumed, seed: int, nodes: Sequence[int] = NODES) -> Page:
    """All that the page says."""
    return Page(
        asdict(found),
        asdict(given),
        reproduced(found, seed),
        columns(found, given, seed, nodes),
        EXAMPLES,
        DRAFTS,
        CALLS,
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--traces", type=int, default=2000, help="of each measurement without a slow model"
    )
    parser.add_argument(
        "--times", type=int, default=3, help="runs of each measurement; the median counts"
    )
    parser.add_argument(
        "--drafts",
        type=float,
        default=Assumed.drafts,
        help="assumed: drafts a second of a node's weak model",
    )
    parser.add_argument(
        "--slots",
        type=int,
        default=Assumed.slots,
        help="assumed: strong calls under way for each node",
    )
    parser.add_argument(
        "--latency", type=float, default=Assumed.latency, help="assumed: seconds of a strong answer"
    )
    parser.add_argument(
        "--limit",
        type=float,
        default=Assumed.limit,
        help="assumed: strong calls a minute that an API allows",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--dry", action="store_true", help="measure little, simulate up to 100 nodes, write nothing"
    )
    parser.add_argument(
        "--again", action="store_true", help="take the measured times from docs/scale.json"
    )
    given = parser.parse_args()
    assumed = Assumed(
        drafts=given.drafts, slots=given.slots, latency=given.latency, limit=given.limit
    )
    kept_in = ROOT / "docs/scale.json"
    if given.again:
        found = Measured(**json.loads(kept_in.read_text(encoding="utf-8")))
    else:
        found = (
            measure(800, 1, (8, 32))
            if given.dry
            else measure(given.traces, given.times, (8, 32, 128, 512))
        )
    if not given.dry:
        kept_in.write_text(json.dumps(asdict(found), indent=2) + "\n", encoding="utf-8")
    made = page(found, assumed, given.seed, NODES[:-1] if given.dry else NODES)
    print(tables(made))
    if not given.dry:
        write(made, ROOT / "docs/scale.md", ROOT / "docs/scale.svg")


if __name__ == "__main__":
    main()
