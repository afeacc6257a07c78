"""The state of a run at one moment, as the process that works on it writes it into its folder.

    snapshot = read_snapshot(Path("runs/mine"))
    if snapshot is not None and is_alive(snapshot):
        print(snapshot.stage)

The terminal, ``cowest watch`` and ``--log json`` all show the same :class:`Snapshot`; the journal
(journal.py) keeps it.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from cowest_dspy.errors import DataError
from cowest_dspy.store.budget import Limit
from cowest_dspy.utils.reading import read_json

FILE = "progress.json"
"""The file in a run's folder."""
SCHEMA_VERSION = 1
SILENT = 30.0
"""Seconds without a write after which a process of another machine counts as gone."""

State = Literal["running", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class StageState:
    """A stage, under way or ended: ``done`` of ``total`` (None: not known) after ``seconds``.

    ``left`` is an estimate in seconds, of a stage under way. What it cost is known when it has
    ended; ``failures`` counts failed calls and answers by kind. ``earlier``: it was done by an
    earlier process. ``whole`` is False where it was left by an error or a stop.
    """

    name: str
    title: str
    seconds: float
    calls: int = 0
    cached: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    usd: float | None = 0.0
    failures: dict[str, int] = field(default_factory=dict)
    done: int = 0
    total: int | None = None
    left: float | None = None
    earlier: bool = False
    whole: bool = True


@dataclass(frozen=True)
class Best:
    """The best score on held-out examples: whose, in [0, 1], on how many answered examples."""

    name: str
    score: float
    n: int


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment, kept as ``progress.json``; times are ISO 8601 in UTC.

    ``stages`` have ended, ``now`` are under way (the outermost first). ``calls``, ``cached``,
    ``tokens`` and ``failures`` are of this process; ``calls_kept`` is what the store has, and
    ``usd`` (None: a price is not known) and ``limits`` are of the whole run. ``error`` says why it
    stopped or failed, ``signal`` is the number of the signal that stopped it, ``command`` continues
    it. ``said`` are the last messages, of ``lines`` in all.
    """

    state: State
    updated: str
    pid: int
    host: str
    process_started: float
    started: str = ""
    run: str = ""
    task: str | None = None
    verb: str | None = None
    command: str | None = None
    stages: tuple[StageState, ...] = ()
    now: tuple[StageState, ...] = ()
    calls: int = 0
    calls_kept: int = 0
    cached: int = 0
    calls_per_second: float = 0.0
    tokens: int = 0
    usd: float | None = 0.0
    failures: dict[str, int] = field(default_factory=dict)
    limits: tuple[Limit, ...] = ()
    best: Best | None = None
    said: tuple[str, ...] = ()
    lines: int = 0
    verdict: str | None = None
    error: str | None = None
    signal: int | None = None
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def stage(self) -> StageState | None:
        """The innermost stage that is under way."""
        return self.now[-1] if self.now else None

    @property
    def last(self) -> StageState | None:
        """The stage that has ended last."""
        return self.stages[-1] if self.stages else None

    @property
    def left(self) -> StageState | None:
        """The stage of this process that was left last, by an error or a stop."""
        mine = (one for one in reversed(self.stages) if not one.whole and not one.earlier)
        return next(mine, None)

    def to_dict(self) -> dict[str, Any]:
        """The snapshot as JSON values."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Snapshot:
        """The inverse of :meth:`to_dict`; keys of a newer version are ignored.

        Raises:
            ValueError: it is no state of a run.
        """
        try:
            return _ADAPTER.validate_python(dict(values))
        except (ValidationError, TypeError) as error:
            raise ValueError(f"not the state of a run: {error}") from error


_ADAPTER = TypeAdapter(Snapshot)


def read_snapshot(folder: Path) -> Snapshot | None:
    """The state in a run's folder; None where there is none, or none that can be read."""
    try:
        return Snapshot.from_dict(read_json(folder / FILE))
    except (DataError, ValueError):
        return None


def is_alive(snapshot: Snapshot) -> bool:
    """Whether the process that wrote this works on the run now; of another machine, whether it did
    a moment ago. The run's lock is not asked: the process may be about to take it."""
    if snapshot.state != "running":
        return False
    if snapshot.host == socket.gethostname():
        began = process_started(snapshot.pid)
        return began > 0 and abs(began - snapshot.process_started) < 2.0
    try:
        updated = datetime.fromisoformat(snapshot.updated).timestamp()
    except (ValueError, OverflowError):
        return False
    return time.time() - updated < SILENT


def process_started(pid: int | None = None) -> float:
    """When a process began, in seconds since 1970; 0.0 when there is none of that id. A process id
    is given out again, the two together are not."""
    import psutil

    try:
        return psutil.Process(pid or os.getpid()).create_time()
    except (psutil.Error, ValueError):  # A number that no process has.
        return 0.0


def iso(seconds: float) -> str:
    """The time as ISO 8601 in UTC, to the millisecond."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
