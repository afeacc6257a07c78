"""The outermost layer of every request: the API key, the length and time of its body, errors in
OpenAI's form, counters, one line of log. No text of a request is logged."""

from __future__ import annotations

import asyncio
import hmac
import itertools
import logging
import math
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from cowest_dspy.serve.answer import ServedAnswer
from cowest_dspy.serve.config import ServeLimits, is_loopback

log = logging.getLogger("cowest_dspy.serve")
CHAT, MODELS, HEALTH, METRICS, SCHEMA = PATHS = (
    "/v1/chat/completions",
    "/v1/models",
    "/healthz",
    "/metrics",
    "/openapi.json",
)
CLIENT_GONE = 499
"""The status that is counted where a client went away; it reaches nobody."""
SECONDS_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


@dataclass(eq=False)
class ApiError(Exception):
    """An error response: an HTTP status, a message for people, a code for programs, the parameter
    that is wrong, and the seconds after which to try again."""

    status: int
    message: str
    code: str
    param: str | None = None
    retry_after: float | None = None

    @property
    def body(self) -> dict[str, Any]:
        """The error in OpenAI's form, which its SDKs make exceptions of."""
        other = "invalid_request_error" if self.status < 500 else "server_error"
        kind = _ERROR_TYPES.get(self.status, other)
        facts = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": facts}

    @property
    def headers(self) -> dict[str, str]:
        """``Retry-After`` where it is known, ``WWW-Authenticate`` where a key is missing."""
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        return headers


class ClientGone(Exception):
    """The client went away before its answer was there."""


class Metrics:
    """The counters of a server, for Prometheus. No text of a request is in it, and no label has
    open ends."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

        self.registry = CollectorRegistry()
        of: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("cowest_requests", "Chat requests by status", ["status"], **of)
        self.seconds = Histogram(
            "cowest_request_seconds",
            "From a chat request's arrival to its answer",
            buckets=SECONDS_BUCKETS,
            **of,
        )
        self.routes = Counter(
            "cowest_routes", "Answers by route and fallback", ["route", "fallback"], **of
        )
        self.failures = Counter(
            "cowest_model_failures", "Models that gave no usable answer", ["role", "kind"], **of
        )
        self.tokens = Counter(
            "cowest_tokens", "Tokens by model and direction", ["role", "direction"], **of
        )
        self.active = Gauge("cowest_active", "Requests that models are asked for now", **of)
        self.waiting = Gauge("cowest_waiting", "Requests that wait for their turn", **of)
        ProcessCollector(**of)

    def count_answer(self, answer: ServedAnswer) -> None:
        """Count who gave an answer, its tokens, and the models that failed on the way."""
        self.routes.labels(answer.route, answer.fallback or "none").inc()
        for role, kind in answer.failed.items():
            self.failures.labels(role, kind).inc()
        for name, count in answer.tokens.items():
            self.tokens.labels(*name.split("_")).inc(count)


class Guard:
    """The ASGI application around the endpoint: API key, length and time of bodies, errors, one
    line of log for each request.

    Args:
        app: what answers.
        limits: of body and time.
        key: what clients must give as a bearer token; None asks for none, and then only names of
            this machine are answered to, so that no web page can ask through a name of its own.
    """

    def __init__(
        self, app: App, limits: ServeLimits, metrics: Metrics, key: str | None = None
    ) -> None:
        self.app, self.limits, self.metrics, self._key = app, limits, metrics, key
        self.stopping, self.under_way = False, 0
        # Ids are for logs, and no secret.
        self._series, self._numbers = uuid.uuid4().hex[:16], itertools.count(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        began, status, begun = time.monotonic(), 500, False
        request_id = f"chatcmpl-{self._series}{next(self._numbers):08x}"
        scope["cowest"] = facts = {"id": request_id}

        async def send_noting(message: MutableMapping[str, Any]) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                status, begun = message["status"], True
                headers = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
                if self.stopping or status == 408:
                    headers.append((b"connection", b"close"))
                message = {**message, "headers": headers}
            await send(message)

        self.under_way += 1
        try:
            self._check(scope)
            await self.app(scope, await self._body(scope, receive), send_noting)
        except ClientGone:
            status = CLIENT_GONE
        except (ApiError, asyncio.CancelledError, Exception) as error:
            if isinstance(error, asyncio.CancelledError):  # The server's grace is over.
                error = stopping_error()
            elif not isinstance(error, ApiError):
                # Its message may hold what was asked: only its kind is logged.
                log.error("%s failed: %s", request_id, _kinds(error))
                error = internal_error()
            if not begun:
                await error_response(error)(scope, receive, send_noting)
        finally:
            self.under_way -= 1
            seconds = time.monotonic() - began
            if scope["path"] == CHAT:
                self.metrics.requests.labels(str(status)).inc()
                self.metrics.seconds.observe(seconds)
            path = scope["path"] if scope["path"] in PATHS else "(another path)"
            more = "".join(
                f" {name}={value}"
                for name, value in facts.items()
                if name != "id" and value is not None
            )
            log.info("%s %s %d %.3fs%s", request_id, path, status, seconds, more)

    def _check(self, scope: Scope) -> None:
        """Check the key, or the host's name, and that the server is not being stopped."""
        path, headers = scope["path"], dict(scope["headers"])
        if path == HEALTH:
            return
        if self._key is not None:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(
                given.strip(), self._key.encode()
            ):
                what = "Give this server's API key as a bearer token."
                raise ApiError(401, what, "invalid_api_key")
        elif not _names_this_machine(headers.get(b"host", b"").decode("latin-1")):
            what = "Without an API key this server answers to 127.0.0.1 and localhost only."
            raise ApiError(421, what, "wrong_host")
        if self.stopping and path != METRICS:
            raise stopping_error()

    async def _body(self, scope: Scope, receive: Receive) -> Receive:
        """Read the request's body within its limits; gives it again, and then whatever else comes.

        Raises:
            ApiError: 413 where it is too long, 408 where it does not come in time.
            ClientGone: the client went away.
        """
        most = self.limits.body
        what = f"The body is longer than {most} bytes ([serve.limits] body)."
        too_long = ApiError(413, what, "body_too_long")
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared[:19]) > most:
            raise too_long
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(self.limits.seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > most:
                        raise too_long
        except TimeoutError:
            raise ApiError(408, "The body did not come in time.", "body_too_late") from None
        whole: list[MutableMapping[str, Any]] = [
            {"type": "http.request", "body": bytes(body), "more_body": False}
        ]

        async def replay() -> MutableMapping[str, Any]:
            return whole.pop() if whole else await receive()

        return replay


def _names_this_machine(host: str) -> bool:
    if host.startswith("["):
        return is_loopback(host.rpartition("]")[0].removeprefix("["))
    return is_loopback(host.partition(":")[0])


def _kinds(error: BaseException | None) -> str:
    """The kinds of an error and its causes, outermost first; none of their words."""
    names: list[str] = []
    while error is not None and len(names) < 5:
        names.append(type(error).__name__)
        error = error.__cause__
    return " from ".join(names)


def stopping_error() -> ApiError:
    """Build the error of a server that is being stopped."""
    return ApiError(503, "The server is being stopped.", "stopping", retry_after=5.0)


def internal_error() -> ApiError:
    """Build the error of a fault that the log names."""
    what = "The server failed at this request; its log says how."
    return ApiError(500, what, "internal_error")


def error_response(error: ApiError, headers: Any = None) -> Any:
    """Build Starlette's response of an error."""
    from starlette.responses import JSONResponse

    return JSONResponse(error.body, error.status, {**(headers or {}), **error.headers})
