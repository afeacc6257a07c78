"""The store's file: its lock, its tables from version to version, checksums of rows and sums over
them, and what its errors mean.

db = sqlite3.connect(path)
add_functions(db)
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
from cowest_dspy.store.budget import Bill

# From one version to the next. What was released is never changed; a new version is a new entry.
# No table is added: repair.py relies on where those of version 1 begin in the file.
MIGRATIONS: dict[int, str] = {
    1: """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE calls (key TEXT PRIMARY KEY, stage TEXT NOT NULL, model TEXT NOT NULL,
                    request TEXT NOT NULL, response TEXT NOT NULL, seconds REAL NOT NULL,
                    created REAL NOT NULL);
CREATE TABLE failures (key TEXT NOT NULL, stage TEXT NOT NULL, model TEXT NOT NULL,
                       error TEXT NOT NULL, created REAL NOT NULL);
CREATE TABLE records (kind TEXT NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL,
                      PRIMARY KEY (kind, key));
""",
    # tokens, and usd (NULL: not known), so that sums are SQL; attempts with their retries, 0 where
    # another run has paid; checksums.
    2: """
ALTER TABLE calls ADD COLUMN tokens INTEGER NOT NULL DEFAULT 0;
ALTER TABLE calls ADD COLUMN usd REAL;
ALTER TABLE calls ADD COLUMN attempts INTEGER NOT NULL DEFAULT 1;
ALTER TABLE calls ADD COLUMN crc INTEGER;
ALTER TABLE failures ADD COLUMN attempts INTEGER NOT NULL DEFAULT 1;
ALTER TABLE records ADD COLUMN crc INTEGER;
UPDATE calls SET tokens = tokens_of(response), usd = usd_of(response),
                 crc = crc_of(key || request || response);
UPDATE records SET crc = crc_of(kind || key || value);
""",
}
SCHEMA_VERSION = max(MIGRATIONS)
# Larger ones are only found damaged where they are read: the check reads all of the file.
CHECKED_BYTES = 100_000_000
UNREADABLE = (sqlite3.Error, UnicodeDecodeError)
"""The errors of SQLite; one whose message quotes damaged bytes cannot be decoded."""
# An error without a code is of a text that is not UTF-8; SQLITE_ERROR is a table that is not there,
# or a row that is not ours.
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR, None)
EMPTIED = "it holds nothing, although its run has worked"
# What a run's folder has in it besides the store, once a process has worked on it.
OF_A_RUN = (
    "progress.json",
    "config.toml",
    "report.json",
    "report.html",
    "adapters",
    "variants",
    "pairs.jsonl",
)
CALL_COLUMNS = "key, stage, model, request, response, seconds, created, tokens, usd, attempts, crc"

UNDER_WAY, KILLED = "under way", "killed: under way when its process was killed"
"""The error of a call that has neither answered nor failed yet; of a process that is gone, the
second."""
BEGIN = (
    "INSERT OR IGNORE INTO failures (rowid, key, stage, model, error, created, attempts) "
    "VALUES (?, ?, ?, ?, ?, ?, 1)"
)
RETRY = "UPDATE failures SET attempts = ? WHERE rowid = ?"
END = "DELETE FROM failures WHERE rowid = ?"
FAIL = "UPDATE failures SET error = ?, attempts = ?, created = ? WHERE rowid = ?"
# OR IGNORE: what an interruption has left in the middle is written once more.
ANSWER = (
    f"INSERT OR IGNORE INTO calls ({CALL_COLUMNS}) VALUES "
    f"({', '.join('?' * len(CALL_COLUMNS.split(',')))})"
)
# Between this file (main) and another one (other): Store.merge.
WRONG_CALLS = "SELECT count(*) FROM other.calls WHERE crc IS NOT crc_of(key || request || response)"
MERGE_CALLS = f"""
INSERT OR IGNORE INTO main.calls ({CALL_COLUMNS})
SELECT name, stage, model, request, response, seconds, created, tokens, usd, attempts,
       crc_of(name || request || response)
FROM (SELECT *, iif(EXISTS(SELECT 1 FROM main.calls AS mine
                           WHERE mine.key = theirs.key AND mine.created != theirs.created),
                    key || ' again ' || created, key) AS name FROM other.calls AS theirs)
"""
NEW_FAILURES = (
    "SELECT key, stage, model, error, created, attempts FROM other.failures EXCEPT "
    "SELECT key, stage, model, error, created, attempts FROM main.failures"
)
ADD_FAILURE = (
    "INSERT INTO main.failures (rowid, key, stage, model, error, created, attempts) "
    "VALUES (?, ?, ?, ?, ?, ?, ?)"
)
MERGE_RECORDS = """
INSERT INTO main.records (kind, key, value, crc)
SELECT :part || kind, key, value,
       iif(crc = crc_of(kind || key || value), crc_of(:part || kind || key || value), crc)
FROM other.records WHERE kind = :kind ORDER BY rowid
ON CONFLICT (kind, key) DO UPDATE SET value = excluded.value, crc = excluded.crc
"""
MERGED_COSTS = (
    "SELECT input_tokens_of(response), tokens - input_tokens_of(response), usd FROM other.calls "
    "WHERE attempts > 0"
)
TIME_IN = "time in "
"""Prefix of the key in meta for the seconds at work in a stage, over all processes."""
_COSTS = """
SELECT stage, count(*), total(tokens), total(input_tokens_of(response)), total(usd), count(usd)
FROM calls
WHERE attempts > 0 AND ? IN (stage, '') GROUP BY stage
"""
_FAILED = (
    "SELECT stage, sum(error != ?), sum(error = ?) FROM failures WHERE error != ? AND ? IN "
    "(stage, '') GROUP BY stage"
)
_KILLED = """
SELECT model, killed, max(tokens), max(usd), count(key) FROM
(SELECT model, count(*) AS killed FROM failures WHERE error = ? GROUP BY model)
LEFT JOIN calls USING (model) GROUP BY model
"""
# Of a process's own calls that are under way its guard knows.
_ATTEMPTS = """
SELECT coalesce(sum(attempts), 0) FROM
(SELECT model, attempts FROM calls UNION ALL SELECT model, attempts FROM failures WHERE error != ?)
WHERE model = ?
"""
NO_COST: dict[str, Any] = {"calls": 0, "tokens_in": 0, "tokens_out": 0, "usd": 0.0, "note": ""}
"""The cost of a stage without calls."""


def migrate(db: sqlite3.Connection, path: Path) -> None:
    """Bring a file to this version in one transaction: from nothing, or from an older version.

    Raises:
        StoreError: it was written by a newer version, or its version is none.
    """
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"{path} was written by a newer cowest_dspy (schema {version}): update, or start a "
            "new run."
        )
    if version < 0:
        raise damaged(path, f"schema {version} is none of ours")
    if version < SCHEMA_VERSION:
        steps = "".join(MIGRATIONS[number] for number in range(version + 1, SCHEMA_VERSION + 1))
        try:
            db.executescript(
                f"BEGIN IMMEDIATE; {steps} PRAGMA user_version={SCHEMA_VERSION}; COMMIT;"
            )
        except BaseException:
            db.rollback()
            raise


def add_functions(db: sqlite3.Connection) -> None:
    """Give a connection the functions that migrations speak of."""
    db.create_function("crc_of", 1, crc_of, deterministic=True)
    db.create_function(
        "tokens_of", 1, lambda response: sum(_tokens(json.loads(response))), deterministic=True
    )
    db.create_function(
        "input_tokens_of", 1, lambda response: _tokens(json.loads(response))[0], deterministic=True
    )
    db.create_function(
        "usd_of", 1, lambda response: json.loads(response).get("usd"), deterministic=True
    )


def _tokens(answer: dict[str, Any]) -> tuple[int, int]:
    return answer["input_tokens"], answer["output_tokens"]


def stage_sums(db: sqlite3.Connection, stage: str = "") -> dict[str, dict[str, Any]]:
    """Sum up the cost of each stage, or of one, by its name in the file; a stage that has
    none is left out.

    Answers that were taken over from another run cost nothing here.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, calls, tokens, tokens_in, usd, priced in db.execute(_COSTS, (stage,)):
        sums = {"calls": calls, "tokens_in": int(tokens_in), "tokens_out": int(tokens - tokens_in)}
        found[name] = {**NO_COST, **sums, "usd": usd if priced == calls else None}
    for name, failed, killed in db.execute(_FAILED, (KILLED, KILLED, UNDER_WAY, stage)):
        notes = (
            f"{failed} calls failed" if failed else "",
            f"{killed} under way at a kill" if killed else "",
        )
        found[name] = {**found.get(name, NO_COST), "note": ", ".join(filter(None, notes))}
    return found


def bill_of(db: sqlite3.Connection, strong: str | None, *, besides: str = "") -> Bill:
    """Sum up what the run has spent, with the attempts on the model of the id ``strong``, and
    without the seconds of the session ``besides``. A call that was under way at a kill cost at most
    what any other of its model did."""
    sums = "SELECT total(tokens), total(usd), count(*), count(usd) FROM calls WHERE attempts > 0"
    tokens, usd, calls, priced = db.execute(sums).fetchone()
    (attempts,) = db.execute(_ATTEMPTS, (UNDER_WAY, strong)).fetchone()
    before = "SELECT coalesce(sum(value), 0) FROM meta WHERE key LIKE 'seconds of %' AND key != ?"
    (seconds,) = db.execute(before, (besides,)).fetchone()
    unpriced: dict[str, int] = {}
    in_all = 0
    for model, killed, most_tokens, most_usd, others in db.execute(_KILLED, (KILLED,)):
        in_all += killed
        if others:
            tokens, usd = tokens + killed * most_tokens, usd + killed * (most_usd or 0.0)
        else:
            unpriced[model] = killed
    return Bill(
        attempts, int(tokens), usd if calls == priced else None, float(seconds), in_all, unpriced
    )


def crc_of(text: str) -> int:
    """A checksum of 32 bits: it finds what a disk has damaged, and is no secret's guard."""
    return zlib.crc32(text.encode("utf-8", "surrogatepass"))


def damaged(path: Path, how: object) -> StoreError:
    """The error of a file that is not what was written."""
    return StoreError(
        f"{path} is damaged ({how}). `cowest doctor --repair {path.parent}` saves what can be "
        "read of it; nothing was changed."
    )


def is_emptied(path: Path) -> bool:
    """Whether a store's file is empty although its run has worked: of a new one there is nothing in
    the folder but its lock."""
    if path.is_file() and path.stat().st_size:
        return False
    log = path.with_name(f"{path.name}-wal")
    # Without its file SQLite would delete a log, and the answers in it.
    if log.is_file() and log.stat().st_size:
        return True
    return path.is_file() and has_worked(path.parent)


def has_worked(folder: Path) -> bool:
    """Whether there is something in a run's folder that only a run has made."""
    return any((folder / name).exists() for name in OF_A_RUN)


def lock_folder(folder: Path) -> filelock.BaseFileLock:
    """The lock of a run's folder, held; it is given free with ``release()``, or at the end of
    ``with``.

    Raises:
        StoreError: another process holds it.
    """
    lock = filelock.FileLock(folder / "run.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise StoreError(
            f"{folder} is in use by another process. Wait for it, or give another folder with "
            "--run."
        ) from None
    return lock


@contextmanager
def sqlite_errors(path: Path) -> Iterator[None]:
    """Raise a StoreError that says what to do in the place of an error of SQLite."""
    try:
        yield
    except UNREADABLE as error:
        if getattr(error, "sqlite_errorcode", None) in _DAMAGE:
            raise damaged(path, error) from error
        raise StoreError(
            f"{path} could not be written ({error}): is the disk full, or the file not ours? What "
            "was not written is not used."
        ) from error
