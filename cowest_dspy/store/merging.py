"""Calls of other stores: taken over from other runs, merged from shards, and copied for them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cowest_dspy.errors import StoreError
from cowest_dspy.store import schema
from cowest_dspy.store.schema import CALL_COLUMNS, damaged, sqlite_errors
from cowest_dspy.store.steps import Records
from cowest_dspy.store.usage import Usage


class Merging(Records, ABC):
    """The part of a store that reads and writes other stores."""

    _rows: Iterator[int]

    @abstractmethod
    def _count(self, usage: Usage) -> None:
        """Add calls to the stage's and to the process's sum."""

    def _take_over(self, others: Sequence[Path]) -> None:
        """Copy the calls of other runs; each keeps the stage under which it was first paid, and
        costs this run nothing."""
        for other in others:
            if not other.is_file():
                raise StoreError(f"There is no run in {other.parent}: no {other.name}.")
            with sqlite_errors(other):
                self._db.execute("ATTACH DATABASE ? AS other", (str(other),))
                with self._db:
                    self._db.execute(
                        f"INSERT OR IGNORE INTO calls ({CALL_COLUMNS}) SELECT key, stage, model, "
                        "request, response, seconds, "
                        "created, tokens_of(response), usd_of(response), 0, crc_of(key || request "
                        "|| response) FROM other.calls"
                    )
                self._db.execute("DETACH DATABASE other")

    def copy_calls(self, path: Path) -> None:
        """Write all answers into a file of their own, for :class:`Store` ``known``."""
        path.unlink(missing_ok=True)
        with self._attached(path, "copy"), self._db:
            self._db.execute("CREATE TABLE copy.calls AS SELECT * FROM main.calls WHERE 0")
            self._db.execute("INSERT INTO copy.calls SELECT * FROM main.calls")
            self._db.execute("CREATE UNIQUE INDEX copy.calls_key ON calls (key)")

    def merge(self, folder: Path, *, kinds: Sequence[str] = ()) -> None:
        """Take over the calls that the store in another folder has, at what they cost, its
        failures, and its records of these kinds, in their order. Doing it twice is doing it once.

        An answer to a request that both have answered was paid for twice: it is kept under a key
        that no request has.

        Raises:
            StoreError: the other store is in use or damaged; nothing was taken over.
        """
        # Opening it brings it to this version, and notes what its process has left under way.
        open_store: Any = type(self)
        with open_store(folder) as other, self._attached(other._path, "other"):
            if self._db.execute(schema.WRONG_CALLS).fetchone()[0]:
                raise damaged(other._path, "a row is not what was written")
            with self._db:
                self._db.execute(schema.MERGE_CALLS)
                for row in self._db.execute(schema.NEW_FAILURES).fetchall():
                    self._db.execute(schema.ADD_FAILURE, (next(self._rows), *row))
                for kind in kinds:
                    self._db.execute(schema.MERGE_RECORDS, {"part": self._part, "kind": kind})
            for tokens_in, tokens_out, usd in self._db.execute(schema.MERGED_COSTS).fetchall():
                self._count(Usage(calls=1, tokens_in=tokens_in, tokens_out=tokens_out, usd=usd))

    @contextmanager
    def _attached(self, path: Path, name: str) -> Iterator[None]:
        """Another file beside this one on the same connection, for one thread."""
        with self._lock, sqlite_errors(self._path):
            self._db.execute(f"ATTACH DATABASE ? AS {name}", (str(path),))
            try:
                yield
            finally:
                self._db.execute(f"DETACH DATABASE {name}")
