"""Values as JSON or as text, and back by their type: what is kept of a prediction is read again as
what it was.

    plain(Verdict(label="yes"))                          # {"label": "yes"}
    restore({"label": "yes"}, Verdict)                   # Verdict(label="yes")
    as_text(Verdict(label="yes"))                        # '{"label": "yes"}'; a text, a number, yes
        and no as Python writes them
    from_text('{"label": "yes"}', Verdict)               # Verdict(label="yes")

The types are those of a program's outputs (``Collaboration.output_types``): what is kept names no
code to be run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any, cast

import dspy
from dspy.adapters.utils import parse_value
from pydantic import PydanticSchemaGenerationError, TypeAdapter
from pydantic_core import to_jsonable_python


def flatten(
    values: Mapping[str, Any], between: str = ".", prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """The values of nested mappings, each with the names on its path; an empty mapping is one.

    >>> list(flatten({"a": {"b": 1, "c": {}}, "d": None}))
    [('a.b', 1), ('a.c', {}), ('d', None)]
    """
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, between, f"{prefix}{name}{between}")
        else:
            yield f"{prefix}{name}", value


def plain(value: Any) -> Any:
    """The value in what JSON has: models and dataclasses as objects, enums as their values, times
    in ISO 8601; what JSON cannot say at all as its text."""
    return to_jsonable_python(value, round_trip=True, fallback=_unknown)


def _unknown(value: Any) -> Any:
    return value.toDict() if isinstance(value, dspy.Example) else str(value)


def restore(value: Any, annotation: Any) -> Any:
    """The inverse of :func:`plain` for a value of the type ``annotation``; what is of another type
    stays as it is."""
    return (
        value
        if value is None or annotation is str
        else _first(value, lambda made: plain(made) == value, _by_json(annotation))
    )


def restore_fields(
    values: Mapping[str, Any] | None, types: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Fields by name, each restored by its type; those without one stay as they are."""
    return (
        None
        if values is None
        else {name: restore(value, types.get(name, str)) for name, value in values.items()}
    )


def as_text(value: Any) -> str:
    """The value as people read it: a text, a number, True and False as they are, everything else as
    JSON."""
    if type(value) in (bool, int, float, type(None)):
        return str(value)
    made = plain(value)
    return made if isinstance(made, str) else json.dumps(made, ensure_ascii=False)


def from_text(text: str, annotation: Any) -> Any:
    """The inverse of :func:`as_text` for a value of the type ``annotation``; a text that is none of
    it stays a text."""
    if annotation is str:
        return text
    ways = (*_from_text(annotation), lambda given: parse_value(given, annotation))
    return _first(text, lambda made: as_text(made) == text, ways)


Ways = tuple[Callable[[Any], Any], ...]


def _first(given: Any, right: Callable[[Any], bool], ways: Ways) -> Any:
    for way in ways:
        try:
            made = way(given)
        except ValueError:
            continue
        if right(made):
            return made
    return given


def _by_json(annotation: Any) -> Ways:
    adapter = _adapter(annotation)
    # In the mode of JSON, in which a strict model, too, reads a time from its text.
    return () if adapter is None else (lambda value: adapter.validate_json(json.dumps(value)),)


def _from_text(annotation: Any) -> Ways:
    adapter = _adapter(annotation)
    return () if adapter is None else (adapter.validate_json, adapter.validate_python)


def _adapter(annotation: Any) -> TypeAdapter[Any] | None:
    try:
        return type_adapter(annotation)
    except TypeError:  # A type that cannot be hashed, such as an Annotated with a list in it.
        return TypeAdapter(annotation)
    except PydanticSchemaGenerationError:
        return None


@lru_cache(maxsize=256)
def type_adapter(annotation: Any) -> TypeAdapter[Any]:
    """The adapter of a type, made once: that takes milliseconds."""
    return TypeAdapter(cast("Any", annotation))
