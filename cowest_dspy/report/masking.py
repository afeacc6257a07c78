"""Nothing secret is written: what looks like a key, a token or a password is masked on its way into
a report."""

from __future__ import annotations

import re
from typing import Any

from cowest_dspy.errors import MASK, masked

_SECRET_NAME = re.compile(
    r"(^|[_-])(api[_-]?key|apikey|secret|password|passwd|credentials?|authorization|access[_-]?key|"
    r"(access|auth|api|hf|bearer|session|refresh)[_-]?token)$|^token$",
    re.IGNORECASE,
)


def mask_text(value: Any) -> Any:
    """A copy of JSON values with every text that looks like a secret masked; not example ids, which
    must stay apart.

    >>> mask_text({"error": "401 for Bearer abcdefgh1234"})
    {'error': '401 for Bearer ***'}
    """
    if isinstance(value, dict):
        return {
            key: item if key == "example_id" else mask_text(item) for key, item in value.items()
        }
    if isinstance(value, list):
        return [mask_text(item) for item in value]
    return masked(value) if isinstance(value, str) else value


def mask_settings(value: Any) -> Any:
    """A copy of settings with the texts under names such as ``api_key`` masked, whatever they look
    like.

    >>> mask_settings({"weak": {"api_key": "abc", "max_tokens": 9}})
    {'weak': {'api_key': '***', 'max_tokens': 9}}
    """
    if isinstance(value, dict):
        return {
            key: MASK
            if isinstance(item, str) and item and _SECRET_NAME.search(str(key))
            else mask_settings(item)
            for key, item in value.items()
        }
    return [mask_settings(item) for item in value] if isinstance(value, list) else value


def mask_document(facts: dict[str, Any]) -> dict[str, Any]:
    """A report or a comparison as JSON with its secrets masked: those in texts, and by their names
    those of its "config"."""
    made = mask_text(facts)
    return {**made, "config": mask_settings(made["config"])}
