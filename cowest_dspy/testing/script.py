"""A script: what a fake answers, and to what."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

Answer = TypeVar("Answer")
Script = Mapping[str, Answer] | Callable[[dict[str, Any]], Answer]
"""From a part of the last message to the answer; or a function of the request: "model", "messages",
"config"."""


class NotScripted(LookupError):
    """The script has no answer to a request, or more than one."""


def scripted(script: Script[Answer], asked: dict[str, Any]) -> Answer:
    """What the script answers to ``asked``, a request as ``{"model", "messages", "config"}``.

    Raises:
        NotScripted: no key, or more than one, is a part of the last message.
    """
    if not isinstance(script, Mapping):
        return script(asked)
    text = asked["messages"][-1]["content"]
    keys = [key for key in script if key in text]
    if len(keys) != 1:
        raise NotScripted(
            f"The script has {len(keys)} answers ({keys}) to: {text!r}. Exactly one is needed."
        )
    return script[keys[0]]
