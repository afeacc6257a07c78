"""Saves what can be read of a damaged run: every whole row is copied into a fresh file, and the damaged one stays beside it.

    saved = repair("runs/handbook")
    print(saved)          # 412 calls saved, 3 lost; 96 records saved, 1 lost. The damaged file is runs/handbook/run.sqlite.damaged

A row counts as whole when it fits its checksum, and a call only when its key is the hash of its request: what is saved was
answered, nothing is made up. What the run had noted as done is forgotten where something was lost, so that its stages are gone
through again; what was saved is not asked again.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cowest_dspy.errors import StoreError
from cowest_dspy.lms import wire
from cowest_dspy.schema import CALL_COLUMNS, SCHEMA_VERSION, crc_of, held, migrate, with_functions

Row = tuple[Any, ...]
TABLES = {
    "meta": "key, value",
    "calls": CALL_COLUMNS,
    "failures": "key, stage, model, error, created, attempts",
    "records": "kind, key, value, crc",
}
# Of versions before the checksums.
_OLD = {"calls": "key, stage, model, request, response, seconds, created", "records": "kind, key, value"}
# Rows that are looked for one by one between two that can be read.
LARGEST_GAP = 1_000_000
PAGE = 4096
_WORK = ".repair-"


@dataclass(frozen=True)
class Repaired:
    """What was saved and lost; ``damaged`` is where the old file is now, None when nothing was wrong with it.

    Lost rows are those that are known of: of a part that cannot be read at all nobody knows how many it held.
    """

    calls: int
    calls_lost: int
    records: int
    records_lost: int
    damaged: Path | None

    def __str__(self) -> str:
        if self.damaged is None:
            return f"Nothing is damaged: {self.calls} calls and {self.records} records can be read. Nothing was changed."
        return (
            f"{self.calls} calls saved, {self.calls_lost} lost; {self.records} records saved, {self.records_lost} lost. "
            f"The damaged file is {self.damaged}. Run the same command again: what was saved is not asked again."
        )


def repair(folder: str | Path) -> Repaired:
    """Repairs the store of the run in ``folder``, where it is damaged.

    Raises:
        StoreError: there is no run, another process holds it, or a newer version wrote it.
    """
    path = Path(folder) / "run.sqlite"
    if not path.is_file():
        raise StoreError(f"There is no run in {folder}: no {path.name}.")
    hold = held(Path(folder))
    try:
        return _repaired(path)
    finally:
        hold.release()


def _repaired(path: Path) -> Repaired:
    for left in path.parent.glob(f"{_WORK}*"):
        shutil.rmtree(left, ignore_errors=True)  # The run is held: whoever made it was killed.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=_WORK) as work:
        # A copy is read: SQLite writes into what it opens.
        copy, fresh = Path(work) / "damaged.sqlite", Path(work) / "fresh.sqlite"
        _copy(path, copy)
        with closing(sqlite3.connect(fresh)) as into:
            with_functions(into)
            migrate(into, fresh)
            readable = _readable(copy)
            with closing(sqlite3.connect(copy)) as source:
                sound = readable and _sound(source)
                saved = {table: _save(source, into, table, sound) for table in TABLES}
                sound = sound and not any(lost for _, lost in saved.values())
            if not sound:
                into.execute("DELETE FROM records WHERE kind = 'done'")
            into.commit()
            into.execute("PRAGMA journal_mode=WAL")
        (calls, calls_lost), (records, records_lost) = saved["calls"], saved["records"]
        kept = None if sound else _exchange(path, fresh)
    return Repaired(calls, calls_lost, records, records_lost, kept)


def _copy(path: Path, to: Path) -> None:
    shutil.copy2(path, to)
    wal = Path(f"{path}-wal")
    if wal.is_file():
        shutil.copy2(wal, f"{to}-wal")


def _exchange(path: Path, fresh: Path) -> Path:
    """Puts the fresh file in the place of the damaged one, which stays beside it with its log; gives where."""
    kept = path.with_name(f"{path.name}.damaged")
    number = 1
    while kept.exists():
        number += 1
        kept = path.with_name(f"{path.name}.damaged-{number}")
    _copy(path, kept)
    with fresh.open("rb") as file:
        os.fsync(file.fileno())
    for suffix in ("-wal", "-shm"):
        with suppress(FileNotFoundError):
            Path(f"{path}{suffix}").unlink()
    fresh.replace(path)
    return kept


def _readable(copy: Path) -> bool:
    """Sees that the file's first page can be read: it says which tables there are, and where. A damaged one is replaced by that
    of an empty store, whose tables begin at the same places.

    Raises:
        StoreError: a newer version wrote it.
    """
    with suppress(sqlite3.Error), closing(sqlite3.connect(copy)) as db:
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise StoreError(f"{copy.name} was written by a newer cowest_dspy (schema {version}): update.")
        db.execute("SELECT 1 FROM calls LIMIT 1").fetchone()
        return True
    with closing(sqlite3.connect(":memory:")) as empty:
        with_functions(empty)
        migrate(empty, copy)
        first = bytearray(empty.serialize()[:PAGE])
    whole = copy.read_bytes()
    pages = max(len(whole) // PAGE, 1)
    first[28:32] = pages.to_bytes(4, "big")
    first[32:40] = bytes(8)  # no free pages that are known of
    copy.write_bytes(bytes(first) + whole[PAGE : pages * PAGE])
    return False


def _sound(db: sqlite3.Connection) -> bool:
    with suppress(sqlite3.Error):
        return [tuple(row) for row in db.execute("PRAGMA integrity_check(1)")] == [("ok",)]
    return False


def _save(source: sqlite3.Connection, into: sqlite3.Connection, table: str, sound: bool) -> tuple[int, int]:
    """Copies the whole rows of a table; gives how many, and how many are known to be lost."""
    columns = _columns(source, table)
    saved, seen = 0, 0
    for row in _rows(source, table, columns):
        seen += 1
        values = _whole(table, row[1:])
        if values is not None:
            names, marks = TABLES[table], ", ".join("?" * (len(values) + 1))
            done = into.execute(f"INSERT OR IGNORE INTO {table} (rowid, {names}) VALUES ({marks})", (row[0], *values))
            saved += done.rowcount
    return saved, max(seen, 0 if sound else _known(source, table)) - saved


def _columns(db: sqlite3.Connection, table: str) -> str:
    with suppress(sqlite3.Error):
        db.execute(f"SELECT {TABLES[table]} FROM {table} LIMIT 0")
        return TABLES[table]
    return _OLD.get(table, "key, stage, model, error, created")


def _known(db: sqlite3.Connection, table: str) -> int:
    """How many rows there were, as far as the index says, which may be readable where the table is not. Calls are never deleted, so
    that of them the largest number is the count."""
    numbers: list[int] = []
    with suppress(sqlite3.Error):
        for (number,) in db.execute(f"SELECT rowid FROM {table}"):
            numbers.append(number)
    return max(numbers, default=0) if table == "calls" else len(numbers)


def _rows(db: sqlite3.Connection, table: str, columns: str) -> Iterator[Row]:
    """Every row that can be read, its number first: forwards to the damage, backwards to it, and one by one in between."""
    low, high = 0, None
    with suppress(sqlite3.Error):
        for row in db.execute(f"SELECT rowid, {columns} FROM {table} ORDER BY rowid"):
            low = row[0]
            yield row
        return
    with suppress(sqlite3.Error):
        for row in db.execute(f"SELECT rowid, {columns} FROM {table} WHERE rowid > ? ORDER BY rowid DESC", (low,)):
            high = row[0]
            yield row
    most = low + LARGEST_GAP
    for number in range(low + 1, min(high or _last(db, table, low), most)):
        with suppress(sqlite3.Error):
            yield from db.execute(f"SELECT rowid, {columns} FROM {table} WHERE rowid = ?", (number,)).fetchall()


def _last(db: sqlite3.Connection, table: str, low: int) -> int:
    """One more than the largest number of a row, by the index; where that cannot be read, a guess above it."""
    with suppress(sqlite3.Error):
        return max((number for (number,) in db.execute(f"SELECT rowid FROM {table}")), default=low) + 1
    return low + 10_000


def _whole(table: str, row: Row) -> Row | None:
    """The row's values as they are written now; None when they are not what was written once."""
    try:
        if table == "calls":
            return _call(row)
        if table == "records":
            kind, key, value = row[:3]
            crc = crc_of(kind + key + value)
            json.loads(value)
            return (kind, key, value, crc) if row[3:] in ((), (None,), (crc,)) else None
        if table == "failures":
            return (*row[:5], row[5] if len(row) > 5 else 1) if all(isinstance(text, str) for text in row[:4]) else None
        return row if all(isinstance(text, str) for text in row) else None
    except (TypeError, ValueError, KeyError, AttributeError):
        return None


def _call(row: Row) -> Row | None:
    key, stage, model, request, response, seconds, created = row[:7]
    asked, answer = json.loads(request), json.loads(response)
    crc = crc_of(key + request + response)
    if wire.content_key(asked) != key or asked["model"] != model or (row[10:] not in ((), (None,)) and row[10] != crc):
        return None
    wire.response_from_dict(answer)
    tokens = answer["input_tokens"] + answer["output_tokens"]
    attempts = row[9] if len(row) > 9 else 1
    return (
        key,
        str(stage),
        model,
        request,
        response,
        float(seconds),
        float(created),
        tokens,
        answer.get("usd"),
        int(attempts),
        crc,
    )
