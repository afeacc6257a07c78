"""Rows and ``dspy.Example``: marked inputs, and ids that come from content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import dspy

from cowest_dspy.errors import DataError, nearest


def examples(
    rows: Iterable[Mapping[str, Any]], inputs: Sequence[str], *, where: str = "rows"
) -> list[dspy.Example]:
    """Rows as examples whose ``inputs`` are marked; a row without an ``id`` gets one from its
    content.

    ``examples([{"question": "2+2?", "answer": "4"}], ["question"])`` gives one example with a
    12-digit ``id``.

    Raises:
        DataError: no rows, a row without one of the inputs or that is no row, or two rows with one
            id.
    """
    made = [
        _example(row, inputs, f"{where}, row {number}") for number, row in enumerate(rows, start=1)
    ]
    if not made:
        raise DataError(
            f"{where}: there are no examples. At least one row with the fields {list(inputs)} is "
            "needed."
        )
    seen: set[str] = set()
    for example in made:
        if example.id in seen:
            raise DataError(
                f'{where}: two rows have the id "{example.id}". Ids must be unique: traces are '
                "kept by them."
            )
        seen.add(example.id)
    return made


def with_ids(given: Iterable[dspy.Example]) -> list[dspy.Example]:
    """Copies of examples, each with an ``id``: its own, or one from its content. The same example
    twice is one.

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
            raise DataError(
                f'Two different examples have the id "{copy.id}". Ids must be unique: traces are '
                "kept by them."
            )
    if not made:
        raise DataError("There are no examples.")
    return list(made.values())


def inputs_key(inputs: Mapping[str, Any]) -> str:
    """Inputs as one text, equal for equal values but for case and spacing: what makes two examples
    the same one."""
    texts = (
        value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
        for _, value in sorted(inputs.items())
    )
    return " | ".join(" ".join(text.lower().split()) for text in texts)


def _example(given: Mapping[str, Any], inputs: Sequence[str], where: str) -> dspy.Example:
    if not isinstance(given, Mapping):
        raise DataError(
            f"{where}: a {type(given).__name__} is no row; a dictionary of its fields is expected."
        )
    row = dict(given)
    for name in row:
        if not isinstance(name, str):
            raise DataError(
                f"{where}: a field is called {name!r}, which is no text. A CSV row with more "
                "cells than its header?"
            )
    for name in inputs:
        if row.get(name) in (None, ""):
            raise DataError(
                f'{where}: the input "{name}" is missing.{nearest(name, row)} The row has '
                f"{sorted(row)}."
            )
    content = _content(row, where)
    if row.get("id") is None:
        row["id"] = hashlib.sha256(content).hexdigest()[:12]
    row["id"] = str(row["id"])
    return dspy.Example(**row).with_inputs(*inputs)


def _content(row: Mapping[str, Any], where: str) -> bytes:
    """A row as bytes, equal for equal rows: all of it can be put into a prompt, a store and a
    report."""
    try:
        return json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise DataError(
            f"{where} holds {half}, half of a surrogate pair, which is no character: decode its "
            "text anew."
        ) from error
    except (RecursionError, ValueError, TypeError) as error:
        raise DataError(f"{where} holds what JSON cannot say: {error}.") from error
