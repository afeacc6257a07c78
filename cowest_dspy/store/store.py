"""The run's store: one SQLite file in the run folder. Every paid answer is committed before it is
used.

A call is kept under the content of its request (model id with its weights' hash, messages,
settings, seed), so that a run that was killed anywhere goes on where it stood and pays for nothing
twice. Two equal requests at once cost one call. Failures are noted and asked again the next time.
One process at a time may hold a run, and a [budget] limits it (budget.py).

Before a request leaves, a row among the failures says that it is under way; the commit of its
answer takes the row away. What a killed process has left counts as spent. What a stage cost is the
sum over its calls in this file, whichever process made them.

A file of an older version is brought to this one when it is opened, in one transaction. A row that
does not fit its checksum, or a page that cannot be read, is an error that names ``cowest doctor
--repair`` (repair.py), which saves the rest.
"""

from __future__ import annotations

import copy
import itertools
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspy.lm15 import Request, Response
from dspy.utils.exceptions import LMTransportError

from cowest_dspy.errors import StoreError, masked
from cowest_dspy.store import schema, serialize
from cowest_dspy.store.budget import Bill, Budget, BudgetGuard, Clock, Limit, Paying
from cowest_dspy.store.call_context import with_context
from cowest_dspy.store.journal import Journal
from cowest_dspy.store.merging import Merging
from cowest_dspy.store.open_calls import OpenCalls
from cowest_dspy.store.record import failure
from cowest_dspy.store.schema import (
    CHECKED_BYTES,
    KILLED,
    UNDER_WAY,
    crc_of,
    damaged,
    lock_folder,
    sqlite_errors,
)
from cowest_dspy.store.steps import dump_json
from cowest_dspy.store.usage import Usage, UsageCounter
from cowest_dspy.utils.reading import file_errors
from cowest_dspy.utils.safe_text import without_half_pairs
from cowest_dspy.utils.settings import read_settings


@dataclass(eq=False)
class _Write:
    """The statements of one call that wait for their commit. ``answer``: what is committed, where
    it is an answer. ``lasting``: it must outlive a failure of the power, and not only the
    process."""

    statements: tuple[tuple[str, tuple[Any, ...]], ...]
    answer: dict[str, Any] | None = None
    lasting: bool = True
    done: bool = False
    error: StoreError | None = None


class Store(Merging):
    """A run folder, held by this process. Use as a context manager, or call :meth:`close`.

    Args:
        folder: the run's folder; made when it is not there.
        reuse: other runs' folders, whose answers to the very same requests are taken over instead
            of asking again.
        budget: what this run may spend, over all its processes, or a dictionary of it; at a limit,
            :meth:`answer` raises BudgetError.
        strong: the id of the strong model, whose calls ``budget.strong_calls`` counts.
        known: a file of answers (:meth:`copy_calls`) that are given for the same requests, and cost
            nothing here.

    Raises:
        ConfigError: a dictionary as ``budget`` with an unknown key or a value that cannot be.
        StoreError: another process holds the folder, it cannot be written, the file is damaged, or
            a newer version wrote it.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        reuse: Sequence[str | Path] = (),
        budget: Budget | Mapping[str, Any] | None = None,
        strong: str | None = None,
        known: str | Path | None = None,
    ) -> None:
        limits = read_settings(budget, Budget, "budget")
        self.folder = Path(folder)
        self._path, self._part, self.root = self.folder / "run.sqlite", "", self
        with file_errors(StoreError, self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._hold = lock_folder(self.folder)
        self._lock = threading.RLock()
        self._turns = threading.Lock()
        self._asking: dict[str, tuple[threading.Lock, int]] = {}
        self._queue: list[_Write] = []
        self.stage, self._counter, self._began, self._closed = "none", UsageCounter(), None, False
        try:
            self._db = self._open(self._path)
            self._reader, self._reader_lock = self._open_reader(), threading.Lock()
            self._answers = ["main.calls"]
            if known is not None:
                # Immutable: it is read without locks, on storage that many machines share.
                address = f"{Path(known).resolve().as_uri()}?mode=ro&immutable=1"
                self._reader.execute("ATTACH DATABASE ? AS known", (address,))
                self._answers.append("known.calls")
            self._take_over([Path(other) / "run.sqlite" for other in reuse])
            self._rows = self._note_killed_calls()
            self._clock, self.guard = Clock(), None
            self._session = f"seconds of session {self._sessions() + 1}"
            if limits.limited:
                self.guard = BudgetGuard(limits, self._clock, self.bill())
            if strong is not None:
                self.set_strong(strong)
            self._calls, bill = OpenCalls(), self.guard.bill if self.guard else self.bill()
            self.journal = Journal(
                self.folder, kept=self.calls(), usd=bill.usd, limits=self._limits
            )
        except BaseException:
            self._hold.release()
            raise

    def _open(self, path: Path) -> sqlite3.Connection:
        if schema.is_emptied(path):
            raise damaged(path, schema.EMPTIED)
        known = path.is_file()
        with sqlite_errors(path):
            db = sqlite3.connect(path, check_same_thread=False)
        schema.add_functions(db)
        try:
            with sqlite_errors(path):
                if (
                    known
                    and schema.has_worked(path.parent)
                    and not db.execute("PRAGMA user_version").fetchone()[0]
                ):
                    raise damaged(path, schema.EMPTIED)
                db.execute("PRAGMA journal_mode=WAL")
                # FULL: an answer that was paid for is on the disk, not only in the system's memory,
                # when it is used.
                db.execute("PRAGMA synchronous=FULL")
                schema.migrate(db, path)
                if path.stat().st_size <= CHECKED_BYTES:
                    (found,) = db.execute("PRAGMA quick_check(1)").fetchone()
                    if found != "ok":
                        raise sqlite3.DatabaseError(found)
        except BaseException:
            db.close()
            raise
        return db

    def within(self, name: str) -> Store:
        """The same store for a part of the run: it shares calls, budget and file, and keeps its own
        records and stages, under ``name``, and a folder of its own below this one. Closing it
        closes nothing."""
        part = copy.copy(self)
        part.folder, part._part = self.folder / "variants" / name, f"{self._part}{name}/"
        part._queue, part.stage, part._counter, part._began = [], "none", UsageCounter(), None
        part.folder.mkdir(parents=True, exist_ok=True)
        return part

    @property
    def prefix(self) -> str:
        """What stands before titles of stages and messages: of a part of a run, its name."""
        return self._part.replace("/", ": ")

    def close(self, error: BaseException | None = None) -> None:
        """Release the folder, when the calls that are under way in other threads are committed.
        ``error`` ended the work: it is in the run's state, and calls that only wait for their turn
        are let go."""
        if self._part or self._closed:
            return
        self._closed = True
        self._calls.settle(now=error is not None, for_good=True)
        self.journal.close(error)
        self._reader.close()
        self._db.close()
        self._hold.release()

    def __enter__(self) -> Store:
        return self

    def settle(self) -> None:
        """Wait for the calls that are under way in other threads after an interruption, so that
        they are kept and booked."""
        self._calls.settle(now=True)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.close(error)

    def _limits(self) -> tuple[Limit, ...]:
        return self.guard.limits() if self.guard else ()

    def _note_killed_calls(self) -> Iterator[int]:
        """Note what the process before us has left under way; return the numbers of the rows that
        this one may write."""
        with self._writing():
            self._db.execute("UPDATE failures SET error = ? WHERE error = ?", (KILLED, UNDER_WAY))
            (last,) = self._db.execute("SELECT coalesce(max(rowid), 0) FROM failures").fetchone()
        return itertools.count(last + 1)

    @contextmanager
    def spending(self, stage: str) -> Iterator[UsageCounter]:
        """Book the calls inside this context under ``stage``; yield the running sum."""
        before = self.stage, self._counter, self._began
        self.stage, self._counter = self._part + stage, UsageCounter()
        known = self._seconds_in(stage)
        self._began = time.monotonic() - known
        counter = self._counter
        try:
            with self._clock:
                yield counter
        finally:
            read = known and counter.usage.only_read
            seconds = known if read else time.monotonic() - self._began
            counter.set_seconds(seconds)
            with self._writing():
                self._note_time(seconds)
            self.stage, self._counter, self._began = before

    @property
    def usage(self) -> Usage:
        """The usage of the stage under way, in this process so far."""
        return self._counter.usage

    def _seconds_in(self, stage: str) -> float:
        """Seconds at work in a stage, of all processes, as far as they have noted them; earlier
        versions did in its record."""
        with self._reading():
            row = self._db.execute(
                "SELECT value FROM meta WHERE key = ?", (f"{schema.TIME_IN}{self._part}{stage}",)
            ).fetchone()
        return float(row[0] if row else (self.record("stage", stage) or {}).get("seconds", 0.0))

    def cost(self, stage: str) -> dict[str, Any]:
        """The cost of a stage: ``calls`` that were answered, their ``tokens_in``,
        ``tokens_out`` and ``usd`` (None: the price of one is not known), its ``seconds`` at work in
        all processes, and how many calls failed as a ``note``."""
        with self._reading():
            sums = schema.stage_sums(self._db, self._part + stage)
        return {"seconds": self._seconds_in(stage), **sums.get(self._part + stage, schema.NO_COST)}

    def costs(self) -> dict[str, dict[str, Any]]:
        """:meth:`cost` of every stage, with what else was kept of it; also of those that no process
        has brought to an end."""
        known = self.records("stage")
        with self._reading():
            sums = schema.stage_sums(self._db)
        mine = {
            name.removeprefix(self._part): cost
            for name, cost in sums.items()
            if name.startswith(self._part)
        }
        # Behind a "/" are the stages of parts of the run, which have costs of their own.
        names = (*known, *(name for name in mine if name not in known and "/" not in name))
        return {
            name: {
                **known.get(name, {}),
                "seconds": self._seconds_in(name),
                **mine.get(name, schema.NO_COST),
            }
            for name in names
        }

    def set_strong(self, model: str) -> None:
        """Set the model whose calls ``strong_calls`` counts; what the run has made of them before
        is counted from the store."""
        if self.guard is not None:
            self.guard.strong, self.guard.bill = model, self.bill(model)

    def bill(self, strong: str | None = None) -> Bill:
        """Sum up what this run has spent, over all its processes; with the attempts on the model of
        the id ``strong``.

        An answer that was taken over from another run cost nothing here. A call that was under way
        at a kill cost at most what any other of its model did.
        """
        with self._reading():
            return schema.bill_of(self._db, strong, besides=self._session)

    def _sessions(self) -> int:
        with self._reading():
            return int(
                self._db.execute(
                    "SELECT count(*) FROM meta WHERE key LIKE 'seconds of %'"
                ).fetchone()[0]
            )

    def _note_time(self, seconds: float | None = None) -> None:
        """Within a transaction: how long this process was at work on the run; and all of them on
        the stage, by default so far."""
        noted = [(self._session, str(self._clock.seconds))]
        if self._began is not None:
            noted.append(
                (
                    f"{schema.TIME_IN}{self.stage}",
                    str(time.monotonic() - self._began if seconds is None else seconds),
                )
            )
        self._db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", noted)

    def answer(self, request: Request, ask: Callable[[], Response]) -> tuple[Response, bool]:
        """``(response, cached)``: what is kept for this request, otherwise what ``ask()`` gives,
        committed before it is returned.

        A failure of ``ask`` is noted and raised.

        Raises:
            BudgetError: the budget is used up; nothing was asked.
            StoreError: the file cannot be read or written.
        """
        asked = serialize.request_to_dict(request)
        key = serialize.content_key(asked)
        # Also what is only read: a thread left behind must not find a file that is closed.
        with self._calls.call(), self._turn(key):
            known = self._find_answer(key)
            if known is not None:
                with self._lock:
                    self._count(Usage(cached=1))
                return known, True
            started = time.monotonic()
            admission = self.guard.paying(request.model) if self.guard else nullcontext(Paying())
            with (
                self._clock,
                self._calls.model_call(),
                admission as paying,
                with_context(paying=paying),
            ):
                row = next(self._rows)
                begin = (row, key, self.stage, request.model, UNDER_WAY, time.time())
                self._commit(_Write(((schema.BEGIN, begin),), lasting=False))
                paying.on_retry = lambda attempts: self._commit(
                    _Write(((schema.RETRY, (attempts, row)),), lasting=False)
                )
                try:
                    response = ask()
                    seconds = time.monotonic() - started
                    self._commit_answer(row, key, asked, response, seconds, paying.attempts)
                except BaseException as error:
                    # Ctrl-C too: what was under way may have been paid for.
                    self._commit_failure(row, error, paying.attempts)
                    raise
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

    def _find_answer(self, key: str) -> Response | None:
        # On a connection of its own, which sees all that is committed: it waits for no disk.
        row = None
        with self._reader_lock, sqlite_errors(self._path):
            for table in self._answers:
                row = self._reader.execute(
                    f"SELECT request, response, crc FROM {table} WHERE key = ?", (key,)
                ).fetchone()
                if row is not None:
                    break
        if row is None:
            return None
        self._check(row[2], key, row[0], row[1])
        return serialize.response_from_dict(json.loads(row[1]))

    def _commit_answer(
        self,
        row: int,
        key: str,
        asked: Mapping[str, Any],
        response: Response,
        seconds: float,
        attempts: int,
    ) -> None:
        """Commit an answer, in the place of the row that says that it is under way.

        Raises:
            LMTransportError: it is no answer that can be written.
            StoreError: it could not be written.
        """
        answer, model = serialize.response_to_dict(response), str(asked["model"])
        request, written = dump_json(asked), json.dumps(answer, ensure_ascii=False, sort_keys=True)
        if (fault := serialize.find_fault(answer, written)) is not None:
            raise LMTransportError(f"The answer is garbled: {fault}.", model=model)
        tokens, usd = answer["input_tokens"] + answer["output_tokens"], answer["usd"]
        values = (
            key, self.stage, model, request, written, seconds, time.time(),
            tokens, usd, attempts, crc_of(key + request + written),
        )  # fmt: skip
        self._commit(_Write(((schema.ANSWER, values), (schema.END, (row,))), answer))
        if self.guard:
            self.guard.book(model, tokens, usd)

    def _commit_failure(self, row: int, error: BaseException, attempts: int) -> None:
        text = without_half_pairs(masked(f"{type(error).__name__}: {error}")[:1000])
        write = _Write(((schema.FAIL, (text, attempts, time.time(), row)),))
        if isinstance(error, StoreError):
            with suppress(
                StoreError
            ):  # The first one says what is wrong, and it is no failure of a model.
                self._commit(write)
            return
        self._commit(write)
        with self._lock:
            self._counter.add(Usage(failed=1))
        if isinstance(error, Exception):
            self.journal.failed(failure(error).partition(":")[0])

    def _commit(self, mine: _Write) -> None:
        """Commit what one call has to write, together with what came while the last commit was
        under way: writing to the disk is what takes time, and it is the same for one as for many.
        Returns when it is committed.

        Raises:
            StoreError: it could not be written; what others have written is theirs.
        """
        with self._turns:
            self._queue.append(mine)
        with self._lock:
            if not mine.done:
                with self._turns:
                    together, self._queue = self._queue, []
                try:
                    self._commit_all(together)
                finally:
                    # Ctrl-C in the main thread, outside of a command: it is for that thread alone.
                    with self._turns:
                        self._queue[:0] = [
                            one for one in together if not one.done and one is not mine
                        ]
        if mine.error is not None:
            raise StoreError(str(mine.error)) from mine.error

    def _commit_all(self, writes: Sequence[_Write]) -> None:
        failed: StoreError | None = None
        lasting = any(one.lasting for one in writes)
        try:
            with self._writing():
                if not lasting:
                    self._db.execute("PRAGMA synchronous=NORMAL")
                for statement, values in (one for write in writes for one in write.statements):
                    self._db.execute(statement, values)
                if lasting:
                    self._note_time()
        except StoreError as error:
            failed = error
        except (ValueError, OverflowError, TypeError) as error:
            # A value that SQLite does not take; find_fault lets none through that is known.
            failed = StoreError(
                f"{self._path} could not be written ({error}). What was not written is not used."
            )
        finally:
            if not lasting:
                self._db.execute("PRAGMA synchronous=FULL")
        if failed is not None and len(writes) > 1:
            # What is wrong with one is no reason to lose the others.
            for one in writes:
                self._commit_all([one])
            return
        for one in writes:
            one.done, one.error = True, failed
            if failed is None and one.answer is not None:
                self._count(Usage.of_answer(one.answer))

    def _count(self, usage: Usage) -> None:
        """Within the lock: add calls to the stage's and to the process's sum."""
        self._counter.add(usage)
        self.journal.add(usage)

    def count_unusable(self, kind: str) -> None:
        """Count an answer that was given and cannot be used, by what is wrong with it."""
        self.journal.failed(kind)

    def seconds_of(self, request: Request) -> float:
        """The seconds that the answer to this request took when it was asked for; 0 when
        there is none."""
        with self._reading():
            row = self._db.execute(
                "SELECT seconds FROM calls WHERE key = ?", (serialize.request_key(request),)
            ).fetchone()
        return float(row[0]) if row else 0.0

    def request_messages(self, key: str) -> list[dict[str, str]] | None:
        """The messages of an answered request by its key; None where the store does not have it."""
        with self._reading():
            row = self._db.execute("SELECT request FROM calls WHERE key = ?", (key,)).fetchone()
        return json.loads(row[0])["messages"] if row else None

    def calls(self) -> int:
        """Count the answers in the store."""
        with self._reading():
            return int(self._db.execute("SELECT count(*) FROM calls").fetchone()[0])
