"""Whether the process that works on a run is still there: asked of the system, never of the run's
lock, which it may be about to take."""

from __future__ import annotations

import os
import socket
import time
from datetime import UTC, datetime

from cowest_dspy.store.progress.snapshot import Snapshot

SILENT = 30.0
"""Seconds without a sign of life after which a process of another machine counts as gone: it gives
one every few seconds."""
_SAME = 2.0


def process_started(pid: int | None = None) -> float:
    """When a process began, in seconds since 1970; 0.0 when there is none of that id. A process id
    is given out again, the two together are not."""
    import psutil

    try:
        return psutil.Process(pid or os.getpid()).create_time()
    except (psutil.Error, ValueError):  # A number that no process has.
        return 0.0


def alive(snapshot: Snapshot) -> bool:
    """Whether the process that wrote this is at work on the run now; of another machine, whether it
    was a moment ago."""
    if snapshot.state != "running":
        return False
    if snapshot.host == socket.gethostname():
        began = process_started(snapshot.pid)
        return began > 0 and abs(began - snapshot.process_started) < _SAME
    return time.time() - seconds_of(snapshot.updated) < SILENT


def seconds_of(moment: str) -> float:
    """Seconds since 1970 of an ISO 8601 time; 0.0 where it is none."""
    try:
        return datetime.fromisoformat(moment).timestamp()
    except (ValueError, OverflowError):
        return 0.0


def iso(seconds: float) -> str:
    """The time as ISO 8601 in UTC, to the millisecond."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
