"""Run SQL that anybody may have written, such as a model, on a SQLite database: one SELECT, which
reads and nothing else, within a time limit.

    run_query("towns.sqlite", "SELECT name FROM town").rows     # (("Arlen",), ("Bost",))
    run_query("towns.sqlite", "DROP TABLE town").error          # "not authorized"
"""

from __future__ import annotations

import re
import sqlite3
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cowest_dspy.errors import DataError

SECONDS = 2.0
MOST_ROWS = 10_000
_LONGEST = 100_000  # bytes of the SQL, and of any value that it makes
_LONGEST_PATTERN = 1_000  # of LIKE, during which nobody looks at the clock
_STEPS = 1_000  # of SQLite's virtual machine, between two looks at the clock
_READING = frozenset(
    {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
)
_FENCE = re.compile(r"```(?:\w*\n)?(.*?)(?:```|\Z)", re.DOTALL)


@dataclass(frozen=True)
class QueryResult:
    """What a query gave: rows and the names of their columns; or none, and ``error`` says why."""

    rows: tuple[tuple[Any, ...], ...] = ()
    columns: tuple[str, ...] = ()
    error: str | None = None

    def matches(self, other: QueryResult) -> bool:
        """Whether both have the same set of rows, whatever their order; floats to four digits
        behind the point, text without case. What failed matches nothing."""
        return not self.error and not other.error and _as_set(self) == _as_set(other)


def run_query(
    database: str | Path, sql: str, *, seconds: float = SECONDS, most: int = MOST_ROWS
) -> QueryResult:
    """Run one SELECT. Whatever is wrong with it is the result's ``error``; the database is opened
    read-only, and everything but reading is refused.

    Args:
        database: a file of SQLite.
        sql: a fence of Markdown around it is left off.
        seconds: after which it is broken off.
        most: rows; more are an error.

    Raises:
        DataError: there is no such file.
    """
    file = Path(database).resolve()
    if not file.is_file():
        raise DataError(f"There is no database {database}.")
    fenced = _FENCE.search(sql)
    with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as connection:
        _restrict(connection, time.monotonic() + seconds)
        try:
            cursor = connection.execute(fenced[1] if fenced else sql)
            rows = cursor.fetchmany(most + 1)
        except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
            late = str(error) == "interrupted"
            return QueryResult(error=f"longer than {seconds:g} s" if late else str(error))
    if cursor.description is None:
        return QueryResult(error="no SELECT")
    if len(rows) > most:
        return QueryResult(error=f"more than {most} rows")
    return QueryResult(tuple(rows), tuple(column[0] for column in cursor.description))


def _restrict(connection: sqlite3.Connection, end: float) -> None:
    def authorize(action: int, *_: str | None) -> int:
        return sqlite3.SQLITE_OK if action in _READING else sqlite3.SQLITE_DENY

    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST)
    connection.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, _LONGEST_PATTERN)
    connection.text_factory = lambda value: value.decode("utf-8", "replace")
    connection.set_authorizer(authorize)
    connection.set_progress_handler(lambda: time.monotonic() > end, _STEPS)


def _as_set(result: QueryResult) -> frozenset[tuple[Any, ...]]:
    return frozenset(tuple(map(_plain, row)) for row in result.rows)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    return value.casefold() if isinstance(value, str) else value
