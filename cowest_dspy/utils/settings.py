"""Settings as a Python caller gives them: an object, or a dictionary of its fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from pydantic import ValidationError

from cowest_dspy.errors import ConfigError, masked, nearest
from cowest_dspy.utils.jsonable import type_adapter

Settings = TypeVar("Settings")


def read_settings(
    given: Settings | Mapping[str, Any] | None, kind: type[Settings], argument: str
) -> Settings:
    """Settings of the type ``kind``: the object that is given, or one with the fields of a
    dictionary, which are checked; the defaults where None is given.

    Args:
        given: what a caller gave.
        kind: a pydantic model, or a dataclass whose ``__pydantic_config__`` forbids other fields.
        argument: the name of the caller's argument, for the message.

    Raises:
        ConfigError: it is neither, or a field is unknown or cannot have its value; it names the
            argument and the field.
    """
    if isinstance(given, kind):
        return given
    if given is not None and not isinstance(given, Mapping):
        raise ConfigError(
            f"{argument} is a {type(given).__name__}; expected {kind.__name__}(...) or a dict of "
            "its fields."
        )
    values: dict[str, Any] = dict(given or {})
    try:
        return type_adapter(kind).validate_python(values)
    except ValidationError as error:
        faults = [_describe(one, kind) for one in error.errors(include_url=False)]
        raise ConfigError(f"{argument}, fields of {kind.__name__}: {'; '.join(faults)}") from None


def _describe(fault: Any, kind: type[Any]) -> str:
    name, said = ".".join(map(str, fault["loc"])), fault["msg"].removeprefix("Value error, ")
    if fault["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = list(getattr(kind, "model_fields", None) or (one.name for one in fields(kind)))
        return f'there is no "{name}".{nearest(name, known)} There is {", ".join(known)}'
    whole = not name or fault["type"] == "unknown_keys"
    shown = "" if whole else f" (given: {masked(repr(fault['input']))})"
    return f"{name}{': ' if name else ''}{said}{shown}"
