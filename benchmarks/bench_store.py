"""What keeping an answer takes: the store's own time per call, with its sync to the disk and
without.

    make bench                        # or: python benchmarks/bench_store.py --calls 3000

The calls are asked one after another, of a model that answers at once, so that each is committed
alone: the worst case. What a plain `fsync` of 4 KiB takes on the same disk stands beside it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

from bench_collection import Scripted
from dspy.lm15 import Request
from rich.console import Console
from rich.table import Table

from cowest_dspy.store import serialize
from cowest_dspy.store.store import Store


def requests(count: int) -> list[Request]:
    """Different requests of the size of a short question with its background."""
    messages = (
        {"role": "user", "content": f"What is said of number {number}?\nBackground: {'x' * 300}"}
        for number in range(count)
    )
    return [serialize.request_from_messages("scripted/strong", [message]) for message in messages]


def kept(asked: list[Request], synchronous: str) -> float:
    """Milliseconds per call in a store whose SQLite syncs as it is told."""
    model = Scripted("strong")
    with tempfile.TemporaryDirectory() as folder, Store(folder) as store:
        store._db.execute(f"PRAGMA synchronous={synchronous}")
        started = time.perf_counter()
        for request in asked:
            store.answer(request, lambda request=request: model.complete(request))
        return 1000 * (time.perf_counter() - started) / len(asked)


def synced(times: int) -> float:
    """Milliseconds of writing 4 KiB and syncing them."""
    with (
        tempfile.TemporaryDirectory() as folder,
        (Path(folder) / "file").open("wb", buffering=0) as file,
    ):
        started = time.perf_counter()
        for _ in range(times):
            file.write(bytes(4096))
            os.fsync(file.fileno())
        return 1000 * (time.perf_counter() - started) / times


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=3000)
    asked = requests(parser.parse_args().calls)
    table = Table("", "ms per call", title=f"{len(asked):,} answers, each committed alone")
    table.add_row("in the store", f"{kept(asked, 'FULL'):.3f}")
    table.add_row("in the store, its sync off", f"{kept(asked, 'OFF'):.3f}")
    table.add_row("fsync of 4 KiB", f"{synced(len(asked)):.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
