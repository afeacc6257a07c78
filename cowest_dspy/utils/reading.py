"""Text, JSON and TOML of files that anybody may have written: read, or one error that says which
file, where, and what is wrong.

    read_json(Path("runs/a/report.json"), ReportError, 'Write it again with "cowest report RUN".')
    parse_json("[" * 100_000)      # ValueError: recursion limit exceeded at line 1 column 202

What Python raises for a file (OSError, bytes that are no UTF-8, a syntax error, nesting that
exhausts the stack, numbers that are too large) never leaves these functions as it is.
"""

from __future__ import annotations

import errno
import json
import os
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from cowest_dspy.errors import CowestError, DataError

DEPTH = 100
"""Lists and tables of a TOML inside one another, at most."""
SHOWN = 200
"""Characters of a path that a message shows, at most."""
_FULL = "The disk is full, or a quota is reached: free some space and run the same command again."
_CURES = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: (
        "The file is larger than this system, or a limit of the process (ulimit -f), allows."
    ),
    errno.EACCES: "Change its mode or its owner, or name another place.",
    errno.EPERM: "Change its mode or its owner, or name another place.",
    errno.EROFS: "Name a place that can be written.",
    errno.ENOTDIR: (
        "A part of this path is a file, and a folder is needed there: name another place."
    ),
    errno.EEXIST: "A file is there, and a folder is needed: name another place.",
    errno.EISDIR: "A folder is there, and a file is needed.",
    errno.ENAMETOOLONG: "Name a shorter path.",
    errno.EMFILE: "Raise the limit of open files (ulimit -n).",
}
DISK_FAULTS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE})
"""Numbers of the system errors that are of a disk or of files also where they name none."""


def describe_os_error(error: OSError, path: str | os.PathLike[str] | None = None) -> str:
    """Describe what the system refused, of which file, and what to do: ``"runs/a: No space left on
    device. The disk is full ..."``.

    ``path`` is named where the error itself names no file.
    """
    named = error.filename if error.filename is not None else path
    where = f"{shorten(named)}: " if named is not None else ""
    cure = _CURES.get(error.errno or 0, "")
    return f"{where}{error.strerror or error}.{' ' if cure else ''}{cure}"


def shorten(path: object) -> str:
    """A path, or another text, for a message: its beginning and its end where it is long."""
    text = os.fsdecode(path) if isinstance(path, bytes) else str(path)
    half = SHOWN // 2
    return (
        text if len(text) <= SHOWN else f"{text[:half]}...{text[-half:]} ({len(text):,} characters)"
    )


@contextmanager
def file_errors(error: type[CowestError], path: str | os.PathLike[str]) -> Iterator[None]:
    """A context in which an OSError, or text of a file that is not UTF-8, becomes ``error``, with
    the file and what to do."""
    try:
        yield
    except OSError as fault:
        raise error(describe_os_error(fault, path)) from fault
    except UnicodeDecodeError as fault:
        raise error(
            f"{shorten(path)} is not UTF-8 text: {fault.reason} at byte {fault.start}."
        ) from fault


def expand_user(path: str | os.PathLike[str]) -> Path:
    """``path`` with ``~`` expanded; ``~name`` of nobody who is known here stays as it is, and is
    found missing when it is read.

    Raises:
        OSError: there is a zero byte in it, which no path can have.
    """
    if "\0" in str(path):
        raise OSError(
            errno.EINVAL, "A path cannot hold a zero byte", str(path).replace("\0", "\\0")
        )
    return Path(os.path.expanduser(path))


def read_text(path: Path, error: type[CowestError] = DataError) -> str:
    """The text of a UTF-8 file.

    Raises:
        error: it cannot be read, or is not UTF-8.
    """
    with file_errors(error, path):
        return path.read_text(encoding="utf-8")


def read_json(path: Path, error: type[CowestError] = DataError, advice: str = "") -> Any:
    """The value in a JSON file; ``advice`` is put after what is wrong with it.

    Raises:
        error: it cannot be read, or is no JSON.
    """
    return read_json_text(read_text(path, error), shorten(path), error, advice)


def read_json_text(
    text: str | bytes, where: str, error: type[CowestError] = DataError, advice: str = ""
) -> Any:
    """The value that a JSON text stands for; ``where`` names it in the error, such as "rows.jsonl,
    line 3".

    Raises:
        error: it is none, as :func:`parse_json` has it.
    """
    try:
        return parse_json(text)
    except ValueError as fault:
        raise error(f"{where} is not JSON: {fault}.{' ' if advice else ''}{advice}") from fault


def parse_json(text: str | bytes) -> Any:
    """The value that a JSON text stands for; what is given here can be written as JSON again.

    Raises:
        ValueError: no UTF-8, no JSON (RFC 8259: no NaN), more than 200 levels, a number of
            thousands of digits or beyond the range of floats, half of a surrogate pair, or a key
            that stands twice in one object.
    """
    text = text.decode("utf-8") if isinstance(text, bytes) else text
    # pydantic's parser has limits of its own, where Python's ends in a RecursionError; Python's can
    # see a key twice.
    from_json(text, allow_inf_nan=False)
    return json.loads(text, object_pairs_hook=_each_key_once, parse_float=_finite)


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f'the key "{twice[:80]}" stands there twice')
    return values


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"the number {text[:40]} is beyond the range of floats")
    return value


def read_toml(path: Path, error: type[CowestError]) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        error: it cannot be read, or is no TOML, with line and column.
    """
    return read_toml_text(read_text(path, error), shorten(path), error)


def read_toml_text(text: str, where: str, error: type[CowestError]) -> dict[str, Any]:
    """The tables of a TOML text; ``where`` names it in the error.

    Raises:
        error: it is none, with line and column.
    """
    try:
        tables = tomllib.loads(text)
        if _too_deep(text, tables):
            raise RecursionError
    except RecursionError:
        problem = f"more than {DEPTH} lists or tables inside one another."
    except ValueError as fault:  # also of a number with thousands of digits
        problem = f"{fault}."
    else:
        return tables
    raise error(f"{where} is not TOML: {problem}")


def _too_deep(text: str, value: Any) -> bool:
    """Whether lists and tables are more than DEPTH deep. Without recursion, and without a walk
    where the text cannot be so deep."""
    if text.count("[") + text.count("{") + text.count(".") <= DEPTH:
        return False
    level: list[Any] = [value]
    for _ in range(DEPTH + 1):
        level = [
            item
            for one in level
            if isinstance(one, dict | list)
            for item in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return False
    return True
