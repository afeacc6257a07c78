"""OpenAI's chat protocol as a strict fake reads and writes it: requests that are checked, bodies of
answers and errors.

Tokens are declared, so that tests can count on them: a token is a word with the white space before
it.

    pieces("It is 4.") == ["It", " is", " 4."]
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cowest_dspy.errors import describe_faults

STRICT = ConfigDict(extra="forbid", strict=True)
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ProtocolError(Exception):
    """A request that the protocol does not allow: an HTTP status and OpenAI's error object."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.body = status, error_body(status, message, code)


class StrictPart(BaseModel):
    """A piece of a message's content; only text is known here."""

    model_config = STRICT
    type: Literal["text"]
    text: str


class StrictMessage(BaseModel):
    """One message of the conversation."""

    model_config = STRICT
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[StrictPart]

    @property
    def text(self) -> str:
        """The content as one text."""
        return (
            self.content
            if isinstance(self.content, str)
            else "".join(part.text for part in self.content)
        )


class StrictStreamOptions(BaseModel):
    """Options of a streamed answer."""

    model_config = STRICT
    include_usage: bool = False


class StrictRequest(BaseModel):
    """The body of POST /v1/chat/completions: these fields and no others."""

    model_config = STRICT
    model: str
    messages: list[StrictMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1, le=128)
    stop: str | list[str] | None = None
    seed: int | None = None
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    stream: bool | None = None
    stream_options: StrictStreamOptions | None = None
    response_format: dict[str, Any] | None = None

    def to_script(self) -> dict[str, Any]:
        """The request as a script's function gets it: ``model``, ``messages``, ``config``."""
        config = self.model_dump(
            exclude={"model", "messages", "stream", "stream_options"}, exclude_none=True
        )
        limit = config.pop("max_completion_tokens", None)
        if limit is not None:
            config["max_tokens"] = limit
        messages = [{"role": message.role, "content": message.text} for message in self.messages]
        return {"model": self.model, "messages": messages, "config": config}


@dataclass(frozen=True)
class Choice:
    """One answer: its tokens and why it ended."""

    tokens: tuple[str, ...]
    finish_reason: Literal["stop", "length"]

    @property
    def text(self) -> str:
        """The tokens as one text."""
        return "".join(self.tokens)


def read_request(data: bytes) -> StrictRequest:
    """The request in a body.

    Raises:
        ProtocolError: no JSON, an unknown field, a value of the wrong type or out of range.
    """
    try:
        value = json.loads(data)
    except (
        ValueError,
        RecursionError,
    ) as error:  # Also of a number too long, of no UTF-8, and of too many brackets.
        raise ProtocolError(400, f"The body is not JSON: {error}.") from None
    try:
        return StrictRequest.model_validate(value)
    except ValidationError as error:
        raise ProtocolError(
            400, f"The request is malformed: {describe_faults(error, 'body', most=None)}."
        ) from None


def pieces(text: str) -> list[str]:
    """The tokens of a text: words, each with the white space before it; joined they are the text
    again."""
    return re.findall(r"\s*\S+|\s+$", text)


def choice_of(text: str, request: StrictRequest) -> Choice:
    """The answer ``text`` as this request allows it: up to a stop text, and no longer than its
    limit of tokens."""
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    for stop in stops:
        text = text.partition(stop)[0]
    tokens = pieces(text)
    limit = request.max_completion_tokens or request.max_tokens
    cut = limit is not None and len(tokens) > limit
    return Choice(tuple(tokens[:limit] if cut else tokens), "length" if cut else "stop")


def usage_of(request: StrictRequest, choices: Sequence[Choice]) -> dict[str, int]:
    """Tokens of the prompt (once) and of all choices."""
    prompt = sum(len(pieces(message.text)) for message in request.messages)
    written = sum(len(choice.tokens) for choice in choices)
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def whole_body(request: StrictRequest, choices: Sequence[Choice]) -> dict[str, Any]:
    """The answer as one JSON object."""
    made = [
        {
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "finish_reason": choice.finish_reason,
            "logprobs": _logprobs(choice.tokens, request),
        }
        for index, choice in enumerate(choices)
    ]
    return {
        **_head(request, "chat.completion"),
        "choices": made,
        "usage": usage_of(request, choices),
    }


def stream_events(request: StrictRequest, choices: Sequence[Choice]) -> Iterator[bytes]:
    """The answer as server-sent events: a token each, then why it ended, then the usage where it
    was asked for, then [DONE]."""
    head = _head(request, "chat.completion.chunk")

    def event(choices: list[dict[str, Any]], **more: Any) -> bytes:
        return f"data: {json.dumps({**head, 'choices': choices, **more})}\n\n".encode()

    for index, choice in enumerate(choices):
        yield event(
            [{"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]
        )
        for token in choice.tokens:
            logprobs = _logprobs((token,), request)
            yield event(
                [
                    {
                        "index": index,
                        "delta": {"content": token},
                        "finish_reason": None,
                        "logprobs": logprobs,
                    }
                ]
            )
        yield event([{"index": index, "delta": {}, "finish_reason": choice.finish_reason}])
    if request.stream_options and request.stream_options.include_usage:
        yield event([], usage=usage_of(request, choices))
    yield b"data: [DONE]\n\n"


def error_body(status: int, message: str, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def token_logprob(token: str) -> float:
    """The declared log-probability of a token: -0.1 for each of its characters. The n-th other
    token has n less."""
    return -len(token) / 10


def _logprobs(tokens: Sequence[str], request: StrictRequest) -> dict[str, Any] | None:
    if not request.logprobs:
        return None
    content: list[dict[str, Any]] = []
    for token in tokens:
        others = [
            _scored(token + "~" * place, token_logprob(token) - place)
            for place in range(request.top_logprobs or 0)
        ]
        content.append({**_scored(token, token_logprob(token)), "top_logprobs": others})
    return {"content": content, "refusal": None}


def _scored(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}


def _head(request: StrictRequest, kind: str) -> dict[str, Any]:
    return {"id": "chatcmpl-scripted", "object": kind, "created": 1, "model": request.model}
