"""JSON documents that somebody else may have written: manifests, reports, states of runs, settings of adapters.

parse_json('{"seed": 7}')      # {"seed": 7}
parse_json("[" * 100_000)      # ValueError: recursion limit exceeded at line 1 column 202
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic_core import from_json


def parse_json(text: str | bytes) -> Any:
    """The values of a JSON document; what is given here can be written as JSON again.

    Raises:
        ValueError: no UTF-8, no JSON (RFC 8259: no NaN), more than 200 levels, a number of thousands of digits or beyond the range
            of floats, half of a surrogate pair, or a key that stands twice in one object.
    """
    text = text.decode("utf-8") if isinstance(text, bytes) else text
    # pydantic's parser has limits of its own, where Python's ends in a RecursionError; Python's can see a key twice.
    from_json(text, allow_inf_nan=False)
    return json.loads(text, object_pairs_hook=_each_key_once, parse_float=_finite)


def read_json(path: Path) -> Any:
    """The values of a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: as :func:`parse_json`.
    """
    return parse_json(path.read_bytes())


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
