"""What trackio and W&B have written on this machine, read without them."""

from __future__ import annotations

import importlib
import json
import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7
# trackio reads it once, when it is imported.
os.environ.setdefault("TRACKIO_DIR", tempfile.mkdtemp(prefix="trackio-"))


def trackio_folder() -> Path:
    """Where trackio writes in this process."""
    return Path(importlib.import_module("trackio.utils").TRACKIO_DIR)


def trackio_rows(project: str) -> dict[str, list[tuple[int, dict[str, float]]]]:
    """Of each run of a project, by its name: steps with what was logged at each, in order."""
    found: dict[str, list[tuple[int, dict[str, float]]]] = {}
    with closing(sqlite3.connect(f"file:{trackio_folder() / project}.db?mode=ro", uri=True)) as db:
        for name, step, logged in db.execute(
            "SELECT run_name, step, metrics FROM metrics ORDER BY id"
        ):
            found.setdefault(name, []).append((step, json.loads(logged)))
    return found


def trackio_configs(project: str) -> dict[str, dict[str, Any]]:
    with closing(sqlite3.connect(f"file:{trackio_folder() / project}.db?mode=ro", uri=True)) as db:
        return {
            name: json.loads(config)
            for name, config in db.execute("SELECT run_name, config FROM configs ORDER BY id")
        }


def trackio_artifacts(project: str) -> list[str]:
    """The files of the newest version of each artifact."""
    with closing(sqlite3.connect(f"file:{trackio_folder() / project}.db?mode=ro", uri=True)) as db:
        rows = db.execute(
            "SELECT manifest, max(version) FROM artifact_versions GROUP BY artifact_id"
        ).fetchall()
    return [text for text, _ in rows]


def wandb_records(folder: Path) -> dict[str, list[Any]]:
    """The records of all offline runs below a folder, in order, by the run's id."""
    protocol: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")

    found: dict[str, list[Any]] = {}
    for file in sorted(folder.rglob("*.wandb"), key=lambda one: one.parent.name):
        for data in _records(file.read_bytes()):
            record: Any = protocol.Record()  # pyright: ignore[reportAttributeAccessIssue]
            record.ParseFromString(data)
            found.setdefault(file.stem.removeprefix("run-"), []).append(record)
    return found


def _records(content: bytes) -> Iterator[bytes]:
    """W&B's files are LevelDB's logs: blocks of 32 KiB, records in pieces (1 whole, 2 first, 3
    middle, 4 last)."""
    place, held = HEADER, b""
    while place + HEADER <= len(content):
        left = BLOCK - place % BLOCK
        if left < HEADER:
            place += left
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        held += content[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (1, 4):
            yield held
            held = b""


def wandb_history(records: list[Any], key: str) -> list[tuple[float, float]]:
    """The points of a metric of ours: (step, value)."""
    rows = [
        {
            "/".join(item.nested_key) or item.key: json.loads(item.value_json)
            for item in record.history.item
        }
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    return [(row["step"], row[key]) for row in rows if key in row and "step" in row]


def wandb_summary(records: list[Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for record in records:
        if record.WhichOneof("record_type") == "summary":
            found |= {
                "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                for item in record.summary.update
            }
    return found
