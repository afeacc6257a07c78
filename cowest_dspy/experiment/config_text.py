"""A configuration as text for people and editors: its JSON schema, and the effective one as TOML
with secrets masked."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, cast

from pydantic import BaseModel

from cowest_dspy.errors import MASK, masked
from cowest_dspy.experiment.config import Config, validate
from cowest_dspy.tuning import DPO, KTO, SFT

# Free tables of Config, and what is validated as their content when a run begins.
TUNING: dict[str, type[BaseModel]] = {
    "dpo": DPO,
    "kto": KTO,
    "sft.settings": SFT,
    "sft.answer_settings": SFT,
}
INDENT = " " * 4


def json_schema() -> dict[str, Any]:
    """The JSON schema of every file that ``load_config`` reads: a task, a backend, or both in one.

    Nothing is required at the top, since files are layered; a table that stands in a file must be
    whole, since a later file replaces whole tables.
    """
    schema = Config.model_json_schema()
    definitions = cast("dict[str, Any]", schema["$defs"])
    for model in (DPO, KTO, SFT):
        made = model.model_json_schema()
        definitions.update(made.pop("$defs", {}))
        definitions[model.__name__] = made
    schema["properties"]["dpo"] = {"$ref": "#/$defs/DPO"}
    schema["properties"]["kto"] = {"$ref": "#/$defs/KTO"}
    for key in ("settings", "answer_settings"):
        definitions["Sft"]["properties"][key] = {"$ref": "#/$defs/SFT"}
    for name in ("sft", "judge"):
        schema["properties"][name]["anyOf"].append({"type": "object", "maxProperties": 0})
    del schema["required"]
    # Nothing newer than draft 7 is used, and older releases of Taplo know no newer one
    # (tamasfe/taplo issue 497).
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        **schema,
        "title": "a task or a backend of cowest_dspy",
    }


def effective_toml(config: Config) -> str:
    """``config`` as TOML with every default filled in; ``load_config`` makes an equal one of it
    unless a secret was masked.

    What [dpo], [kto] and the tables of [sft] do not say is added as comments, with the defaults of
    ``cowest_dspy.tuning``.

    Raises:
        ConfigError: settings of tuning that cannot be.
    """
    values = config.model_dump(mode="json", exclude_none=True)
    shown = _masked(values)
    lines = (
        []
        if shown == values
        else [f"# {MASK} stands where a secret was: this cannot be loaded as it is."]
    )
    return "\n".join([*lines, *_table("", shown, visible_settings(config))]) + "\n"


def visible_settings(config: Config) -> dict[str, Any]:
    """``config`` as JSON values with secrets masked, and with what [dpo], [kto] and the tables of
    [sft] leave to their defaults.

    Raises:
        ConfigError: settings of tuning that cannot be.
    """
    shown = _masked(config.model_dump(mode="json", exclude_none=True))
    for name, model in TUNING.items():
        *tables, key = name.split(".")
        place = shown
        for table in tables:
            place = place.get(table, {})
        if key in place:
            place[key] = {
                **validate(model, place[key], f"[{name}]").model_dump(
                    mode="json", exclude_none=True
                ),
                **place[key],
            }
    if "kto" in shown:
        shown.pop("dpo", None)
    return shown


def _table(name: str, values: dict[str, Any], whole: dict[str, Any]) -> list[str]:
    """The lines of a table: its plain values first, then what only ``whole`` has as comments, then
    the tables in it."""
    lines = ["", f"[{name}]"] if name else []
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    lines += [
        f"{_key(key)} = {_value(value)}" for key, value in values.items() if key not in tables
    ]
    lines += [
        f"# {_key(key)} = {_value(value)}  (default)"
        for key, value in whole.items()
        if key not in values
    ]
    for key, value in tables.items():
        lines += _table(f"{name}.{_key(key)}".lstrip("."), value, whole.get(key, value))
    return lines


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _value(key)


def _value(value: Any) -> str:
    """A value as TOML writes it. A string of JSON is one of TOML, except for DEL, which TOML wants
    escaped."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return _list([_value(item) for item in cast("list[Any]", value)])
    if isinstance(value, dict):
        pairs = cast("dict[str, Any]", value).items()
        return (
            "{ " + ", ".join(f"{_key(key)} = {_value(item)}" for key, item in pairs) + " }"
            if pairs
            else "{}"
        )
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _list(items: list[str]) -> str:
    """On one line when it is short."""
    line = f"[{', '.join(items)}]"
    return (
        line if len(line) < 100 else "[\n" + "".join(f"{INDENT}{item},\n" for item in items) + "]"
    )


# Of a command, what follows such an option.
_OPTION = re.compile(r"--?[\w-]*(?:key|token|secret|password)[\w-]*", re.IGNORECASE)


def _masked(value: Any) -> Any:
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, Mapping):
        return {key: _masked(item) for key, item in cast("Mapping[str, Any]", value).items()}
    if not isinstance(value, list):
        return value
    items = cast("list[Any]", value)
    return [
        _masked_argument(item, items[place - 1] if place else None)
        for place, item in enumerate(items)
    ]


def _masked_argument(item: Any, before: Any) -> Any:
    """An argument of a command, which may be the value of the option before it, or an option and
    its value in one."""
    if not isinstance(item, str):
        return _masked(item)
    if isinstance(before, str) and _OPTION.fullmatch(before) and not item.startswith("-"):
        return MASK
    option, equals, _ = item.partition("=")
    return f"{option}={MASK}" if equals and _OPTION.fullmatch(option) else _masked(item)
