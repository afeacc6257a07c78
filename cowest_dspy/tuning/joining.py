"""What the machines after the first do: they take part in the trainings that the first begins, and
write nothing of the run.

    join(Path("shared/run"), machines("programs/accelerate/several_nodes.yaml"), print)

The run's folder is on a file system that all machines see. The first machine's process works on the
run; what it writes there (progress.json, and the job of a training) is all that the others need to
know.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cowest_dspy.errors import TuningError
from cowest_dspy.store.progress import Snapshot, alive, read_snapshot
from cowest_dspy.tuning.cluster import Machines
from cowest_dspy.tuning.launching import SPEC, run

POLL = 1.0
"""Seconds between two looks at the run's folder."""


def join(
    folder: Path,
    where: Machines,
    say: Callable[[str], None] = lambda text: None,
    poll: float = POLL,
) -> int:
    """Waits for the first machine, computes in each of its trainings, and ends when it does. Gives
    how many trainings that were.

    ``folder``: the run's. ``poll``: seconds between two looks.

    Raises:
        TuningError: this is the first machine; or a training failed here, told when the first
            machine has ended.
    """
    if where.rank == 0:
        raise TuningError("This is the first machine: it works on the run, and joins nobody.")
    joined: set[str] = set()
    seen, failed = False, None
    say(
        f"machine {where.rank} of {where.count}, counted from 0: waiting for the first one to "
        f"work on {folder}"
    )
    while True:
        first = read_snapshot(folder)
        if first is None or not alive(first):
            if seen:
                break
            time.sleep(poll)
            continue
        seen = True
        job = next(
            (job for job, spec in _jobs(folder) if str(job) not in joined and _is_of(spec, first)),
            None,
        )
        if job is None:
            time.sleep(poll)
            continue
        joined.add(str(job))
        say(
            f"training: {job.parent.name}/{job.name.split('.')[1]}, {where.here} processes here "
            f"of {where.processes}"
        )
        try:
            with tempfile.TemporaryDirectory(prefix="cowest-") as own:
                run(job, where, own=Path(own), wanted=lambda job=job: (job / SPEC).is_file())
        except TuningError as error:
            failed = error
            say(f"failed here: {error}")
    if failed:
        raise failed
    return len(joined)


def _jobs(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The jobs that stand in a run's folder, the newest first, each with what is to be trained."""
    found: list[tuple[Path, dict[str, Any]]] = []
    for file in folder.glob(f"**/adapters/.*.tmp/{SPEC}"):
        try:
            found.append((file.parent, json.loads(file.read_text(encoding="utf-8"))))
        except (OSError, ValueError):  # It has just ended.
            continue
    return sorted(found, key=lambda one: -one[1]["begun"])


def _is_of(spec: dict[str, Any], first: Snapshot) -> bool:
    """Whether the process that works on the run now has begun it; a killed one may have left
    another."""
    return spec["by"] == [first.host, first.pid, first.process_started]
