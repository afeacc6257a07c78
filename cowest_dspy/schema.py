"""The store's file: its lock, its tables from version to version, the checksums of its rows, and what its errors mean.

db = sqlite3.connect(path)
with_functions(db)
migrate(db, path)            # from nothing, or from any older version, in one transaction
"""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from cowest_dspy.errors import StoreError

# From one version to the next. What was released is never changed; a new version is a new entry.
# No table is added: repair.py relies on where those of version 1 begin in the file.
MIGRATIONS: dict[int, str] = {
    1: """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE calls (key TEXT PRIMARY KEY, stage TEXT NOT NULL, model TEXT NOT NULL, request TEXT NOT NULL,
                    response TEXT NOT NULL, seconds REAL NOT NULL, created REAL NOT NULL);
CREATE TABLE failures (key TEXT NOT NULL, stage TEXT NOT NULL, model TEXT NOT NULL, error TEXT NOT NULL, created REAL NOT NULL);
CREATE TABLE records (kind TEXT NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (kind, key));
""",
    # tokens, and usd (NULL: not known), so that sums are SQL; attempts with their retries, 0 where another run has paid; checksums.
    2: """
ALTER TABLE calls ADD COLUMN tokens INTEGER NOT NULL DEFAULT 0;
ALTER TABLE calls ADD COLUMN usd REAL;
ALTER TABLE calls ADD COLUMN attempts INTEGER NOT NULL DEFAULT 1;
ALTER TABLE calls ADD COLUMN crc INTEGER;
ALTER TABLE failures ADD COLUMN attempts INTEGER NOT NULL DEFAULT 1;
ALTER TABLE records ADD COLUMN crc INTEGER;
UPDATE calls SET tokens = tokens_of(response), usd = usd_of(response), crc = crc_of(key || request || response);
UPDATE records SET crc = crc_of(kind || key || value);
""",
}
SCHEMA_VERSION = max(MIGRATIONS)
# Larger ones are only found damaged where they are read: the check reads all of the file.
CHECKED_BYTES = 100_000_000
# An error without a code is of a text that is not UTF-8; SQLITE_ERROR is a table that is not there, or a row that is not ours.
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR, None)
CALL_COLUMNS = "key, stage, model, request, response, seconds, created, tokens, usd, attempts, crc"


def migrate(db: sqlite3.Connection, path: Path) -> None:
    """Brings a file to this version in one transaction: from nothing, or from an older version.

    Raises:
        StoreError: it was written by a newer version.
    """
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version > SCHEMA_VERSION:
        raise StoreError(f"{path} was written by a newer cowest_dspy (schema {version}): update, or start a new run.")
    if version < SCHEMA_VERSION:
        steps = "".join(MIGRATIONS[number] for number in range(version + 1, SCHEMA_VERSION + 1))
        try:
            db.executescript(f"BEGIN IMMEDIATE; {steps} PRAGMA user_version={SCHEMA_VERSION}; COMMIT;")
        except BaseException:
            db.rollback()
            raise


def with_functions(db: sqlite3.Connection) -> None:
    """Gives a connection the functions that migrations speak of."""
    db.create_function("crc_of", 1, crc_of, deterministic=True)
    db.create_function("tokens_of", 1, lambda response: sum(_tokens(json.loads(response))), deterministic=True)
    db.create_function("usd_of", 1, lambda response: json.loads(response).get("usd"), deterministic=True)


def _tokens(answer: dict[str, Any]) -> tuple[int, int]:
    return answer["input_tokens"], answer["output_tokens"]


def crc_of(text: str) -> int:
    """A checksum of 32 bits: it finds what a disk has damaged, and is no secret's guard."""
    return zlib.crc32(text.encode("utf-8", "surrogatepass"))


def damaged(path: Path, how: object) -> StoreError:
    """The error of a file that is not what was written."""
    return StoreError(
        f"{path} is damaged ({how}). `cowest doctor --repair {path.parent}` saves what can be read of it; nothing was changed."
    )


def held(folder: Path) -> filelock.BaseFileLock:
    """The lock of a run's folder, held; it is given free with ``release()``, or at the end of ``with``.

    Raises:
        StoreError: another process holds it.
    """
    lock = filelock.FileLock(folder / "run.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise StoreError(f"{folder} is in use by another process. Wait for it, or give another folder with --run.") from None
    return lock


@contextmanager
def told(path: Path) -> Iterator[None]:
    """What SQLite raises inside becomes a StoreError that says what to do."""
    try:
        yield
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", None) in _DAMAGE:
            raise damaged(path, error) from error
        raise StoreError(
            f"{path} could not be written ({error}): is the disk full, or the file not ours? What was not written is not used."
        ) from error
