"""Texts that are not shown unasked: the inputs that ``[report] hide`` names, on pages, in a
terminal and in notebooks.

[report]
hide = ["context"]        # a page says "(hidden: 74 characters)"

The run's data keep them: the store, report.json, pairs.jsonl, and what is bundled of these. Where
another text of the same example (a draft, an answer) repeats such an input word for word, it is
hidden there too; one that says it in its own words is shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cowest_dspy.errors import ConfigError
from cowest_dspy.utils.reading import read_toml


@dataclass(frozen=True)
class Hiding:
    """The names of inputs that a view does not show, and what they say in each example, as far as
    that is known."""

    names: tuple[str, ...]
    texts: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def note(self, example_id: str, inputs: Mapping[str, Any]) -> None:
        """Remember what the hidden inputs of an example say."""
        self.texts[example_id] = tuple(
            dict.fromkeys(str(inputs[name]) for name in self.names if name in inputs)
        )

    def redact(self, example_id: str, value: Any) -> Any:
        """A text of the example, or JSON values of it, without what is hidden."""
        return without(value, self.texts.get(example_id, ()))


def hidden_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The inputs that a configuration, as a dictionary, hides; none where it does not say."""
    table = config.get("report")
    return tuple(table.get("hide") or ()) if isinstance(table, Mapping) else ()


def names_hidden_in(run: Path) -> tuple[str, ...]:
    """The inputs that the configuration in a run's folder hides; none where there is no such
    file."""
    try:
        return hidden_names(read_toml(run / "config.toml", ConfigError))
    except ConfigError:
        return ()


def mark(value: Any) -> str:
    """``mark("Hello.")`` is ``"(hidden: 6 characters)"``."""
    return f"(hidden: {len(str(value)):,} characters)"


def hide_inputs(inputs: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The inputs with a mark in the place of those of these names."""
    hide = set(names)
    return {name: mark(value) if name in hide else value for name, value in inputs.items()}


def without(value: Any, texts: Iterable[str]) -> Any:
    """JSON values with a mark in the place of each of the texts; one that is a single word is left,
    it may well be an answer."""
    if isinstance(value, dict):
        return {key: without(item, texts) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(without(item, texts) for item in value)
    if isinstance(value, str):
        for text in sorted(
            (text for text in texts if len(text.split()) > 1), key=len, reverse=True
        ):
            value = value.replace(text.strip(), mark(text))
    return value
