"""Rows -> ``dspy.Example``: from a recipe's function, a JSONL file or the Hub; with ids, splits and a check for overlap."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import dspy

from cowest_dspy.errors import DataError, nearest
from cowest_dspy.files import write_whole
from cowest_dspy.reading import describe_os_error, expand_user, file_errors, read_json_text, read_text
from cowest_dspy.recipes import call
from cowest_dspy.tables import Data

SPLITS = ("train", "dev", "test")


def examples(rows: Iterable[Mapping[str, Any]], inputs: Sequence[str], *, where: str = "rows") -> list[dspy.Example]:
    """Rows as examples whose ``inputs`` are marked; a row without an ``id`` gets one from its content.

    ``examples([{"question": "2+2?", "answer": "4"}], ["question"])`` gives one example with a 12-digit ``id``.

    Raises:
        DataError: no rows, a row without one of the inputs or that is no row, or two rows with one id.
    """
    made = [_example(row, inputs, f"{where}, row {number}") for number, row in enumerate(rows, start=1)]
    if not made:
        raise DataError(f"{where}: there are no examples. At least one row with the fields {list(inputs)} is needed.")
    seen: set[str] = set()
    for example in made:
        if example.id in seen:
            raise DataError(f'{where}: two rows have the id "{example.id}". Ids must be unique: traces are kept by them.')
        seen.add(example.id)
    return made


def with_ids(given: Iterable[dspy.Example]) -> list[dspy.Example]:
    """Copies of examples, each with an ``id``: its own, or one from its content. The same example twice is one.

    Raises:
        DataError: no examples, one without marked inputs, or two different ones with one id.
    """
    made: dict[str, dspy.Example] = {}
    for one in given:
        if not one.inputs().toDict():
            raise DataError(f"An example has no inputs: mark them, with_inputs(...): {one}")
        row = one.toDict()
        copy = _example(row, tuple(one.inputs().keys()), "examples")
        if made.setdefault(copy.id, copy).toDict() != copy.toDict():
            raise DataError(f'Two different examples have the id "{copy.id}". Ids must be unique: traces are kept by them.')
    if not made:
        raise DataError("There are no examples.")
    return list(made.values())


def read_split(
    source: str, split: str, inputs: Sequence[str], *, seed: int = 0, limit: int | None = None, rows: str | None = None
) -> list[dspy.Example]:
    """The examples of one split: ``source`` is "file.py:function" (called with the split, ``seed=``, and ``rows=`` where that
    is given), "file.jsonl" with a ``split`` field in each row, or "hub:NAME" (optionally "hub:NAME:CONFIG").

    Raises:
        DataError: nothing in that split, no such file (also one that a recipe's function reads), or a line that is not JSON.
    """
    where = f"{Path(source.rpartition(':')[0] or source).name} ({split})"
    if source.startswith("hub:"):
        found = _from_hub(source, split)
    elif source.endswith(".jsonl"):
        found = [row for row in read_jsonl(Path(source)) if row.get("split", "train") == split]
    else:
        found = _from_function(source, split, where, {"seed": seed, "rows": rows})
    return examples(found[:limit], inputs, where=where)


def configured_split(source: Data, split: str) -> list[dspy.Example]:
    """The examples of one split as a configuration's [data] names and limits them. Raises DataError as :func:`read_split`."""
    return read_split(source.source, split, source.inputs, seed=source.seed, limit=getattr(source, split), rows=source.rows)


def read_rows(where: str | Path, split: str) -> list[dict[str, Any]]:
    """The rows of one split as they were published: ``where`` is a folder with ``<split>.jsonl``, or "hub:NAME[:CONFIG]".

    A recipe over a public dataset reads its rows with this, so that the same recipe works from a local copy and from the Hub.

    Raises:
        DataError: no such folder or file (with what the folder holds), a line that is not JSON, or a Hub dataset that cannot be
            had, for instance without a network.
    """
    if str(where).startswith("hub:"):
        return _from_hub(str(where), split)
    folder = expand_user(where)
    file = folder / f"{split}.jsonl"
    with file_errors(DataError, folder):
        if not folder.is_dir():
            raise DataError(f'There is no folder {folder}. Rows come from a folder with {file.name}, or from the Hub: "hub:NAME".')
        if not file.is_file():
            held = ", ".join(sorted(path.name for path in folder.glob("*.jsonl"))) or "no .jsonl file"
            raise DataError(f"There is no {file.name} in {folder}, which holds {held}.")
    return read_jsonl(file)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file; empty lines are skipped.

    Raises:
        DataError: no such file, no UTF-8, or a line that is not a JSON object (with its number).
    """
    with file_errors(DataError, path):
        if not path.is_file():
            raise DataError(f"There is no file {path}.")
    rows: list[dict[str, Any]] = []
    # Not splitlines(), which also breaks at signs that may stand inside a JSON text, such as U+2028.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        row = read_json_text(line, f"{path}, line {number}")
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: an object was expected, not {type(row).__name__}.")
        rows.append(row)
    return rows


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Writes rows as JSON Lines; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole({path: "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows)})
    return path


def inputs_key(inputs: Mapping[str, Any]) -> str:
    """Inputs as one text, equal for equal values but for case and spacing: what makes two examples the same one."""
    texts = (
        value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str) for _, value in sorted(inputs.items())
    )
    return " | ".join(" ".join(text.lower().split()) for text in texts)


def check_apart(splits: Mapping[str, Sequence[dspy.Example]], inputs: Sequence[str]) -> None:
    """Raises DataError when the same inputs, but for case and spacing, stand in two splits."""
    owner: dict[str, tuple[str, str]] = {}
    for split, made in splits.items():
        for example in made:
            key = inputs_key({name: example[name] for name in inputs})
            before = owner.setdefault(key, (split, example.id))
            if before[0] != split:
                raise DataError(
                    f"{before[0]} ({before[1]}) and {split} ({example.id}) hold the same inputs: what is tested must not be "
                    "trained on. Drop one of the two."
                )


def _example(given: Mapping[str, Any], inputs: Sequence[str], where: str) -> dspy.Example:
    if not isinstance(given, Mapping):
        raise DataError(f"{where}: a {type(given).__name__} is no row; a dictionary of its fields is expected.")
    row = dict(given)
    for name in row:
        if not isinstance(name, str):
            raise DataError(f"{where}: a field is called {name!r}, which is no text. A CSV row with more cells than its header?")
    for name in inputs:
        if row.get(name) in (None, ""):
            raise DataError(f'{where}: the input "{name}" is missing.{nearest(name, row)} The row has {sorted(row)}.')
    content = _content(row, where)
    if row.get("id") is None:
        row["id"] = hashlib.sha256(content).hexdigest()[:12]
    row["id"] = str(row["id"])
    return dspy.Example(**row).with_inputs(*inputs)


def _content(row: Mapping[str, Any], where: str) -> bytes:
    """A row as bytes, equal for equal rows: all of it can be put into a prompt, a store and a report."""
    try:
        return json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise DataError(f"{where} holds {half}, half of a surrogate pair, which is no character: decode its text anew.") from error
    except (RecursionError, ValueError, TypeError) as error:
        raise DataError(f"{where} holds what JSON cannot say: {error}.") from error


def _from_function(source: str, split: str, where: str, given: Mapping[str, Any]) -> list[Any]:
    """What a recipe's function gives. A file that it cannot read is named; any other error of it is its own."""
    try:
        found = call(source, split, given=given)
        if isinstance(found, Iterable):
            return list(cast("Iterable[Any]", found))
    except FileNotFoundError as error:
        raise DataError(f"{where}: [data] source {source} reads {error.filename}, and there is no such file.") from error
    except (OSError, UnicodeError, RecursionError, csv.Error, json.JSONDecodeError) as error:
        what = describe_os_error(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}."
        raise DataError(f"{where}: [data] source {source} reads a file that cannot be read. {what}") from error
    raise DataError(f"{where}: [data] source {source} gave a {type(found).__name__}; rows are expected, a list of dictionaries.")


def _from_hub(source: str, split: str) -> list[dict[str, Any]]:
    from datasets import load_dataset

    _, name, *config = source.split(":")
    try:
        return [dict(row) for row in load_dataset(name, *config, split=split)]
    except Exception as error:
        raise DataError(
            f'The Hub dataset "{name}" ({split}) cannot be had: {type(error).__name__}: {error}. Rows that are here are named in '
            'the TOML: [data] rows = "FOLDER", with a file for each split, such as train.jsonl.'
        ) from error
