"""The run's store: one SQLite file in the run folder. Every paid answer is committed before it is used.

A call is kept under the content of its request (model id with its weights' hash, messages, settings, seed), so that a run that
was killed anywhere goes on where it stood and pays for nothing twice. Two equal requests at once cost one call. Failures are
noted and asked again the next time. One process at a time may hold a run.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
from dspy.lm15 import Request, Response

from cowest_dspy.errors import StoreError, masked
from cowest_dspy.lms import wire
from cowest_dspy.lms.prices import added

SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE calls (key TEXT PRIMARY KEY, stage TEXT NOT NULL, model TEXT NOT NULL, request TEXT NOT NULL,
                    response TEXT NOT NULL, seconds REAL NOT NULL, created REAL NOT NULL);
CREATE TABLE failures (key TEXT NOT NULL, stage TEXT NOT NULL, model TEXT NOT NULL, error TEXT NOT NULL, created REAL NOT NULL);
CREATE TABLE records (kind TEXT NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (kind, key));
"""
_OF_KIND = "kind = ? AND substr(key, 1, ?) = ?"


@dataclass
class Spent:
    """What a stretch of work cost: calls made and answered from the store, failures, and tokens of the calls made.

    ``usd`` is US dollars for the calls made; None as soon as the price of one of them is not known.
    """

    calls: int = 0
    cached: int = 0
    failed: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    usd: float | None = 0.0

    @property
    def only_read(self) -> bool:
        """Whether the work was answered from the store alone."""
        return self.cached > 0 and not self.calls and not self.failed


@dataclass(eq=False)
class _Answer:
    """An answer that waits for its commit."""

    row: tuple[Any, ...]
    answer: dict[str, Any]
    done: bool = False
    error: StoreError | None = None


class Store:
    """A run folder, held by this process. Use as a context manager, or call :meth:`close`.

    Args:
        folder: the run's folder; made when it is not there.
        reuse: other runs' folders, whose answers to the very same requests are taken over instead of asking again.

    Raises:
        StoreError: another process holds the folder, the file is damaged, or it was written by a newer version.
    """

    def __init__(self, folder: str | Path, *, reuse: Sequence[str | Path] = ()) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._hold = filelock.FileLock(self.folder / "run.lock")
        try:
            self._hold.acquire(timeout=0)
        except filelock.Timeout:
            raise StoreError(
                f"{self.folder} is in use by another process. Wait for it, or give another folder with --run."
            ) from None
        self._lock = threading.RLock()
        self._turns = threading.Lock()
        self._asking: dict[str, tuple[threading.Lock, int]] = {}
        self._queue: list[_Answer] = []
        self.stage, self.spent = "none", Spent()
        try:
            self._db = self._open(self.folder / "run.sqlite")
            self._reader, self._reader_lock = self._open_reader(), threading.Lock()
            self._take_over([Path(other) / "run.sqlite" for other in reuse])
        except BaseException:
            self._hold.release()
            raise

    def _open(self, path: Path) -> sqlite3.Connection:
        db = sqlite3.connect(path, check_same_thread=False)
        try:
            db.execute("PRAGMA journal_mode=WAL")
            # FULL: an answer that was paid for is on the disk, not only in the system's memory, when it is used.
            db.execute("PRAGMA synchronous=FULL")
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                db.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version={SCHEMA_VERSION}; COMMIT;")
            elif version > SCHEMA_VERSION:
                raise StoreError(f"{path} was written by a newer cowest_dspy (schema {version}): update, or start a new run.")
        except sqlite3.DatabaseError as error:
            db.close()
            raise StoreError(f"{path} is damaged ({error}). Move it away to start anew; nothing was changed.") from error
        except StoreError:
            db.close()
            raise
        return db

    def _take_over(self, others: Sequence[Path]) -> None:
        """Copies the calls of other runs; each keeps the stage under which it was first paid."""
        for other in others:
            if not other.is_file():
                raise StoreError(f"There is no run in {other.parent}: no {other.name}.")
            self._db.execute("ATTACH DATABASE ? AS other", (str(other),))
            with self._db:
                self._db.execute("INSERT OR IGNORE INTO calls SELECT * FROM other.calls")
            self._db.execute("DETACH DATABASE other")

    def close(self) -> None:
        """Gives the folder free; everything was committed before."""
        self._reader.close()
        self._db.close()
        self._hold.release()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def spending(self, stage: str) -> Iterator[Spent]:
        """Books the calls inside this context under ``stage``; gives the running sum."""
        before, self.stage, self.spent = (self.stage, self.spent), stage, Spent()
        try:
            yield self.spent
        finally:
            self.stage, self.spent = before

    def answer(self, request: Request, ask: Callable[[], Response]) -> tuple[Response, bool]:
        """``(response, cached)``: what is kept for this request, otherwise what ``ask()`` gives, committed before it is returned.

        A failure of ``ask`` is noted and raised.
        """
        key = wire.request_key(request)
        with self._turn(key):
            known = self._known(key)
            if known is not None:
                with self._lock:
                    self.spent.cached += 1
                return known, True
            started = time.monotonic()
            try:
                response = ask()
            except Exception as error:
                self._fail(key, request.model, error)
                raise
            self._commit(key, request, response, time.monotonic() - started)
            return response, False

    @contextmanager
    def _turn(self, key: str) -> Iterator[None]:
        """One asks for a key at a time. Its lock is dropped when nobody waits for it."""
        with self._turns:
            mine, waiting = self._asking.get(key) or (threading.Lock(), 0)
            self._asking[key] = mine, waiting + 1
        try:
            with mine:
                yield
        finally:
            with self._turns:
                mine, waiting = self._asking.pop(key)
                if waiting > 1:
                    self._asking[key] = mine, waiting - 1

    def _known(self, key: str) -> Response | None:
        # On a connection of its own, which sees all that is committed: a question does not wait for the disk.
        with self._reader_lock:
            row = self._reader.execute("SELECT response FROM calls WHERE key = ?", (key,)).fetchone()
        return wire.response_from_dict(json.loads(row[0])) if row else None

    def _commit(self, key: str, request: Request, response: Response, seconds: float) -> None:
        """Commits an answer, together with those that came while the last commit was under way: writing to the disk is what
        takes time, and it is the same for one as for many. Returns when it is committed."""
        answer = wire.response_to_dict(response)
        asked, said = _dumps(wire.request_to_dict(request)), _dumps(answer)
        mine = _Answer((key, self.stage, request.model, asked, said, seconds, time.time()), answer)
        with self._turns:
            self._queue.append(mine)
        with self._lock:
            if not mine.done:
                with self._turns:
                    together, self._queue = self._queue, []
                self._commit_all(together)
        if mine.error is not None:
            raise mine.error

    def _commit_all(self, answers: Sequence[_Answer]) -> None:
        try:
            with self._db:
                self._db.executemany("INSERT INTO calls VALUES (?, ?, ?, ?, ?, ?, ?)", [one.row for one in answers])
        except sqlite3.Error as error:
            for one in answers:
                one.error = StoreError(f"An answer could not be written to {self.folder / 'run.sqlite'} ({error}): it is not used.")
        for one in answers:
            one.done = True
            if one.error is None:
                self.spent.calls += 1
                self.spent.input_tokens += one.answer["input_tokens"]
                self.spent.output_tokens += one.answer["output_tokens"]
                self.spent.usd = added(self.spent.usd, one.answer["usd"])

    def _fail(self, key: str, model: str, error: Exception) -> None:
        text = masked(f"{type(error).__name__}: {error}")[:1000]
        with self._lock, self._db:
            self._db.execute("INSERT INTO failures VALUES (?, ?, ?, ?, ?)", (key, self.stage, model, text, time.time()))
            self.spent.failed += 1

    def calls(self) -> int:
        """How many answers are kept."""
        with self._lock:
            return int(self._db.execute("SELECT count(*) FROM calls").fetchone()[0])

    def keep(self, kind: str, key: str, value: Mapping[str, Any]) -> None:
        """Keeps a record (a trace, a stage, a result) under its kind and key; a later one replaces an earlier."""
        self.keep_all(kind, {key: value})

    def keep_all(self, kind: str, values: Mapping[str, Mapping[str, Any]]) -> None:
        """Keeps several records in one transaction."""
        rows = [(kind, key, _dumps(dict(value))) for key, value in values.items()]
        with self._lock, self._db:
            self._db.executemany("INSERT OR REPLACE INTO records VALUES (?, ?, ?)", rows)

    def record(self, kind: str, key: str) -> dict[str, Any] | None:
        """The record of that kind and key, or None."""
        with self._lock:
            row = self._db.execute("SELECT value FROM records WHERE kind = ? AND key = ?", (kind, key)).fetchone()
        return json.loads(row[0]) if row else None

    def records(self, kind: str) -> dict[str, dict[str, Any]]:
        """All records of a kind by key, in the order in which they were first kept."""
        with self._lock:
            rows = self._db.execute("SELECT key, value FROM records WHERE kind = ? ORDER BY rowid", (kind,)).fetchall()
        return {key: json.loads(value) for key, value in rows}

    def count(self, kind: str, *, start: str = "") -> int:
        """How many records of a kind there are, of those whose key begins with ``start``. Also when the store is closed."""
        with closing(self._open_reader()) as db:
            row = db.execute(f"SELECT count(*) FROM records WHERE {_OF_KIND}", (kind, len(start), start)).fetchone()
        return int(row[0])

    def each(self, kind: str, *, start: str = "", chunk: int = 100) -> Iterator[tuple[str, dict[str, Any]]]:
        """Keys and records of a kind, of those whose key begins with ``start``, in the order in which they were last kept.

        A chunk is in memory at a time, and no lock is held in between. Also when the store is closed.
        """
        # NOT INDEXED: by rowid, where the index of the primary key would have every chunk sorted.
        query = f"SELECT rowid, key, value FROM records NOT INDEXED WHERE rowid > ? AND {_OF_KIND} ORDER BY rowid LIMIT ?"
        place = -1
        while True:
            with closing(self._open_reader()) as db:
                rows = db.execute(query, (place, kind, len(start), start, chunk)).fetchall()
            yield from ((key, json.loads(value)) for _, key, value in rows)
            if len(rows) < chunk:
                return
            place = rows[-1][0]

    def _open_reader(self) -> sqlite3.Connection:
        """A connection of its own: it sees what is committed, and does not wait for what is being written."""
        address = f"{(self.folder / 'run.sqlite').resolve().as_uri()}?mode=rw"
        db = sqlite3.connect(address, uri=True, check_same_thread=False)
        db.execute("PRAGMA query_only=1")
        return db

    def forget(self, kind: str, keys: Iterable[str] | None = None) -> None:
        """Drops records of a kind: those with these keys, or all."""
        with self._lock, self._db:
            if keys is None:
                self._db.execute("DELETE FROM records WHERE kind = ?", (kind,))
            else:
                self._db.executemany("DELETE FROM records WHERE kind = ? AND key = ?", [(kind, key) for key in keys])


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=list)
