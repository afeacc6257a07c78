"""[serve]: how a collaboration is served as one model behind an HTTP endpoint."""

from __future__ import annotations

import ipaddress
import os
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from cowest_dspy.errors import ConfigError
from cowest_dspy.utils.masking import SHORTEST_SECRET
from cowest_dspy.utils.table import TomlTable, name_of_a_variable

KEY_VARIABLE = "COWEST_API_KEY"
_REMOVED = {
    "breaker": "a proxy in front of the endpoint stops asking what fails",
    "sample": "log_text = true logs inputs and answers",
    "queue": "connections bounds what waits, and a proxy in front of the endpoint may bound it "
    "further",
}
"""Tables and keys that are no longer there, and what to use."""


class _ServeTable(TomlTable):
    @model_validator(mode="before")
    @classmethod
    def _refuse_removed(cls, values: Any) -> Any:
        for name in values if isinstance(values, dict) else ():
            if name in _REMOVED:
                raise ValueError(f'"{name}" was removed: {_REMOVED[name]}')
        return values


class ServeLimits(_ServeTable):
    """[serve.limits]: what one server takes on; what is more is refused with an error that says
    so."""

    body: int = Field(
        1_000_000, ge=1_000, description="bytes of a request's body; a longer one is refused (413)"
    )
    concurrency: int = Field(
        8,
        ge=1,
        le=512,
        description="requests that models are asked for at once; others wait for their turn",
    )
    connections: int = Field(
        512, ge=1, description="connections that are open at once; one more is refused (503)"
    )
    seconds: float = Field(
        120.0,
        gt=0,
        description="for a request, its wait included; then the answer is an error (504)",
    )
    grace: float = Field(
        30.0,
        ge=0,
        description="seconds that requests under way have when the server is asked to stop",
    )


class ServeRules(_ServeTable):
    """[serve]: the collaboration as one OpenAI-compatible model (``cowest serve``)."""

    host: str = Field(
        "127.0.0.1",
        min_length=1,
        description="the address; any but this machine's own needs an API key",
    )
    port: int = Field(8000, ge=0, le=65535, description="0: any that is free")
    name: str | None = Field(
        None, min_length=1, description="of the model, for clients; by default the task's name"
    )
    api_key_env: str = Field(
        KEY_VARIABLE,
        description="the NAME of the environment variable with the key that clients must give",
    )
    fields: tuple[str, ...] = Field(
        (), description="the answer's fields that clients are told; by default all"
    )
    on_weak_failure: Literal["strong", "error"] = Field(
        "strong", description="no draft: the strong model alone, or an error"
    )
    on_strong_failure: Literal["error", "draft"] = Field(
        "error", description="no refined answer: an error, or the draft, marked as such"
    )
    show_draft: Literal["asked", "always", "never"] = Field(
        "asked",
        description='the draft as reasoning_content: where a request says cowest = {"draft": '
        "true}, or as said here",
    )
    earlier: Literal["refuse", "ignore"] = Field(
        "refuse",
        description="system messages and earlier turns, which a tuned prompt has no place for: an "
        "error, or left aside",
    )
    parameters: Literal["ignore", "refuse"] = Field(
        "ignore",
        description="temperature and the like, which a tuned program has its own of: left aside "
        "and named, or an error",
    )
    log_text: bool = Field(
        False, description="log inputs and answers, too; otherwise no text of a request is logged"
    )
    limits: ServeLimits = ServeLimits()  # pyright: ignore[reportCallIssue]

    @field_validator("api_key_env")
    @classmethod
    def _is_a_name(cls, value: str) -> str:
        return name_of_a_variable(value) or KEY_VARIABLE


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine only."""
    if host.casefold() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def api_key(rules: ServeRules) -> str | None:
    """Read the API key that clients must give from the variable of [serve] api_key_env; None where
    it is not set.

    Raises:
        ConfigError: there is none, and other machines may reach the address, or the TOML names a
            variable; or it is too short.
    """
    variable, key = rules.api_key_env, os.environ.get(rules.api_key_env, "")
    if not key and not is_loopback(rules.host):
        raise ConfigError(
            f"{rules.host} may be reached from other machines, and needs an API key: export "
            f"{variable}, which holds it. "
            f'`export {variable}="$(openssl rand -hex 24)"` makes one.'
        )
    if not key and variable != KEY_VARIABLE:
        raise ConfigError(
            f"The environment variable {variable} is not set ([serve] api_key_env): export it, it "
            "holds the API key."
        )
    if key and (
        len(key) < SHORTEST_SECRET or not key.isascii() or not key.isprintable() or " " in key
    ):
        raise ConfigError(
            f"The key in {variable} must have {SHORTEST_SECRET} or more printable ASCII "
            "characters, and no space."
        )
    return key or None
