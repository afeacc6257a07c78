"""Records: what a run has noted besides its calls, as JSON under a kind and a key; and steps that
are done once."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from cowest_dspy.store import serialize
from cowest_dspy.store.schema import crc_of, damaged, sqlite_errors
from cowest_dspy.utils.jsonable import plain
from cowest_dspy.utils.safe_text import has_half_pair

_OF_KIND = "kind = ? AND substr(key, 1, ?) = ?"


class Records:
    """The records of an open store. ``_part`` stands before the kinds of a part of a run."""

    _path: Path
    _part: str
    _db: sqlite3.Connection
    _lock: threading.RLock

    def keep(self, kind: str, key: str, value: Mapping[str, Any]) -> None:
        """Keep a record (a trace, a stage, a result) under its kind and key; a later one replaces
        an earlier. It is read again in what JSON has (jsonable.py)."""
        self.keep_all(kind, {key: value})

    def keep_all(self, kind: str, values: Mapping[str, Mapping[str, Any]]) -> None:
        """Keep several records in one transaction."""
        texts = {key: dump_json(plain(dict(value))) for key, value in values.items()}
        kind = self._part + kind
        rows = [(kind, key, text, crc_of(kind + key + text)) for key, text in texts.items()]
        with self._writing():
            # In its place: what replaces a record is where that was.
            self._db.executemany(
                "INSERT INTO records (kind, key, value, crc) VALUES (?, ?, ?, ?) "
                "ON CONFLICT (kind, key) DO UPDATE SET value = excluded.value, crc = excluded.crc",
                rows,
            )

    def record(self, kind: str, key: str) -> dict[str, Any] | None:
        """The record of that kind and key, or None."""
        kind = self._part + kind
        with self._reading():
            row = self._db.execute(
                "SELECT value, crc FROM records WHERE kind = ? AND key = ?", (kind, key)
            ).fetchone()
        return self._value(kind, key, *row) if row else None

    def _value(self, kind: str, key: str, text: str, crc: int) -> dict[str, Any]:
        self._check(crc, kind, key, text)
        return json.loads(text)

    def step(
        self,
        kind: str,
        key: str,
        depends_on: Any,
        make: Callable[[], Mapping[str, Any]],
        *,
        usable: Callable[[Mapping[str, Any]], bool] = lambda record: True,
    ) -> dict[str, Any]:
        """The record of a step that is done once: as it was recorded, when it depended on the same;
        otherwise ``make()`` does the step, and the values that it gives are recorded.

        Args:
            kind, key: of the record.
            depends_on: JSON-able; its digest is in the record, as "identity".
            make: does the step.
            usable: whether a record that depended on the same can be used, since its files are
                there, for instance.
        """
        identity = serialize.digest(depends_on)
        known = self.record(kind, key)
        if known and known.get("identity") == identity and usable(known):
            return known
        self.keep(kind, key, {**make(), "identity": identity})
        made = self.record(kind, key)
        assert made is not None
        return made

    def records(self, kind: str) -> dict[str, dict[str, Any]]:
        """All records of a kind by key, in the order in which they were first kept."""
        kind = self._part + kind
        with self._reading():
            rows = self._db.execute(
                "SELECT key, value, crc FROM records WHERE kind = ? ORDER BY rowid", (kind,)
            ).fetchall()
        return {key: self._value(kind, key, value, crc) for key, value, crc in rows}

    def count(self, kind: str, *, start: str = "") -> int:
        """Count the records of a kind, of those whose key begins with ``start``. Also when
        the store is closed."""
        with sqlite_errors(self._path), closing(self._open_reader()) as db:
            row = db.execute(
                f"SELECT count(*) FROM records WHERE {_OF_KIND}",
                (self._part + kind, len(start), start),
            ).fetchone()
        return int(row[0])

    def each(
        self, kind: str, *, start: str = "", chunk: int = 100
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Keys and records of a kind, of those whose key begins with ``start``, in the order in
        which they were first kept.

        A chunk is in memory at a time, and no lock is held in between. Also when the store is
        closed.
        """
        # NOT INDEXED: by rowid, where the index of the primary key would have every chunk sorted.
        query = (
            "SELECT rowid, key, value, crc FROM records NOT INDEXED WHERE rowid > ? AND "
            f"{_OF_KIND} ORDER BY rowid LIMIT ?"
        )
        place, kind = -1, self._part + kind
        while True:
            with sqlite_errors(self._path), closing(self._open_reader()) as db:
                rows = db.execute(query, (place, kind, len(start), start, chunk)).fetchall()
            yield from ((key, self._value(kind, key, value, crc)) for _, key, value, crc in rows)
            if len(rows) < chunk:
                return
            place = rows[-1][0]

    def forget(self, kind: str, *, start: str = "") -> None:
        """Drop the records of a kind whose key begins with ``start``."""
        with self._writing():
            self._db.execute(
                f"DELETE FROM records WHERE {_OF_KIND}", (self._part + kind, len(start), start)
            )

    def _open_reader(self) -> sqlite3.Connection:
        """A connection of its own: it sees what is committed, and does not wait for what is being
        written."""
        address = f"{self._path.resolve().as_uri()}?mode=rw"
        db = sqlite3.connect(address, uri=True, check_same_thread=False)
        db.execute("PRAGMA query_only=1")
        return db

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """The connection and a transaction, for one thread."""
        with self._lock, sqlite_errors(self._path), self._db:
            yield

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """The connection for one thread."""
        with self._lock, sqlite_errors(self._path):
            yield

    def _check(self, crc: int, *texts: str) -> None:
        if crc != crc_of("".join(texts)):
            raise damaged(self._path, "a row is not what was written")


def dump_json(value: Any) -> str:
    """Write a value as JSON that SQLite takes: half of a surrogate pair, in a row of the data for
    instance, is escaped."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, default=list)
    return json.dumps(value, sort_keys=True, default=list) if has_half_pair(text) else text
