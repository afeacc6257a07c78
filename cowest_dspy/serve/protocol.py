"""OpenAI's chat protocol as far as it is served here, as pydantic models: what OpenAPI describes is
what is checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Failing = Literal["weak", "strong"]
"""One of both models."""
Role = Literal["system", "developer", "user", "assistant", "tool", "function"]


class Part(BaseModel):
    """A part of a message; only text is understood."""

    model_config = ConfigDict(extra="allow", strict=True)
    type: str = Field(description='"text"; anything else is refused')
    text: str | None = None


class Message(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(extra="allow", strict=True)
    role: Role
    content: str | list[Part] | None = None


class StreamOptions(BaseModel):
    """What a stream says besides the answer."""

    model_config = ConfigDict(strict=True)
    include_usage: bool = Field(False, description="a last chunk with the tokens of both models")
    include_obfuscation: bool | None = None


class ResponseFormat(BaseModel):
    """The form of the answer: text; or the answer's fields as one JSON object."""

    model_config = ConfigDict(strict=True)
    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = Field(
        None, description="its properties must be fields of the answer"
    )


class Wishes(BaseModel):
    """What a request may ask of this server alone."""

    model_config = ConfigDict(extra="forbid", strict=True)
    draft: bool = Field(False, description="give the weak model's draft as reasoning_content")


class ChatRequest(BaseModel):
    """A chat completion that is asked for. The last message is the program's input; the program's
    sampling settings are its own."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str = Field(description="the name that /v1/models lists")
    messages: list[Message] = Field(
        min_length=1, description="the last one is the user's: the program's input"
    )
    stream: bool | None = Field(None, description="answer as server-sent events")
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    cowest: Wishes | None = None
    # Left aside and named in the answer, or refused, as [serve] parameters says: a tuned program
    # has its own.
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    prediction: dict[str, Any] | None = None
    # Of the caller's own accounts: they change no answer.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    # Not served: anything but "no" is refused.
    n: int | None = Field(None, description="1")
    logprobs: bool | None = Field(None, description="false")
    top_logprobs: int | None = Field(None, description="0")
    modalities: list[str] | None = Field(None, description='["text"]')
    tools: list[Any] | None = Field(None, description="none")
    tool_choice: str | dict[str, Any] | None = Field(None, description='"none" or "auto"')
    parallel_tool_calls: bool | None = None
    functions: list[Any] | None = Field(None, description="none")
    function_call: str | dict[str, Any] | None = Field(None, description='"none" or "auto"')
    audio: dict[str, Any] | None = Field(None, description="not served")
    web_search_options: dict[str, Any] | None = Field(None, description="not served")


PARAMETERS = (
    "temperature", "top_p", "max_tokens", "max_completion_tokens", "stop", "seed", "presence_penalty", "frequency_penalty",
    "logit_bias", "reasoning_effort", "verbosity", "prediction",
)  # fmt: skip
"""What a tuned program has its own of."""


class Usage(BaseModel):
    """Tokens of both models together; the provider's own count, 0 where it says none."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Told(BaseModel):
    """How an answer came about.

    ``route`` is who answered: both ("collaborate"), "weak" or "strong". ``fallback`` is set where a
    model failed: "strong alone", or "draft" (the answer is the weak model's draft). ``failed`` says
    which model failed and how; ``ignored`` what of the request was left aside.
    """

    route: Literal["weak", "strong", "collaborate"]
    fallback: Literal["strong alone", "draft"] | None = None
    failed: Mapping[Failing, str] = {}
    models: Mapping[Failing, str] = {}
    tokens: Mapping[str, int] = {}
    ignored: list[str] = []


class Said(BaseModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None
    reasoning_content: str | None = Field(
        None, description="the weak model's draft, where it was asked for"
    )


class Choice(BaseModel):
    """The only one."""

    index: Literal[0] = 0
    message: Said
    finish_reason: Literal["stop"] = "stop"
    logprobs: None = None


class ChatCompletion(BaseModel):
    """The whole answer to a request."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    cowest: Told


class ErrorFacts(BaseModel):
    """What went wrong, in OpenAI's form."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every answer that is none."""

    error: ErrorFacts


class Model(BaseModel):
    """The collaboration, as clients name it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "cowest_dspy"


class ModelList(BaseModel):
    """All models of this server: one."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """Whether requests are taken, and whether each model is asked (its breaker: closed, open, on
    trial)."""

    status: Literal["ok", "stopping"]
    weak: str
    strong: str
