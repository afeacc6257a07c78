"""API keys: named in files, held by environment variables."""

from __future__ import annotations

import os

from cowest_dspy.errors import MASK, ConfigError

# A server that needs no key is given a word such as "none", which would be masked wherever it is said.
SHORTEST_SECRET = 8


def key_in(variable: str) -> str:
    """The API key that an environment variable holds.

    Raises:
        ConfigError: it is not set.
    """
    key = os.environ.get(variable)
    if not key:
        raise ConfigError(f"The environment variable {variable} is not set: export it, it holds the API key.")
    return key


def hidden(text: str, key: str | None) -> str:
    """``text`` with a key that we hold masked, whatever its form: servers repeat keys in their errors."""
    return text.replace(key, MASK) if key and len(key) >= SHORTEST_SECRET else text
