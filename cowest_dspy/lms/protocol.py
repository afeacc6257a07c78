"""The OpenAI protocol for chats: a request -> the body of a POST, the server's answer -> a
Response, a failure -> an error of DSPy.

What comes from a server is not trusted: an answer that is cut short, garbled or of another shape is
a ServerError, which DSPy tries again, and never an error of Python's own.
"""

from __future__ import annotations

import builtins
import email.utils
import json
import math
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import httpx
from dspy.lm15 import (
    AuthError,
    BillingError,
    ContextLengthError,
    InvalidRequestError,
    LM15Error,
    ProviderError,
    RateLimitError,
    Request,
    Response,
    ServerError,
    TimeoutError,
    TokenLogprob,
    TransportError,
)

from cowest_dspy.errors import masked
from cowest_dspy.store import serialize
from cowest_dspy.utils.masking import without_secret

SUPPORTED = ("max_tokens", "temperature", "top_p", "top_k", "stop", "seed", "logprobs")
# How servers say that a prompt is too long: OpenAI and vLLM, llama.cpp, and others in words of
# their own.
_TOO_LONG = (
    "context_length_exceeded",
    "exceed_context_size",
    "maximum context length",
    "context length",
    "context size",
)
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)
"""What reading an answer of another shape ends in: a list in the place of an object, 1e999 tokens,
lists 50,000 deep."""
_OF_STATUS: dict[int, type[ProviderError]] = {
    401: AuthError,
    403: AuthError,
    402: BillingError,
    408: TimeoutError,
    504: TimeoutError,
    429: RateLimitError,
}


def body_of(request: Request, whose: str) -> dict[str, Any]:
    """The body that asks for one answer, less the model's name: messages and sampling settings.

    Raises:
        dspy.lm15.InvalidRequestError: a setting that is not supported, or a part that is not text;
            ``whose`` names the engine.
    """
    described = serialize.request_to_dict(request)
    config: dict[str, Any] = described["config"]
    unknown = [name for name in config if name not in SUPPORTED]
    if unknown:
        raise InvalidRequestError(f"{whose}: this engine does not know settings {unknown}.")
    body: dict[str, Any] = {"messages": described["messages"], "stream": False}
    body |= {name: value for name, value in config.items() if name != "logprobs"}
    if "stop" in body:
        body["stop"] = list(body["stop"])
    if "logprobs" in config:
        body["logprobs"] = True
        # 0 means the chosen token only. Servers differ on what they make of a 0 here, so it is not
        # sent.
        body |= {"top_logprobs": config["logprobs"]} if config["logprobs"] else {}
    return body


def response_of(request: Request, answer: httpx.Response) -> Response:
    """The server's answer to ``request``.

    Raises:
        dspy.lm15.LM15Error: the answer is a failure, or is none at all.
    """
    if not answer.is_success:
        raise failure_of(answer)
    try:
        said = answer.json()
        choice, usage = said["choices"][0], said.get("usage") or {}
        text = choice["message"].get("content") or ""
        reason = "content_filter" if choice["message"].get("refusal") else choice["finish_reason"]
        wanted = request.config.logprobs
        logprobs = None if wanted is None else _logprobs(choice, text, wanted)
        return serialize.make_response(
            request.model,
            text,
            reason if reason in ("stop", "length", "content_filter") else "stop",
            int(usage.get("prompt_tokens") or 0),
            int(usage.get("completion_tokens") or 0),
            logprobs,
        )
    except UNREADABLE as error:
        raise ServerError(
            f"The server answered, but with no chat completion ({type(error).__name__}: {error}): "
            f"{_short(answer.text, answer)}",
            status=answer.status_code,
        ) from error


def failure_of(answer: httpx.Response) -> LM15Error:
    """A status of failure as an error; those that pass (429, 408, 5xx) are of a kind that DSPy
    tries again."""
    said, code = _said(answer)
    status = answer.status_code
    details: dict[str, Any] = {"status": status, "retry_after": retry_after(answer.headers)}
    known = f"{code} {said}".lower()
    if status in (400, 413, 422) and any(words in known for words in _TOO_LONG):
        return ContextLengthError(said, **details)
    if status == 429 and "insufficient_quota" in known:
        return BillingError(said, **details)
    kind = _OF_STATUS.get(status) or (
        InvalidRequestError
        if 400 <= status < 500
        else ServerError
        if status >= 500
        else ProviderError
    )
    return kind(said, **details)


def transport_failure(
    error: httpx.HTTPError | builtins.TimeoutError, seconds: float, whose: str
) -> LM15Error:
    """A call that got no answer at all, as an error that DSPy tries again."""
    if isinstance(error, httpx.TimeoutException | builtins.TimeoutError):
        return TimeoutError(f"{whose}: no answer within {seconds:g} seconds (timeout).")
    return TransportError(
        f"{whose}: {type(error).__name__}: {masked(str(error)) or 'the connection broke'}"
    )


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds after which a server wants to be asked again; it may give seconds or a date."""
    given = headers.get("retry-after")
    if given is None:
        return None
    try:
        seconds = float(given)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(given).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None


def _said(answer: httpx.Response) -> tuple[str, str]:
    """What a failure says, and its code or type: OpenAI nests both under "error", vLLM's older
    versions do not."""
    try:
        body = json.loads(answer.text)
    except (ValueError, RecursionError):
        return _short(answer.text, answer) or f"HTTP {answer.status_code}", ""
    inner = body.get("error", body) if isinstance(body, dict) else body
    if not isinstance(inner, dict):
        return _short(str(inner), answer), ""
    said = inner.get("message") or inner.get("detail") or inner
    return _short(str(said), answer), f"{inner.get('code')} {inner.get('type')}"


def _short(text: str, answer: httpx.Response) -> str:
    """What a server says, without secrets: a server may repeat the key that it was given, in any
    form."""
    key = ""
    with suppress(RuntimeError):  # an answer that was made without a request
        key = answer.request.headers.get("authorization", "").removeprefix("Bearer ")
    return masked(without_secret(" ".join(text.split()), key))[:500]


def _logprobs(choice: dict[str, Any], text: str, top: int) -> tuple[TokenLogprob, ...]:
    """The tokens that make up ``text`` with their log-probabilities. Servers also name tokens that
    a stop string cut off."""
    given = (choice.get("logprobs") or {}).get("content")
    if given is None:
        raise TypeError("log-probabilities were asked for, and it gave none")
    length, covered, kept = len(text.encode()), 0, []
    for one in given:
        if covered >= length:
            break
        covered += len(_bytes(one))
        ranked = [_scored(other) for other in (one.get("top_logprobs") or [])[:top]]
        kept.append(serialize.token_logprob(**_scored(one), top=ranked))
    return tuple(kept)


def _scored(one: dict[str, Any]) -> dict[str, Any]:
    # llama.cpp gives ids; the protocol has none.
    return {"token": one["token"], "logprob": float(one["logprob"]), "token_id": one.get("id")}


def _bytes(one: dict[str, Any]) -> bytes:
    return bytes(one["bytes"]) if one.get("bytes") is not None else one["token"].encode()
