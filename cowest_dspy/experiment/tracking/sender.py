"""A process that talks to one tracker: it reads names of job files, one a line, and answers each by
one line of JSON.

    python -P -m cowest_dspy.experiment.tracking.sender < jobs

It is a process of its own so that a tracker that hangs holds up nobody and can be ended, and so
that what trackers keep for a whole process (an active run, what they print) does not meet that of
the user, or of a training that reports by itself. It ends when its input does, so also when we are
gone.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cowest_dspy.errors import masked

LONGEST = 400


def answer(job: Mapping[str, Any]) -> dict[str, Any]:
    """What the tracker made of a job: {"ledger": ..., "where": ...}, or {"error": ...}."""
    if job["tracker"] == "mlflow":
        from cowest_dspy.experiment.tracking.to_mlflow import send
    else:
        from cowest_dspy.experiment.tracking.to_others import send
    try:
        return send(job)
    except Exception as error:  # Of a tracker, all are the same to a run: it goes on, and says so.
        return {"error": masked(f"{type(error).__name__}: {error}")[:LONGEST]}


def main() -> None:
    """Answers jobs until there are no more."""
    os.nice(5)
    # Trackers print; only answers may stand where they are read.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        made = answer(json.loads(Path(line.strip()).read_text(encoding="utf-8")))
        answers.write(json.dumps(made) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
