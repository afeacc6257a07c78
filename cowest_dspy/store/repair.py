"""Saves what can be read of a damaged run: every whole row is copied into a fresh file, and the
damaged one stays beside it.

    saved = repair("runs/handbook")
    print(saved)          # 412 calls saved, 3 lost; 96 records saved, 1 lost. The damaged file is
                          runs/handbook/run.sqlite.damaged

A row counts as whole when it fits its checksum, and a call only when its key is the hash of its
request: what is saved was answered, nothing is made up. What the run had noted as done is forgotten
where something was lost, so that its stages are gone through again; what was saved is not asked
again.

SQLite finds a row from the root of its table: one lost page near the root hides all rows below it.
So where that way is broken, the pages are read as they lie in the file. The sqlite3 shell does the
same in ``.recover``, for which Python's module has no call.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import sqlite3
import struct
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
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
    "records": "kind, key, value",
}
# How many values a row has, in each version: a page does not say of which table it is.
_WIDTHS = {"meta": (2,), "calls": (7, 11), "failures": (5, 6), "records": (3, 4)}
PAGE = 4096
_MAGIC, _LEAF, _INDEX, _INDEX_LEAF = b"SQLite format 3\0", 13, 2, 10
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
    these."""

    rows: int
    lost: int
    counted: bool


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
                saved = {table: _save(source, into, table, path) for table in TABLES}
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


def _save(source: sqlite3.Connection, into: sqlite3.Connection, table: str, path: Path) -> _Saved:
    """Copies the whole rows of a table; what SQLite does not find, from the pages of the file in
    ``path`` itself."""
    columns, errors = _columns(source, table), list[sqlite3.Error]()
    saved = seen = last = 0
    for number, *values in _rows(source, table, columns, errors):
        seen, last = seen + 1, max(last, number)
        saved += _put(into, table, number, values)
    if not errors:
        return _Saved(saved, seen - saved, True)
    with _pages(path) as pages:
        for number, values in pages.rows(table):
            done = _put(into, table, number, values)
            saved, last = saved + done, max(last, number if done else 0)
        known = _known(source, table)
        if known is None and table == "calls":
            known_keys = set(pages.call_keys()) | {
                key for (key,) in into.execute("SELECT key FROM calls")
            }
            return _Saved(
                saved, max(len(known_keys), _noted(path), _last(path, last)) - saved, False
            )
    return _Saved(saved, max((known or 0) - saved, 0), known is not None)


def _put(into: sqlite3.Connection, table: str, number: int, values: Sequence[Any]) -> int:
    """Writes a row, if it is whole and not there yet; gives how many were written. Calls are
    numbered anew, without gaps."""
    whole = _whole(table, tuple(values))
    if whole is None:
        return 0
    names, row = (
        (TABLES[table], whole)
        if table == "calls"
        else (f"rowid, {TABLES[table]}", (number, *whole))
    )
    return into.execute(
        f"INSERT OR IGNORE INTO {table} ({names}) VALUES ({', '.join('?' * len(row))})", row
    ).rowcount


def _noted(path: Path) -> int:
    """How many answers the run had, as its progress says."""
    snapshot = read_snapshot(path.parent)
    return snapshot.calls_kept if snapshot else 0


def _last(path: Path, number: int) -> int:
    """How many calls there were by the largest number of one: they are never deleted. An earlier
    version's repair left gaps."""
    return 0 if any(path.parent.glob(f"{path.name}.damaged*")) else number


def _columns(db: sqlite3.Connection, table: str) -> str:
    with suppress(sqlite3.Error):
        db.execute(f"SELECT {TABLES[table]} FROM {table} LIMIT 0")
        return TABLES[table]
    return _OLD.get(table, "key, stage, model, error, created")


def _known(db: sqlite3.Connection, table: str) -> int | None:
    """How many rows there were by the table's index, which may be readable where the table is not;
    None where it is not, either."""
    if table == "failures":  # It has none.
        return None
    with suppress(sqlite3.Error):
        return sum(
            1
            for _ in db.execute(f"SELECT rowid FROM {table} INDEXED BY sqlite_autoindex_{table}_1")
        )
    return None


def _rows(
    db: sqlite3.Connection, table: str, columns: str, errors: list[sqlite3.Error]
) -> Iterator[Row]:
    """Every row that SQLite finds, its number first: forwards to the damage, and backwards to it.
    The damage is in ``errors``."""
    low = 0
    try:
        for row in db.execute(f"SELECT rowid, {columns} FROM {table} NOT INDEXED ORDER BY rowid"):
            low = row[0]
            yield row
    except sqlite3.Error as error:
        errors.append(error)
        query = (
            f"SELECT rowid, {columns} FROM {table} NOT INDEXED WHERE rowid > ? ORDER BY rowid DESC"
        )
        with suppress(sqlite3.Error):
            yield from db.execute(query, (low,))


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
def _pages(path: Path) -> Iterator[_Pages]:
    with ExitStack() as open_files:

        def contents(file: Path) -> bytes | mmap.mmap:
            if not file.is_file() or not file.stat().st_size:
                return b""
            opened = open_files.enter_context(file.open("rb"))
            return open_files.enter_context(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))

        yield _Pages(contents(path), contents(Path(f"{path}-wal")))


class _Pages:
    """The pages of a damaged file as they lie in it, those of its log over them.

    The format is https://sqlite.org/fileformat2.html: 1.5 the free list, 1.6 the trees, 2.1 the
    rows, 4.1 the log.
    """

    def __init__(self, file: bytes | mmap.mmap, log: bytes | mmap.mmap) -> None:
        self._file, self._log = file, log
        size = (
            int.from_bytes(file[16:18], "big")
            if file[:16] == _MAGIC
            else int.from_bytes(log[8:12], "big")
        )
        self._size = size if size in (512, 1024, 2048, 4096, 8192, 16384, 32768) else PAGE
        self._newest = self._logged()

    def _logged(self) -> dict[int, int]:
        """Where in the log each page stands that was committed to it."""
        found: dict[int, int] = {}
        waiting: dict[int, int] = {}
        for at in range(32, len(self._log) - self._size - 23, self._size + 24):
            number, commit = struct.unpack(">II", self._log[at : at + 8])
            if self._log[at + 8 : at + 16] != self._log[16:24]:
                break
            waiting[number] = at + 24
            if commit:
                found |= waiting
                waiting = {}
        return found

    def rows(self, table: str) -> Iterator[tuple[int, Row]]:
        """Rows that may be of that table, with their numbers. Calls are never changed or dropped,
        so that those of any page are calls; of other tables what was dropped is on free pages, and
        where these are not known nothing is given."""
        free = frozenset[int]() if table == "calls" else self._free()
        if free is None:
            return
        for page in self._each(free, older=table == "calls"):
            yield from (
                (number, values)
                for number, values in self._cells(page, _LEAF)
                if len(values) in _WIDTHS[table]
            )

    def call_keys(self) -> Iterator[str]:
        """The keys of calls in what can be read of their index."""
        for page in self._each(frozenset(), older=True):
            for kind in (_INDEX, _INDEX_LEAF):
                entries = (row for _, row in self._cells(page, kind) if len(row) == 2)
                yield from (
                    key for key, number in entries if _is_key(key) and isinstance(number, int)
                )

    def _each(self, free: frozenset[int], *, older: bool) -> Iterator[bytes]:
        count = len(self._file) // self._size
        for number in range(1, max(count, *self._newest, 0) + 1):
            if number not in free:
                with suppress(ValueError):
                    yield self._page(number)
            if older and number in self._newest and number <= count:
                yield self._file[(number - 1) * self._size : number * self._size]

    def _page(self, number: int) -> bytes:
        at = self._newest.get(number)
        page = (
            self._file[(number - 1) * self._size : number * self._size]
            if at is None
            else self._log[at : at + self._size]
        )
        if not number or len(page) < self._size:
            raise ValueError("no such page")
        return page

    def _free(self) -> frozenset[int] | None:
        """The pages that hold nothing any more; None where that cannot be read."""
        found: set[int] = set()
        with suppress(ValueError):
            head = self._page(1)
            (number, count) = struct.unpack(">II", head[32:40])
            while head[:16] == _MAGIC and number and number not in found:
                page = self._page(number)
                following, leaves = struct.unpack(">II", page[:8])
                found |= {
                    number,
                    *struct.unpack(f">{leaves}I", page[8 : 8 + 4 * min(leaves, self._size)]),
                }
                number = following
            return frozenset(found) if head[:16] == _MAGIC and len(found) == count else None
        return None

    def _cells(self, page: bytes, kind: int) -> Iterator[tuple[int, Row]]:
        """The entries of a page, if it is of that kind; those that make no sense are passed
        over."""
        start = 100 if page[:16] == _MAGIC else 0
        if page[start] != kind:
            return
        first = start + (12 if kind == _INDEX else 8)
        for place in range(
            first, first + 2 * int.from_bytes(page[start + 3 : start + 5], "big"), 2
        ):
            with suppress(ValueError, IndexError, struct.error):
                at = int.from_bytes(page[place : place + 2], "big") + (4 if kind == _INDEX else 0)
                size, at = _varint(page, at)
                number, at = _varint(page, at) if kind == _LEAF else (0, at)
                yield number, _values(self._payload(page, at, size, kind))

    def _payload(self, page: bytes, at: int, size: int, kind: int) -> bytes:
        """An entry's bytes, gathered from the pages that it goes on in."""
        most = self._size - 35 if kind == _LEAF else (self._size - 12) * 64 // 255 - 23
        if size <= most:
            return page[at : at + size]
        least = (self._size - 12) * 32 // 255 - 23
        here = least + (size - least) % (self._size - 4)
        here = here if here <= most else least
        parts, missing = [page[at : at + here]], size - here
        (following,) = struct.unpack(">I", page[at + here : at + here + 4])
        while missing > 0:
            more = self._page(following)
            (following,) = struct.unpack(">I", more[:4])
            parts.append(more[4 : 4 + missing])
            missing -= len(parts[-1])
        return b"".join(parts)


def _is_key(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64


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
