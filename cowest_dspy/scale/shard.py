"""A shard: some examples of a collection, collected by the ordinary ``collect`` into a store of
their own.

The store is a folder under the run's folder, on storage that all nodes share. So a shard whose node
is lost runs again elsewhere and asks only for what its store has not; and whatever ends a run, the
next one takes over what the shards have left (:func:`merge_shards`).
"""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import dspy

from cowest_dspy.errors import ClusterError, StoreError
from cowest_dspy.influence.collection import Tally, collect
from cowest_dspy.influence.metric import Metric
from cowest_dspy.influence.trace import Sampling
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.scale.coordinator import (
    Coordinator,
    RemoteCoordinator,
    Report,
    SharedGuard,
    SharedLimits,
)
from cowest_dspy.store.call_context import Stopping, joining
from cowest_dspy.store.rate_limit import share_limits
from cowest_dspy.store.serialize import digest
from cowest_dspy.store.store import Store

T = TypeVar("T")
Build = Callable[[], tuple[Collaboration, Metric]]
"""Makes a program that is bound to its models, and a metric; called in every task."""

FOLDER, KNOWN = "shards", "known.sqlite"
LARGEST = 1000
"""Examples of a shard, unless the number of shards is said."""
BEAT = 0.5
"""Seconds between two reports of a shard."""
IN_USE = 120.0
"""Seconds in which a process on a node that was given up must have ended."""


@dataclass(frozen=True)
class Shard:
    """Examples that follow each other, and the folder of their store. ``name`` is of their
    content."""

    name: str
    folder: Path
    examples: list[dspy.Example]


@dataclass(frozen=True)
class Work:
    """What is done with every shard of a collection.

    build: makes the program and the metric. sampling: as of ``collect``. strong: the strong model's
        id. stage: under which calls are booked. known: answers that the run has already, in a file.
    limited: whether there is a budget. options: of ``collect``.
    """

    build: Build
    sampling: Sampling
    strong: str
    stage: str
    known: Path | None
    limited: bool
    options: dict[str, Any]


def split(
    examples: Sequence[dspy.Example], number: int | None, at_once: int, folder: Path
) -> list[Shard]:
    """Examples as shards of equal size (or one less), in order: ``number`` of them, by default as
    many as run at once, of 1,000 examples at most."""
    count = number or max(at_once, -(-len(examples) // LARGEST))
    count = min(count, len(examples))
    ends = [len(examples) * place // max(count, 1) for place in range(count + 1)]
    shards: list[Shard] = []
    for start, end in pairwise(ends):
        part = [examples[place] for place in range(start, end)]
        name = digest([example.id for example in part])
        shards.append(Shard(name, folder.resolve() / FOLDER / name, part))
    return shards


def collect_shard(
    shard: Shard, work: Work, coordinator: Coordinator | RemoteCoordinator
) -> dict[str, int] | None:
    """Collects a shard into its store. Gives ``saved`` of its traces; None where it was stopped.

    Raises:
        ClusterError: the run's folder is not here.
        StoreError, BudgetError, ...: as ``collect``.
    """
    if not shard.folder.is_dir():
        raise ClusterError(
            f"The node {socket.gethostname()} does not see {shard.folder.parents[1]}: the run's "
            "folder must be "
            "on storage that all nodes share, under the same path. Give another one with --run."
        )
    if not coordinator.begin(shard.name):
        return None
    share_limits(lambda endpoint: SharedLimits(coordinator, shard.name, endpoint))
    program, metric = work.build()
    try:
        with _when_free(lambda: Store(shard.folder, known=work.known)) as store:
            store.guard = SharedGuard(coordinator, work.strong, limited=work.limited)
            store.stage = work.stage
            with _reporting(coordinator, shard) as here:
                made = collect(
                    program,
                    shard.examples,
                    metric,
                    work.sampling,
                    store=store,
                    max_errors=here.tally,
                    on_progress=here.at,
                    **work.options,
                )
            coordinator.report(shard.name, here.report())
            return made.saved
    except KeyboardInterrupt:
        return None


class _Here:
    """How far this shard is."""

    def __init__(self) -> None:
        self.examples, self.tally = 0, Tally(1.0)  # Whether too many failed is seen over all.

    def at(self, done: int, total: int) -> None:
        self.examples = done

    def report(self) -> Report:
        return Report(self.examples, self.tally.plus([]))


@contextmanager
def _reporting(coordinator: Coordinator | RemoteCoordinator, shard: Shard) -> Iterator[_Here]:
    """Reports how far the shard is, twice a second; stops what is inside when it may not go on."""
    here, ended, stopping = _Here(), threading.Event(), Stopping()

    def beat() -> None:
        while not ended.wait(BEAT):
            try:
                if not coordinator.report(shard.name, here.report()):
                    stopping.stop()
            except Exception:  # The driver is gone, and with it the run.
                stopping.stop()

    thread = threading.Thread(target=beat, name="cowest-shard", daemon=True)
    thread.start()
    try:
        with joining(stopping):
            yield here
    finally:
        ended.set()
        thread.join()


def _when_free(action: Callable[[], T]) -> T:
    """What ``action`` gives, when a process that was given up has let go of its shard's store."""
    end = time.monotonic() + IN_USE
    while True:
        try:
            return action()
        except StoreError as error:
            if "in use" not in str(error) or time.monotonic() > end:
                raise
        time.sleep(1.0)


def prepare_known(store: Store) -> Path | None:
    """The answers that a run has, as a file for its shards; None where it has none."""
    if not store.calls():
        return None
    path = store.root.folder.resolve() / FOLDER / KNOWN
    path.parent.mkdir(parents=True, exist_ok=True)
    store.root.copy_calls(path)
    return path


def merge_shard(store: Store, folder: Path, *, kinds: Sequence[str] = ()) -> None:
    """Takes a shard's store over into the run's, and removes it.

    Raises:
        StoreError: it is in use, damaged, or not there.
    """
    if not (folder / "run.sqlite").is_file():
        raise StoreError(f"There is no store of a shard in {folder}.")
    _when_free(lambda: store.merge(folder, kinds=kinds))
    shutil.rmtree(folder)


def merge_shards(store: Store) -> None:
    """Takes over the calls of shards that an earlier process has left: they are the run's, whether
    it goes on here or on a cluster."""
    root = store.root.folder / FOLDER
    if not root.is_dir():
        return
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        if (folder / "run.sqlite").is_file():
            merge_shard(store, folder)
    shutil.rmtree(root)
    recount(store)


def recount(store: Store) -> None:
    """Has the run's budget know of what shards have spent."""
    if store.guard is not None:
        store.guard.bill = store.bill(store.guard.strong)
