"""HTTP requests that end within a deadline, and the OpenAI protocol for chats: a request -> the
body of a POST, the server's answer -> a Response, a failure -> an error of DSPy.

    response = within(120.0, lambda: lm.acall(request))      # blocks, in any thread

Attempts run on one event loop, in a thread of its own. At its deadline an attempt is cancelled
wherever it is (the look-up of the address, connecting, headers that trickle, a body without end),
and its connection is closed. What is under way may be paid for: a stop ends only what waits for its
turn or for another try (rate_limit.py).

What comes from a server is not trusted: an answer that is cut short, garbled or of another shape is
a ServerError, which DSPy tries again, and never an error of Python's own.
"""

from __future__ import annotations

import asyncio
import builtins
import email.utils
import json
import math
import os
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

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

T = TypeVar("T")

LARGEST_BODY = 64 * 2**20
"""Bytes of an answer, uncompressed. The longest answers with log-probabilities of all their tokens
stay below."""
GRACE = 5.0
"""Seconds in which an attempt that was cancelled must have ended; after them its caller does not
wait for it any more."""
# Addresses are looked up in threads, and some look-ups hang: as many may do so as attempts are
# commonly under way.
_LOOK_UPS = 64
_OF_THE_TRANSFER = (b"content-encoding", b"content-length", b"transfer-encoding")
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


def within(seconds: float, attempt: Callable[[], Awaitable[T]]) -> T:
    """Await ``attempt()`` and return its result, under the caller's context; this thread waits for
    it.

    Raises:
        TimeoutError: it has not ended within so many seconds, and was cancelled.
        BaseException: its own.
    """
    return _on_loop(_ended(attempt, seconds), seconds)


async def _ended(attempt: Callable[[], Awaitable[T]], seconds: float) -> T:
    async with asyncio.timeout(seconds):
        return await attempt()


def _on_loop(coroutine: Any, seconds: float) -> Any:
    future = asyncio.run_coroutine_threadsafe(coroutine, _loop())
    try:
        return future.result(max(seconds, 0.0) + GRACE)
    finally:
        future.cancel()  # Of one that has ended: nothing.


_loops: dict[int, asyncio.AbstractEventLoop] = {}
_loops_lock = threading.Lock()


def _loop() -> asyncio.AbstractEventLoop:
    """The process's loop; a fork has none of its parent's threads, and makes its own."""
    with _loops_lock:
        loop = _loops.get(os.getpid())
        if loop is None:
            loop = _loops[os.getpid()] = asyncio.new_event_loop()
            loop.set_default_executor(ThreadPoolExecutor(_LOOK_UPS, "cowest-look-up"))
            threading.Thread(target=loop.run_forever, name="cowest-http", daemon=True).start()
        return loop


class Http:
    """An HTTP client for attempts, with connections that are reused. Thread-safe; a forked process
    has connections of its own.

    Args:
        options: of ``httpx.AsyncClient``, less its timeouts.
    """

    def __init__(self, **options: Any) -> None:
        self._options, self._lock = options, threading.Lock()
        self._client: tuple[asyncio.AbstractEventLoop, httpx.AsyncClient] | None = None
        self._closed = False

    def exchange(self, seconds: float) -> Exchange:
        """The requests of one attempt that begins now: together they end within so many seconds.

        Raises:
            RuntimeError: it is closed.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("The HTTP client has been closed.")
            if self._client is None or self._client[0] is not _loop():
                self._client = (_loop(), httpx.AsyncClient(timeout=None, **self._options))
                weakref.finalize(self, _close_later, *self._client).atexit = False
            return Exchange(self._client[1], time.monotonic() + seconds)

    def close(self) -> None:
        """Close the connections; requests that are under way fail."""
        with self._lock:
            client, self._client, self._closed = self._client, None, True
        if client is not None and client[0] is _loop():
            with suppress(builtins.TimeoutError):
                within(GRACE, client[1].aclose)


def _close_later(loop: asyncio.AbstractEventLoop, client: httpx.AsyncClient) -> None:
    """Close the connections of a client that is not used any more."""
    if loop is _loops.get(os.getpid()):
        asyncio.run_coroutine_threadsafe(client.aclose(), loop)


@dataclass(frozen=True)
class Exchange:
    """The requests of one attempt: one deadline on ``time.monotonic()``'s clock for all of them
    together, one bound for each answer's body."""

    client: httpx.AsyncClient
    deadline: float

    def get(self, url: str) -> httpx.Response:
        """The whole answer to a GET.

        Raises:
            TimeoutError: the deadline has come.
            httpx.HTTPError: the connection broke, or the answer is longer than ``LARGEST_BODY``.
        """
        return self._whole("GET", url)

    def post(self, url: str, *, json: Any) -> httpx.Response:
        """The whole answer to a POST; raises as :meth:`get`."""
        return self._whole("POST", url, json=json)

    def _whole(self, method: str, url: str, **content: Any) -> httpx.Response:
        async def ask() -> httpx.Response:
            async with self.client.stream(method, url, **content) as answer:
                body = bytearray()
                async for piece in answer.aiter_bytes():
                    body += piece
                    if len(body) > LARGEST_BODY:
                        raise httpx.RemoteProtocolError(
                            f"the answer is longer than {LARGEST_BODY} bytes",
                            request=answer.request,
                        )
            # As bytes: a value may be beyond ASCII, and httpx writes none that is.
            headers = [
                (name, value)
                for name, value in answer.headers.raw
                if name.lower() not in _OF_THE_TRANSFER
            ]
            return httpx.Response(
                answer.status_code, headers=headers, content=bytes(body), request=answer.request
            )

        return within(self.deadline - time.monotonic(), ask)


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
        body = answer.json()
        choice, usage = body["choices"][0], body.get("usage") or {}
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
    message, code = _message(answer)
    status = answer.status_code
    details: dict[str, Any] = {"status": status, "retry_after": retry_after(answer.headers)}
    known = f"{code} {message}".lower()
    if status in (400, 413, 422) and any(words in known for words in _TOO_LONG):
        return ContextLengthError(message, **details)
    if status == 429 and "insufficient_quota" in known:
        return BillingError(message, **details)
    kind = _OF_STATUS.get(status) or (
        InvalidRequestError
        if 400 <= status < 500
        else ServerError
        if status >= 500
        else ProviderError
    )
    return kind(message, **details)


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


def _message(answer: httpx.Response) -> tuple[str, str]:
    """The message of a failure, and its code or type: OpenAI nests both under "error", vLLM's older
    versions do not."""
    try:
        body = json.loads(answer.text)
    except (ValueError, RecursionError):
        return _short(answer.text, answer) or f"HTTP {answer.status_code}", ""
    inner = body.get("error", body) if isinstance(body, dict) else body
    if not isinstance(inner, dict):
        return _short(str(inner), answer), ""
    message = inner.get("message") or inner.get("detail") or inner
    return _short(str(message), answer), f"{inner.get('code')} {inner.get('type')}"


def _short(text: str, answer: httpx.Response) -> str:
    """The message of a server, without secrets: a server may repeat the key that it was given, in
    any form."""
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
