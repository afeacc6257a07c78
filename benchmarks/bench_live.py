"""What looking on costs: a collection with and without the live display, with models that cost
nothing.

    python benchmarks/bench_live.py                    # 4,000 drafts, each way 5 times
    python benchmarks/bench_live.py --traces 1000 --times 3

The models are functions in this process that answer at once, so that nothing hides what the display
takes; a real model is thousands of times slower. Each row is a collection of its own in the store,
one after the other and round and round, so that a machine that slows down slows all of them. The
terminal is a real one (a pseudo-terminal whose other end is read and thrown away). "Watched" is the
display with `cowest watch` on the same run in another process. What counts is the ratio of CPU
seconds of this process, and that of seconds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench_collection import DRAFTS, Questions, Scripted, match
from rich.console import Console
from rich.table import Table

from cowest_dspy.cli.progress import Progress, view
from cowest_dspy.influence.collection import collect
from cowest_dspy.influence.trace import Sampling
from cowest_dspy.optimizers.run import NoProgress, RunContext
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.store.journal import Journal
from cowest_dspy.store.store import Store

WAYS = ("no stage", "silent", "plain", "terminal", "json", "terminal, watched")


@contextmanager
def terminal() -> Iterator[Console]:
    """A console on a pseudo-terminal."""
    ours, theirs = os.openpty()
    pty_closed = threading.Event()

    def drain() -> None:
        while not pty_closed.is_set():
            try:
                os.read(ours, 65536)
            except OSError:
                return

    reader = threading.Thread(target=drain, daemon=True)
    reader.start()
    with os.fdopen(theirs, "w") as file:
        yield Console(file=file, force_terminal=True, width=120, height=40, highlight=False)
    pty_closed.set()
    os.close(ours)


def taken(way: str, traces: int) -> tuple[float, float]:
    """Seconds, and CPU seconds of this process, of one collection."""
    program = Collaboration("question -> answer").bind(
        weak=Scripted("weak").lm(), strong=Scripted("strong").lm()
    )
    examples = Questions(traces // DRAFTS)
    with (
        tempfile.TemporaryDirectory() as folder,
        terminal() as console,
        open(os.devnull, "w", encoding="utf-8") as nothing,
    ):
        run = Path(folder) / "run"
        shown = {
            "silent": NoProgress(),
            "plain": Progress("plain", screen=Console(file=nothing)),
            "json": Progress("json", out=nothing),
        }
        progress = shown.get(way) or Progress(screen=console)
        watching = None
        if way.endswith("watched"):
            command = [sys.executable, "-m", "cowest_dspy.cli.main", "watch", str(run)]
            watching = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            time.sleep(3)
        with Store(run) as store:
            began, cpu = time.perf_counter(), time.process_time()
            if way == "no stage":
                collect(program, examples, match, Sampling(DRAFTS), store=store)
            else:
                with RunContext(store, progress).stage("collect", "Collecting drafts") as at:
                    collect(
                        program,
                        examples,
                        match,
                        Sampling(DRAFTS),
                        store=store,
                        on_progress=at,
                    )
            found = time.perf_counter() - began, time.process_time() - cpu
        if watching is not None:
            watching.wait(timeout=60)
        return found


def parts(times: int = 200) -> str:
    """CPU milliseconds of one drawing (four a second), and of one writing of the state (one a
    second)."""
    with tempfile.TemporaryDirectory() as folder, terminal() as console:
        journal = Journal(Path(folder))
        with journal.stage("collect", "Collecting drafts") as here:
            here.at(3, 10)
            began = time.process_time()
            for _ in range(times):
                console.print(view(journal.snapshot()))
            drawn = time.process_time()
            for _ in range(times):
                journal.write()
            written = time.process_time()
        journal.close()
    each = [1000 * (drawn - began) / times, 1000 * (written - drawn) / times]
    load = (4 * each[0] + each[1]) / 10
    return (
        f"one drawing {each[0]:.2f} ms, one writing of the state {each[1]:.2f} ms of CPU: "
        f"together {load:.1f} % of a core"
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traces", type=int, default=4000)
    parser.add_argument("--times", type=int, default=5)
    given = parser.parse_args()
    taken("silent", 200)  # imports, and what is computed once
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for _ in range(given.times):
        for way in WAYS:
            found[way].append(taken(way, given.traces))
    table = Table(title=f"{given.traces:,} drafts, median of {given.times}")
    for head in ("looking on", "seconds", "to silent", "CPU seconds", "to silent"):
        table.add_column(head, justify="left" if head == "looking on" else "right")
    silent = [statistics.median(one[place] for one in found["silent"]) for place in (0, 1)]
    for way in WAYS:
        wall, cpu = (statistics.median(one[place] for one in found[way]) for place in (0, 1))
        table.add_row(
            way, f"{wall:.2f}", f"{wall / silent[0]:.3f}", f"{cpu:.2f}", f"{cpu / silent[1]:.3f}"
        )
    Console().print(table)
    print(parts())


if __name__ == "__main__":
    main()
