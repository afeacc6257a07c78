"""The base of every table of a TOML: a frozen pydantic model that refuses keys it does not know."""

from __future__ import annotations

import os

from pydantic import BaseModel, ConfigDict

from cowest_dspy.utils.masking import remember_secret


class Table(BaseModel):
    """A table of a TOML: frozen, and closed to keys that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def name_of_a_variable(value: str | None) -> str | None:
    """The value of an ``api_key_env``; an error where it cannot be a variable's name. The key that
    it holds is masked from now on, also by commands that need no key and only show what a run has
    written."""
    if (value is not None and not value.replace("_", "").isalnum()) or (
        value and value.startswith(("sk-", "hf_"))
    ):
        raise ValueError(
            "give the NAME of an environment variable, for instance OPENAI_API_KEY, never a key "
            "itself"
        )
    remember_secret(os.environ.get(value or ""))
    return value
