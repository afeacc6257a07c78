"""``--log json``: one JSON object a line on standard output, for programs; nothing else is printed
there.

Every object has these keys: ``schema_version`` (1), ``event``, ``time`` (ISO 8601, UTC), ``run``
(the folder), ``stage`` and ``title`` (of the innermost stage under way; null outside of one),
``done``, ``total`` (null: not known), ``calls``, ``cached``, ``tokens`` (of this process), ``usd``
(of the run; null: not known) and ``failures`` (by kind). What ``stage_end`` says of these numbers
is of the stage. docs/live.md says what each event adds.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from dataclasses import asdict
from typing import Any, TextIO

from cowest_dspy.optimizers.run import Silent
from cowest_dspy.store.progress import Journal, Snapshot, StageNow
from cowest_dspy.store.progress.alive import iso

SCHEMA_VERSION = 1


class JsonLines(Silent):
    """A watch that writes events. Lines are written whole, and at once.

    Args:
        out: where to; standard output.
        run: the run's folder, known before there is a journal.
    """

    def __init__(self, out: TextIO | None = None, run: str = "") -> None:
        self._out, self._run = out or sys.stdout, run
        self._lock = threading.Lock()
        self._journal: Journal | None = None
        self._told: Any = None

    def opened(self, journal: Journal) -> None:
        """Takes the numbers from this journal, and writes ``start`` when it is the first."""
        if self._journal is journal:
            return
        self._journal = journal
        now = journal.snapshot()
        facts = {key: getattr(now, key) for key in ("task", "verb", "command", "pid", "host")}
        self.event("start", now, **facts)
        journal.listen(self._heard)

    def say(self, text: str) -> None:
        """Writes ``message``."""
        self.event("message", text=text)

    def event(self, name: str, now: Snapshot | None = None, **facts: Any) -> None:
        """Writes one object: what all have, and these facts."""
        now = now or (self._journal.snapshot() if self._journal else None)
        made: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "event": name,
            **_common(now, self._run),
            **facts,
        }
        with self._lock:
            self._out.write(json.dumps(made, default=str) + "\n")
            self._out.flush()

    def _heard(self, event: str, now: Snapshot) -> None:
        if event == "stage_end":
            self._ended(now)
        elif event == "progress" and now.stage is not None:
            self._progress(now, now.stage)
        elif event == "stage_begin":
            self.event(event, now)

    def _progress(self, now: Snapshot, stage: StageNow) -> None:
        changed = (now.calls, now.cached, now.failures, stage.name, stage.done)
        if changed == self._told:
            return
        self._told = changed
        self.event(
            "progress",
            now,
            seconds=stage.seconds,
            left=stage.left,
            calls_per_second=now.calls_per_second,
            budget=[asdict(limit) for limit in now.limits],
            best=asdict(now.best) if now.best else None,
        )

    def _ended(self, now: Snapshot) -> None:
        last = now.stages[-1]
        names = (
            "title",
            "done",
            "total",
            "calls",
            "cached",
            "usd",
            "failures",
            "seconds",
            "tokens_in",
            "tokens_out",
            "whole",
        )
        numbers = {name: getattr(last, name) for name in names}
        self.event(
            "stage_end", now, stage=last.name, tokens=last.tokens_in + last.tokens_out, **numbers
        )


def _common(now: Snapshot | None, run: str) -> dict[str, Any]:
    if now is None:
        empty = {
            "stage": None,
            "title": None,
            "done": 0,
            "total": None,
            "calls": 0,
            "cached": 0,
            "tokens": 0,
            "usd": 0.0,
        }
        return {"time": iso(time.time()), "run": run, **empty, "failures": {}}
    stage = now.stage
    return {
        "time": now.updated,
        "run": now.run or run,
        "stage": stage.name if stage else None,
        "title": stage.title if stage else None,
        "done": stage.done if stage else 0,
        "total": stage.total if stage else None,
        "calls": now.calls,
        "cached": now.cached,
        "tokens": now.tokens,
        "usd": now.usd,
        "failures": now.failures,
    }
