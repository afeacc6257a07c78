"""API keys: named in files, held by environment variables."""

from __future__ import annotations

import os

from cowest_dspy.errors import ConfigError
from cowest_dspy.utils.masking import remember_secret


def key_in(variable: str) -> str:
    """The API key that an environment variable holds; from now on it is masked wherever secrets
    are.

    Raises:
        ConfigError: it is not set.
    """
    key = os.environ.get(variable)
    if not key:
        raise ConfigError(
            f"The environment variable {variable} is not set: export it, it holds the API key."
        )
    remember_secret(key)
    return key
