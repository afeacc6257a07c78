"""[serve]: how a collaboration is served as one model behind an HTTP endpoint; the tables of
serving/."""

from __future__ import annotations

import ipaddress
from typing import Literal

from pydantic import Field, field_validator

from cowest_dspy.utils.table import Table, name_of_a_variable

KEY_VARIABLE = "COWEST_API_KEY"


class ServeLimits(Table):
    """[serve.limits]: what one server takes on; what is more is refused with an error that says
    so."""

    body: int = Field(
        1_000_000, ge=1_000, description="bytes of a request's body; a longer one is refused (413)"
    )
    concurrency: int = Field(
        8, ge=1, le=512, description="requests that models are asked for at once, at most"
    )
    queue: int = Field(
        256,
        ge=0,
        description="requests that wait for their turn; one more is refused (429, with "
        "Retry-After)",
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


class BreakerRules(Table):
    """[serve.breaker]: when a model that fails is left alone for a while, and how it comes back."""

    failures: int = Field(
        5, ge=1, description="failures in a row after which it is not asked any more"
    )
    seconds: float = Field(
        30.0, gt=0, description="until it is tried again, by one request; if that succeeds, by all"
    )


class SampleRules(Table):
    """[serve.sample]: live traces, kept for the next round. They hold what was asked: nothing is
    kept by default."""

    share: float = Field(
        0.0, ge=0, le=1, description="of the answered requests whose traces are kept"
    )
    run: str = Field(
        "runs/live", description="the run's folder that they go to, from where the command is typed"
    )


class ServeRules(Table):
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
    breaker: BreakerRules = BreakerRules()  # pyright: ignore[reportCallIssue]
    sample: SampleRules = SampleRules()  # pyright: ignore[reportCallIssue]

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
