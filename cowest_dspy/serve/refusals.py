"""What a request is refused with: a status and OpenAI's form of an error, which its SDKs make
exceptions of."""

from __future__ import annotations

import math
from typing import Any

from cowest_dspy.serve.asking import NOT_ASKED, Unanswered
from cowest_dspy.serve.protocol import ErrorBody, ErrorFacts

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class Refused(Exception):
    """A request that gets an error: its HTTP status, a message for people, a code for programs, and
    the part that is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        *,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_after = (
            status,
            message,
            code,
            param,
            retry_after,
        )

    @property
    def body(self) -> dict[str, Any]:
        """The error in OpenAI's form."""
        kind = TYPES.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return ErrorBody(
            error=ErrorFacts(message=self.message, type=kind, param=self.param, code=self.code)
        ).model_dump()

    @property
    def headers(self) -> dict[str, str]:
        """``Retry-After`` in whole seconds, where it is known; it asks for a key where that was
        missing."""
        after = (
            {}
            if self.retry_after is None
            else {"Retry-After": str(max(1, math.ceil(self.retry_after)))}
        )
        return after | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def refused(error: Unanswered) -> Refused:
    """What a client is told of a model that failed: which and how, and nothing of what it said."""
    status = 503 if error.kind == NOT_ASKED else 504 if error.kind == "timeout" else 502
    return Refused(status, str(error), f"{error.role}_model_failed", retry_after=error.retry_after)


def unknown(status: int, path: str, method: str) -> Refused:
    """A path or a method that is not served."""
    if status == 405:
        return Refused(405, f"{method} is not served at this path.", "method_not_allowed")
    where = "POST /v1/chat/completions, GET /v1/models, /healthz and /metrics"
    return Refused(404, f"There is nothing at {path[:200]}: {where} are served.", "not_found")


def too_late(seconds: float) -> Refused:
    """The time limit is over."""
    return Refused(
        504, f"There was no answer within {seconds:g} seconds ([serve.limits] seconds).", "timeout"
    )


def full(retry_after: float) -> Refused:
    """As many requests wait as may."""
    return Refused(
        429,
        "Too many requests are waiting: try again later.",
        "queue_full",
        retry_after=retry_after,
    )


def stopping() -> Refused:
    """The server was asked to end."""
    return Refused(503, "The server is being stopped.", "stopping", retry_after=5.0)


def crowded() -> Refused:
    """Refuse a connection: as many are open as may be, and each waits for its answer."""
    return Refused(
        503, "Too many connections: try again later.", "too_many_connections", retry_after=1.0
    )


def unreadable() -> Refused:
    """What came is no HTTP."""
    return Refused(
        400,
        "This is no HTTP/1.1 request that can be read, or its headers are too long.",
        "invalid_http",
    )


def broken() -> Refused:
    """Something that should not be: the log says what kind."""
    return Refused(500, "The server failed at this request; its log says how.", "internal_error")
