"""Saves what can be read of a damaged run: every whole row is copied into a fresh file, and the
damaged one stays beside it.

    saved = repair("runs/handbook")
    print(saved)          # 412 calls saved, 3 lost; 96 records saved, 1 lost. The damaged file is
                          # runs/handbook/run.sqlite.damaged

A row counts as whole when it fits its checksum, and a call only when its key is the hash of its
request: what is saved was answered, nothing is made up. What the run had noted as done is forgotten
where something was lost, so that its stages are gone through again; what was saved is not asked
again.

SQLite finds a row from the root of its table: one lost page near the root hides all rows below it.
Calls are what was paid for, so each page with rows is then put in the place of the root, where
SQLite reads it. The sqlite3 shell has ``.recover`` for this, and Python's module has no such call.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dspy.lm15 import InvalidRequestError

from cowest_dspy.errors import StoreError
from cowest_dspy.store import serialize
from cowest_dspy.store.progress import read_snapshot
from cowest_dspy.store.schema import (
    CALL_COLUMNS,
    SCHEMA_VERSION,
    UNREADABLE,
    add_functions,
    crc_of,
    is_emptied,
    lock_folder,
    migrate,
)

Row = tuple[Any, ...]
TABLES = {
    "meta": "key, value",
    "calls": CALL_COLUMNS,
    "failures": "key, stage, model, error, created, attempts",
    "records": "kind, key, value, crc",
}
# Of versions before the checksums.
_OLD = {
    "calls": "key, stage, model, request, response, seconds, created",
    "failures": "key, stage, model, error, created",
    "records": "kind, key, value",
}
PAGE = 4096
_LEAF = b"\x0d"
"""The first byte of a page with rows of a table (https://sqlite.org/fileformat2.html, 1.6)."""
_WORK = ".repair-"


@dataclass(frozen=True)
class Repaired:
    """The result of a repair: what was saved and lost; ``damaged`` is where the old file is now,
    None when nothing was wrong with it.

    Lost rows are those that are known of. Of a table in ``uncounted`` there may be more: of a part
    of the file that cannot be read nobody knows how many rows it held.
    """

    calls: int
    calls_lost: int
    records: int
    records_lost: int
    damaged: Path | None
    uncounted: frozenset[str] = frozenset()

    def __str__(self) -> str:
        if self.damaged is None:
            return (
                f"Nothing is damaged: {self.calls} calls and {self.records} records can be "
                "read. Nothing was changed."
            )
        return (
            f"{self.calls} calls saved, {self._lost('calls', self.calls_lost)}; "
            f"{self.records} records saved, {self._lost('records', self.records_lost)}. "
            f"{self._spent()}"
            f"The damaged file is {self.damaged}. Run the same command again: what was saved is "
            "not asked again."
        )

    def _lost(self, table: str, lost: int) -> str:
        if table not in self.uncounted:
            return f"{lost} lost"
        return f"at least {lost} lost" if lost else "how many are lost is not known"

    def _spent(self) -> str:
        if not self.uncounted & {"failures", "meta"}:
            return ""
        return (
            "Failed calls, or the time at work, may be lost, too: then the budget counts less "
            "than was spent. "
        )


def repair(folder: str | Path) -> Repaired:
    """Repair the store of the run in ``folder``, where it is damaged.

    Raises:
        StoreError: there is no run, another process holds it, or a newer version wrote it.
    """
    path = Path(folder) / "run.sqlite"
    if not path.is_file() and not is_emptied(path):
        raise StoreError(f"There is no run in {folder}: no {path.name}.")
    hold = lock_folder(Path(folder))
    try:
        return _repaired(path)
    finally:
        hold.release()


@dataclass(frozen=True)
class _Saved:
    """Rows of a table that were saved, and how many are known to be lost; ``counted``: no more than
    these. ``last`` is the largest number of a saved row."""

    rows: int
    lost: int
    counted: bool
    last: int = 0


def _repaired(path: Path) -> Repaired:
    for left in path.parent.glob(f"{_WORK}*"):
        shutil.rmtree(left, ignore_errors=True)  # The run is held: whoever made it was killed.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=_WORK) as work:
        # A copy is read: SQLite writes into what it opens.
        copy, fresh = Path(work) / "damaged.sqlite", Path(work) / "fresh.sqlite"
        _copy(path, copy)
        with closing(sqlite3.connect(fresh)) as into:
            add_functions(into)
            migrate(into, fresh)
            readable = _readable(copy)
            with closing(sqlite3.connect(copy)) as source:
                sound = readable and _sound(source)
                saved = {table: _save(source, into, table) for table in TABLES}
            if not saved["calls"].counted:
                saved["calls"] = _save_leaves(path, Path(work), into, saved["calls"])
            sound = sound and not any(one.lost for one in saved.values())
            if not sound:
                into.execute("DELETE FROM records WHERE kind = 'done'")
            into.commit()
            into.execute("PRAGMA journal_mode=WAL")
        calls, records = saved["calls"], saved["records"]
        kept = None if sound else _exchange(path, fresh)
    uncounted = frozenset(table for table, one in saved.items() if not one.counted)
    return Repaired(calls.rows, calls.lost, records.rows, records.lost, kept, uncounted)


def _copy(path: Path, to: Path) -> None:
    if path.is_file():
        shutil.copy2(path, to)
    else:
        to.touch()
    wal = Path(f"{path}-wal")
    if wal.is_file():
        shutil.copy2(wal, f"{to}-wal")


def _exchange(path: Path, fresh: Path) -> Path:
    """Put the fresh file in the place of the damaged one, which stays beside it with its log;
    return where."""
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
    """Make the first page readable, and return whether it was: it says which tables there are, and
    where. A damaged one is replaced by that of an empty store, whose tables begin at the same
    places.

    Raises:
        StoreError: a newer version wrote it.
    """
    with suppress(*UNREADABLE), closing(sqlite3.connect(copy)) as db:
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise StoreError(
                f"{copy.name} was written by a newer cowest_dspy (schema {version}): update."
            )
        db.execute("SELECT 1 FROM calls LIMIT 1").fetchone()
        return True
    whole = copy.read_bytes()
    pages = max(len(whole) // PAGE, 1)
    copy.write_bytes(_first_page(pages) + whole[PAGE : pages * PAGE])
    return False


def _sound(db: sqlite3.Connection) -> bool:
    with suppress(*UNREADABLE):
        if not 1 <= db.execute("PRAGMA user_version").fetchone()[0] <= SCHEMA_VERSION:
            return False
        return [tuple(row) for row in db.execute("PRAGMA integrity_check(1)")] == [("ok",)]
    return False


def _save(source: sqlite3.Connection, into: sqlite3.Connection, table: str) -> _Saved:
    """Copy the whole rows of a table that SQLite finds: forwards to the damage, and backwards to
    it."""
    names = f"FROM {table} NOT INDEXED"
    columns, saved, seen, low, last = TABLES[table], 0, 0, 0, 0
    try:
        source.execute(f"SELECT {columns} {names} LIMIT 0")
    except UNREADABLE:
        columns = _OLD.get(table, columns)
    try:
        for number, *values in source.execute(f"SELECT rowid, {columns} {names} ORDER BY rowid"):
            low, seen = number, seen + 1
            if _put(into, table, number, tuple(values)):
                saved, last = saved + 1, number
        return _Saved(saved, seen - saved, True, last)
    except UNREADABLE:
        query = f"SELECT rowid, {columns} {names} WHERE rowid > ? ORDER BY rowid DESC"
        with suppress(*UNREADABLE):
            for number, *values in source.execute(query, (low,)):
                seen += 1
                if _put(into, table, number, tuple(values)):
                    saved, last = saved + 1, max(last, number)
    return _Saved(saved, seen - saved, False, last)


def _save_leaves(path: Path, work: Path, into: sqlite3.Connection, found: _Saved) -> _Saved:
    """Copy the calls that SQLite does not find from the root of their table: in a copy of the pages
    each leaf takes the root's place in turn. How many calls there were, the run's progress says, or
    the largest number of one: calls are never deleted.

    Older states of a page, which are in the file when the log has a newer one, are read too.
    """
    saved, last = found.rows, found.last
    log = Path(f"{path}-wal")
    for with_log in (True, False) if log.is_file() else (False,):
        image = work / f"pages-{with_log}.sqlite"
        _write_pages(path, log if with_log else None, image)
        with image.open("r+b") as file:
            root = _calls_root()
            rest = range(2, image.stat().st_size // PAGE + 1)
            for number in (root, *rest):
                file.seek((number - 1) * PAGE)
                page = file.read(PAGE)
                if page[:1] != _LEAF:
                    continue
                file.seek((root - 1) * PAGE)
                file.write(page)
                file.flush()
                with closing(sqlite3.connect(image)) as source:
                    leaf = _save(source, into, "calls")
                saved, last = saved + leaf.rows, max(last, leaf.last)
    snapshot = read_snapshot(path.parent)
    known = max(snapshot.calls_kept if snapshot else 0, saved + found.lost, last)
    return _Saved(saved, known - saved, False)


def _write_pages(path: Path, log: Path | None, image: Path) -> None:
    """Write the pages of a store as they lie in its file and then in its log, behind the first page
    of an empty store. The log's format is https://sqlite.org/fileformat2.html, 4.1."""
    with image.open("wb") as file:
        if path.is_file():
            with path.open("rb") as source:
                shutil.copyfileobj(source, file)
        if log is not None:
            most = (file.tell() + log.stat().st_size) // PAGE
            with log.open("rb") as frames:
                salt = frames.read(32)[16:24]
                while len(frame := frames.read(24 + PAGE)) == 24 + PAGE and frame[8:16] == salt:
                    number = int.from_bytes(frame[:4], "big")
                    if 1 < number <= most:
                        file.seek((number - 1) * PAGE)
                        file.write(frame[24:])
        pages = max(file.seek(0, os.SEEK_END) // PAGE, _calls_root())
        file.truncate(pages * PAGE)
        file.seek(0)
        file.write(_first_page(pages))


@contextmanager
def _empty_store() -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(":memory:")) as db:
        add_functions(db)
        migrate(db, Path("an empty store"))
        yield db


@cache
def _calls_root() -> int:
    """The page at which the table of calls begins: in every store the same."""
    with _empty_store() as db:
        root = "SELECT rootpage FROM sqlite_schema WHERE name = 'calls'"
        return int(db.execute(root).fetchone()[0])


def _first_page(pages: int) -> bytes:
    """The first page of a store of so many pages, of which none is known to be free."""
    with _empty_store() as db:
        first = bytearray(db.serialize()[:PAGE])
    first[28:32], first[32:40] = pages.to_bytes(4, "big"), bytes(8)
    return bytes(first)


def _put(into: sqlite3.Connection, table: str, number: int, values: Row) -> bool:
    """Write a row, if it is whole and not there yet; return whether it was. Calls are numbered
    anew, without gaps."""
    whole = _whole(table, values)
    if whole is None:
        return False
    names, row = TABLES[table], whole
    if table != "calls":
        names, row = f"rowid, {names}", (number, *whole)
    marks = ", ".join("?" * len(row))
    query = f"INSERT OR IGNORE INTO {table} ({names}) VALUES ({marks})"
    return into.execute(query, row).rowcount > 0


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
            return (
                (*row[:5], row[5] if len(row) > 5 else 1)
                if all(isinstance(text, str) for text in row[:4])
                else None
            )
        return row if all(isinstance(text, str) for text in row) else None
    except (
        TypeError,
        ValueError,
        KeyError,
        AttributeError,
        InvalidRequestError,
    ):  # The last: half of a surrogate pair is in it.
        return None


def _call(row: Row) -> Row | None:
    key, stage, model, request, response, seconds, created = row[:7]
    asked, answer = json.loads(request), json.loads(response)
    crc = crc_of(key + request + response)
    if (
        serialize.content_key(asked) != key
        or asked["model"] != model
        or (row[10:] not in ((), (None,)) and row[10] != crc)
    ):
        return None
    serialize.response_from_dict(answer)
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
