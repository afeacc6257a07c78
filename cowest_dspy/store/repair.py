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
Calls are what was paid for, so those that it does not find are read from the pages as they lie in
the file. The sqlite3 shell does so in ``.recover``, for which Python's module has no call.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import sqlite3
import struct
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspy.lm15 import InvalidRequestError

from cowest_dspy.errors import StoreError
from cowest_dspy.store import serialize
from cowest_dspy.store.progress import read_snapshot
from cowest_dspy.store.schema import (
    CALL_COLUMNS,
    SCHEMA_VERSION,
    crc_of,
    emptied,
    held,
    migrate,
    with_functions,
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
_WORK = ".repair-"


@dataclass(frozen=True)
class Repaired:
    """What was saved and lost; ``damaged`` is where the old file is now, None when nothing was
    wrong with it.

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
            "Failed calls, or the time at work, may be lost, too: then [budget] counts less "
            "than was spent. "
        )


def repair(folder: str | Path) -> Repaired:
    """Repairs the store of the run in ``folder``, where it is damaged.

    Raises:
        StoreError: there is no run, another process holds it, or a newer version wrote it.
    """
    path = Path(folder) / "run.sqlite"
    if not path.is_file() and not emptied(path):
        raise StoreError(f"There is no run in {folder}: no {path.name}.")
    hold = held(Path(folder))
    try:
        return _repaired(path)
    finally:
        hold.release()


@dataclass(frozen=True)
class _Saved:
    """Rows of a table that were saved, and how many are known to be lost; ``counted``: no more than
    these. ``last`` is the largest number of a row."""

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
            with_functions(into)
            migrate(into, fresh)
            readable = _readable(copy)
            with closing(sqlite3.connect(copy)) as source:
                sound = readable and _sound(source)
                saved = {table: _save(source, into, table) for table in TABLES}
            if not saved["calls"].counted:
                saved["calls"] = _save_pages(path, into, saved["calls"])
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
    """Puts the fresh file in the place of the damaged one, which stays beside it with its log;
    gives where."""
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
    """Sees that the file's first page can be read: it says which tables there are, and where. A
    damaged one is replaced by that of an empty store, whose tables begin at the same places.

    Raises:
        StoreError: a newer version wrote it.
    """
    with suppress(sqlite3.Error), closing(sqlite3.connect(copy)) as db:
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise StoreError(
                f"{copy.name} was written by a newer cowest_dspy (schema {version}): update."
            )
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
        if not 1 <= db.execute("PRAGMA user_version").fetchone()[0] <= SCHEMA_VERSION:
            return False
        return [tuple(row) for row in db.execute("PRAGMA integrity_check(1)")] == [("ok",)]
    return False


def _save(source: sqlite3.Connection, into: sqlite3.Connection, table: str) -> _Saved:
    """Copies the whole rows of a table that SQLite finds: forwards to the damage, and backwards to
    it."""
    names = f"FROM {table} NOT INDEXED"
    columns, saved, seen, low, high = TABLES[table], 0, 0, 0, 0
    try:
        source.execute(f"SELECT {columns} {names} LIMIT 0")
    except sqlite3.Error:
        columns = _OLD.get(table, columns)
    try:
        for number, *values in source.execute(f"SELECT rowid, {columns} {names} ORDER BY rowid"):
            low, seen = number, seen + 1
            saved += _put(into, table, number, tuple(values))
        return _Saved(saved, seen - saved, True, low)
    except sqlite3.Error:
        query = f"SELECT rowid, {columns} {names} WHERE rowid > ? ORDER BY rowid DESC"
        with suppress(sqlite3.Error):
            for number, *values in source.execute(query, (low,)):
                high, seen = max(high, number), seen + 1
                saved += _put(into, table, number, tuple(values))
    return _Saved(saved, seen - saved, False, max(low, high))


def _save_pages(path: Path, into: sqlite3.Connection, found: _Saved) -> _Saved:
    """Copies the calls that SQLite did not find. How many there were, the run's progress says, or
    the largest number of one: calls are never deleted."""
    saved, last = found.rows, found.last
    with _mapped(path) as file, _mapped(Path(f"{path}-wal")) as log:
        for number, values in _Pages(file, log).rows():
            put = _put(into, "calls", number, values)
            saved, last = saved + put, max(last, number if put else 0)
    snapshot = read_snapshot(path.parent)
    known = max(snapshot.calls_kept if snapshot else 0, saved + found.lost, last)
    return _Saved(saved, known - saved, False)


def _put(into: sqlite3.Connection, table: str, number: int, values: Row) -> int:
    """Writes a row, if it is whole and not there yet; gives how many were written. Calls are
    numbered anew, without gaps."""
    whole = _whole(table, values)
    if whole is None:
        return 0
    names, row = TABLES[table], whole
    if table != "calls":
        names, row = f"rowid, {names}", (number, *whole)
    marks = ", ".join("?" * len(row))
    return into.execute(f"INSERT OR IGNORE INTO {table} ({names}) VALUES ({marks})", row).rowcount


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


@contextmanager
def _mapped(file: Path) -> Iterator[bytes | mmap.mmap]:
    if not file.is_file() or not file.stat().st_size:
        yield b""
        return
    with (
        file.open("rb") as opened,
        mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as contents,
    ):
        yield contents


class _Pages:
    """The pages of a file and of its log. Their format is https://sqlite.org/fileformat2.html: 1.6
    the trees, 2.1 the rows, 4.1 the log."""

    def __init__(self, file: bytes | mmap.mmap, log: bytes | mmap.mmap) -> None:
        self._file, self._log = file, log
        # Where in the log each page stands, at last.
        self._newest: dict[int, int] = {}
        for at in range(32, len(log) - PAGE - 23, PAGE + 24):
            if log[at + 8 : at + 16] != log[16:24]:
                break
            self._newest[int.from_bytes(log[at : at + 4], "big")] = at + 24

    def rows(self) -> Iterator[tuple[int, Row]]:
        """Rows that may be calls, with their numbers: also those of older states of a page, since
        calls are never changed."""
        for number in range(1, max(len(self._file) // PAGE, *self._newest, 0) + 1):
            for page in {self._page(number), self._file[(number - 1) * PAGE : number * PAGE]}:
                if len(page) == PAGE and page[0] == 13:  # a leaf of a table
                    yield from self._cells(page)

    def _page(self, number: int) -> bytes:
        at = self._newest.get(number)
        return (
            self._file[(number - 1) * PAGE : number * PAGE]
            if at is None
            else self._log[at : at + PAGE]
        )

    def _cells(self, page: bytes) -> Iterator[tuple[int, Row]]:
        """The rows of a page; those that make no sense are passed over."""
        for place in range(8, 8 + 2 * int.from_bytes(page[3:5], "big"), 2):
            with suppress(ValueError, IndexError, struct.error):
                size, at = _varint(page, int.from_bytes(page[place : place + 2], "big"))
                if size > len(self._file) + len(self._log):
                    continue
                number, at = _varint(page, at)
                values = _values(self._payload(page, at, size))
                if len(values) in (len(_OLD["calls"].split(",")), len(CALL_COLUMNS.split(","))):
                    yield number, values

    def _payload(self, page: bytes, at: int, size: int) -> bytes:
        """A row's bytes, gathered from the pages that it goes on in."""
        most = PAGE - 35
        if size <= most:
            return page[at : at + size]
        least = (PAGE - 12) * 32 // 255 - 23
        here = least + (size - least) % (PAGE - 4)
        here = here if here <= most else least
        parts, missing = [page[at : at + here]], size - here
        (following,) = struct.unpack(">I", page[at + here : at + here + 4])
        while missing > 0:
            more = self._page(following)
            (following,) = struct.unpack(">I", more[:4])
            parts.append(more[4 : 4 + missing])
            missing -= len(parts[-1])
        return b"".join(parts)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of one to nine bytes, and where it ends."""
    value = 0
    for place in range(at, at + 8):
        value = value << 7 | data[place] & 127
        if data[place] < 128:
            return value, place + 1
    return value << 8 | data[at + 8], at + 9


_WHOLE_NUMBERS = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}


def _values(payload: bytes) -> Row:
    """The values of a row or of an index entry."""
    end, at = _varint(payload, 0)
    body, values = end, []
    while at < end:
        kind, at = _varint(payload, at)
        size = _WHOLE_NUMBERS.get(kind) or (
            8 if kind == 7 else (kind - 12) // 2 if kind >= 12 else 0
        )
        part = payload[body : body + size]
        if len(part) < size:
            raise ValueError("cut off")
        body += size
        if kind in _WHOLE_NUMBERS:
            values.append(int.from_bytes(part, "big", signed=True))
        elif kind == 7:
            values.append(struct.unpack(">d", part)[0])
        elif kind >= 12:
            values.append(part.decode() if kind % 2 else part)
        else:
            values.append({8: 0, 9: 1}.get(kind))
    return tuple(values)
