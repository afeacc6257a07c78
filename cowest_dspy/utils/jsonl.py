"""JSON Lines: one object a line, read with the number of a line that is not one, written whole."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cowest_dspy.errors import DataError
from cowest_dspy.utils.files import write_whole
from cowest_dspy.utils.reading import file_errors, read_json_text, read_text


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file; empty lines are skipped.

    Raises:
        DataError: no such file, no UTF-8, or a line that is not a JSON object (with its number).
    """
    with file_errors(DataError, path):
        if not path.is_file():
            raise DataError(f"There is no file {path}.")
    rows: list[dict[str, Any]] = []
    # Not splitlines(), which also breaks at signs that may stand inside a JSON text, such as
    # U+2028.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        row = read_json_text(line, f"{path}, line {number}")
        if not isinstance(row, dict):
            raise DataError(
                f"{path}, line {number}: an object was expected, not {type(row).__name__}."
            )
        rows.append(row)
    return rows


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write rows as JSON Lines; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole({path: "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows)})
    return path
