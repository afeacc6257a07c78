"""The states of runs, read from their folders, never disturbing who works on them.

    for folder in run_folders(Path("runs")):
        print(describe_run(folder).state)

Nothing is locked and nothing is written: the state is in progress.json, whether its process lives
is asked of the system, and the store is opened for reading only. What cannot be read is a state of
its own, and no exception.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from cowest_dspy.errors import ConfigError, ReportError, nearest
from cowest_dspy.store.progress import FILE, Snapshot, StageState, is_alive, read_snapshot
from cowest_dspy.store.schema import EMPTIED, is_emptied
from cowest_dspy.utils.reading import parse_json, read_toml

STORE, CONFIG, REPORT = "run.sqlite", "config.toml", "report.json"
DEPTH = 3
"""Levels below a folder in which runs are looked for."""
State = Literal["running", "finished", "stopped", "failed", "empty", "damaged", "unknown"]


@dataclass(frozen=True)
class RunLine:
    """A run in a list. ``stage`` is the one under way or left, else the last that ended; ``calls``
    and ``usd`` are of the whole run; ``changed`` is ISO 8601 in UTC; ``detail`` says what the state
    does not."""

    run: str
    state: State
    detail: str = ""
    task: str | None = None
    stage: str | None = None
    done: int | None = None
    total: int | None = None
    calls: int | None = None
    usd: float | None = None
    changed: str | None = None
    verdict: str | None = None
    pid: int | None = None
    host: str | None = None


@dataclass(frozen=True)
class StoreSummary:
    """The contents of a store: answers, what they cost (None: not known), and its stages; or
    how it is damaged."""

    calls: int = 0
    usd: float | None = 0.0
    stages: tuple[StageState, ...] = ()
    records: int = 0
    damage: str = ""


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's."""
    return any((folder / name).is_file() for name in (STORE, FILE, "run.lock"))


def suggest_run(folder: Path) -> str:
    """`` Did you mean "runs/a"?`` for the run beside a folder whose name is nearest to its own, or
    an empty string."""
    other = nearest(folder.name, (one.name for one in run_folders(folder.parent, depth=1)))
    return (
        other.replace('"', f'"{folder.parent}/', 1) if other and folder.parent != Path() else other
    )


def run_folders(folder: Path, depth: int = DEPTH) -> Iterator[Path]:
    """The runs in a folder and below it, by name; the folder itself when it is one. The parts of a
    run (variants) are none."""
    if is_run(folder):
        yield folder
        return
    try:
        inside = sorted(
            one for one in folder.iterdir() if one.is_dir() and not one.name.startswith(".")
        )
    except OSError:
        return
    for one in inside:
        if depth > 1:
            yield from run_folders(one, depth - 1)
        elif is_run(one):
            yield one


def describe_run(folder: Path) -> RunLine:
    """Describe the state of one run."""
    now, summary = read_snapshot(folder), summarize_store(folder, numbers=False)
    common: dict[str, Any] = {"task": _task(folder), "changed": _changed(folder)}
    if summary.damage:
        detail = f"{summary.damage}: cowest doctor --repair {folder}"
        return RunLine(str(folder), "damaged", detail, **common)
    if now is None:
        return _describe_store(folder, common)
    stage = now.stage
    lives = is_alive(now)
    state: State = now.state if now.state != "running" or lives else "stopped"
    if state == "finished" and not summary.records and not summary.calls:
        state = "empty"
    last = stage or now.last
    numbers = {"done": stage.done, "total": stage.total} if stage else {}
    where = {"pid": now.pid, "host": now.host} if lives else {}
    return RunLine(
        str(folder),
        state,
        _describe_state(now, lives=lives),
        **{**common, "task": now.task or common["task"]},
        stage=last.name if last else None,
        **numbers,
        calls=now.calls_kept,
        usd=now.usd,
        verdict=now.verdict or _verdict(folder),
        **where,
    )


def _describe_state(now: Snapshot, *, lives: bool) -> str:
    if now.state == "running":
        return (
            f"process {now.pid} on {now.host}"
            if lives
            else f"process {now.pid} on {now.host} is gone without a word"
        )
    if now.state == "finished":
        return now.verb or ""
    return (now.error or "").splitlines()[0] if now.error else ""


def _describe_store(folder: Path, common: dict[str, Any]) -> RunLine:
    """A run of an earlier version, which has kept no progress; or one that was not begun."""
    summary = summarize_store(folder)
    verdict = _verdict(folder)
    state: State = (
        "finished" if verdict else "unknown" if summary.calls or summary.records else "empty"
    )
    detail = "of an earlier version: not known whether it runs" if state == "unknown" else ""
    last = summary.stages[-1].name if summary.stages else None
    return RunLine(
        str(folder),
        state,
        detail,
        **common,
        stage=last,
        calls=summary.calls,
        usd=summary.usd,
        verdict=verdict,
    )


def summarize_store(folder: Path, *, numbers: bool = True) -> StoreSummary:
    """Summarize the store of a run; without ``numbers`` only what costs nothing, however large it
    is."""
    path = folder / STORE
    if is_emptied(path):
        return StoreSummary(damage=EMPTIED)
    if not path.is_file() or not path.stat().st_size:
        return StoreSummary()
    # Without its log nobody has it open, and nothing need be made beside it to read it.
    mode = "mode=ro" if path.with_name(f"{STORE}-wal").exists() else "mode=ro&immutable=1"
    try:
        with closing(
            sqlite3.connect(f"{path.resolve().as_uri()}?{mode}", uri=True, timeout=1.0)
        ) as db:
            return _summarize(db, numbers=numbers)
    except sqlite3.Error as error:
        # Being made, or left by a kill while it was: whoever opens it next to write puts it right.
        if getattr(error, "sqlite_errorname", "").startswith(
            ("SQLITE_READONLY", "SQLITE_BUSY", "SQLITE_CANTOPEN")
        ):
            return StoreSummary()
        return StoreSummary(damage=str(error))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        return StoreSummary(damage=f"a record that cannot be read, {type(error).__name__}")


def _summarize(db: sqlite3.Connection, *, numbers: bool) -> StoreSummary:
    if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'records'").fetchone():
        return StoreSummary()
    records = db.execute(
        "SELECT kind, key, value FROM records WHERE kind = 'stage' ORDER BY rowid"
    ).fetchall()
    stages = tuple(_stage(key, parse_json(value)) for _, key, value in records)
    some = db.execute("SELECT 1 FROM records LIMIT 1").fetchone()
    if not numbers:
        known = db.execute("SELECT 1 FROM calls LIMIT 1").fetchone()
        return StoreSummary(calls=1 if known else 0, stages=stages, records=1 if some else 0)
    newer = any(row[1] == "usd" for row in db.execute("PRAGMA table_info(calls)"))
    calls = db.execute("SELECT count(*) FROM calls").fetchone()[0]
    usd = None
    if newer:
        total, priced, paid = db.execute(
            "SELECT sum(usd), count(usd), count(*) FROM calls WHERE attempts > 0"
        ).fetchone()
        usd = (total or 0.0) if priced == paid else None
    return StoreSummary(calls, usd, stages, 1 if some else 0)


def _stage(name: str, record: dict[str, Any]) -> StageState:
    numbers = {key: record[key] for key in ("seconds", "calls", "tokens_in", "tokens_out", "usd")}
    return _STAGE.validate_python(
        {
            **numbers,
            "cached": record["cached_calls"],
            "name": name,
            "title": record.get("title", name),
            "earlier": True,
        }
    )


_STAGE = TypeAdapter(StageState)


def _task(folder: Path) -> str | None:
    try:
        return str(read_toml(folder / CONFIG, ConfigError)["name"])
    except (ConfigError, KeyError):
        return None


def _changed(folder: Path) -> str | None:
    """The time at which a file of the run was last written."""
    times: list[float] = []
    for name in (STORE, f"{STORE}-wal", FILE, REPORT):
        try:
            times.append((folder / name).stat().st_mtime)
        except OSError:
            continue
    return datetime.fromtimestamp(max(times), UTC).isoformat(timespec="seconds") if times else None


def _verdict(folder: Path) -> str | None:
    """The first sentence of the report, where one was written."""
    from cowest_dspy.report import read_report, verdict

    if not (folder / REPORT).is_file():
        return None
    try:
        return verdict(read_report(folder)).sentences[0]
    except (ReportError, OSError):
        return None
