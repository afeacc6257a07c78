"""Front: what every request meets first: who may ask, how long a body may be, whether the server
still takes requests.

A plain ASGI application around another one. Whatever goes wrong behind it has an answer in OpenAI's
form, and nothing of what was asked is logged: a line says id, path, status, seconds, and who
answered.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from cowest_dspy.serve import refusals
from cowest_dspy.serve.config import ServeLimits, is_loopback
from cowest_dspy.serve.metrics import Metrics
from cowest_dspy.serve.refusals import Refused
from cowest_dspy.serve.service import Gone, Receive

log = logging.getLogger(__name__)
CHAT, MODELS, HEALTH, METRICS, SCHEMA = (
    "/v1/chat/completions",
    "/v1/models",
    "/healthz",
    "/metrics",
    "/openapi.json",
)
PATHS = (CHAT, MODELS, HEALTH, METRICS, SCHEMA)
GONE = 499
"""The status that is counted where a client went away; it reaches nobody."""
Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Front:
    """The application that a server runs.

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
        self.stopping, self.under_way, self.last = False, 0, time.monotonic()
        # Ids are for logs, and no secret: random bits for each would be a call of the system, and a
        # fight for the interpreter.
        self._series, self._numbers = uuid.uuid4().hex[:16], itertools.count(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, sent = (
            time.monotonic(),
            _Sent(send, f"chatcmpl-{self._series}{next(self._numbers):08x}", lambda: self.stopping),
        )
        scope["cowest"] = facts = {"id": sent.id}
        self.under_way += 1
        try:
            await self._answer(scope, receive, sent)
        finally:
            self.under_way, self.last = self.under_way - 1, time.monotonic()
            seconds = self.last - began
            if scope["path"] == CHAT:
                self.metrics.ended(sent.status, seconds)
            path = scope["path"] if scope["path"] in PATHS else "(another path)"
            log.info("%s %s %d %.3fs%s", sent.id, path, sent.status, seconds, _said(facts))

    async def _answer(self, scope: Scope, receive: Receive, sent: _Sent) -> None:
        try:
            self._check(scope)
            await self.app(scope, await self._body(scope, receive), sent)
        except Refused as error:
            await sent.refuse(error)
        except Gone:
            sent.status = GONE
        except (
            asyncio.CancelledError
        ):  # The server's grace is over: uvicorn would log the whole stack for each request.
            await sent.refuse(refusals.stopping())
        except Exception as error:  # Its message may hold what was asked: only its kind is logged.
            log.error("%s failed: %s", sent.id, _kinds(error))
            await sent.refuse(refusals.broken())

    def _check(self, scope: Scope) -> None:
        """Whether the request is answered at all.

        Raises:
            Refused: 401 without the key, 421 under another machine's name, 503 while the server is
                being stopped.
        """
        path, headers = scope["path"], dict(scope["headers"])
        if path == HEALTH:
            return
        if self._key is not None:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(
                given.strip(), self._key.encode()
            ):
                raise Refused(
                    401, "Give this server's API key as a bearer token.", "invalid_api_key"
                )
        elif not _of_this_machine(headers.get(b"host", b"").decode("latin-1")):
            raise Refused(
                421,
                "Without an API key this server answers to 127.0.0.1 and localhost only.",
                "wrong_host",
            )
        if self.stopping and path != METRICS:
            raise refusals.stopping()

    async def _body(self, scope: Scope, receive: Receive) -> Receive:
        """The request's body, read whole within its limit, and then whatever else comes.

        Raises:
            Refused: 413 where it is too long, 408 where it does not come.
            Gone: the client went away.
        """
        most = self.limits.body
        said = dict(scope["headers"]).get(b"content-length", b"0")
        too_long = Refused(
            413, f"The body is longer than {most} bytes ([serve.limits] body).", "body_too_long"
        )
        if said.isdigit() and int(said[:19]) > most:
            raise too_long
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > most:
                        raise too_long
        except TimeoutError:
            raise Refused(408, "The body did not come in time.", "body_too_late") from None
        whole: list[MutableMapping[str, Any]] = [
            {"type": "http.request", "body": bytes(body), "more_body": False}
        ]

        async def replayed() -> MutableMapping[str, Any]:
            return whole.pop() if whole else await receive()

        return replayed


class _Sent:
    """A send that notes the status, adds the request's id, and can still refuse as long as nothing
    was sent."""

    def __init__(self, send: Send, request_id: str, closing: Callable[[], bool]) -> None:
        self._send, self.id, self._closing = send, request_id, closing
        self.status, self._begun = 500, False

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status, self._begun = message["status"], True
            close = [(b"connection", b"close")] if self._closing() or self.status == 408 else []
            message = {
                **message,
                "headers": [
                    *message.get("headers", []),
                    (b"x-request-id", self.id.encode()),
                    *close,
                ],
            }
        await self._send(message)

    async def refuse(self, error: Refused) -> None:
        """Sends an error, unless an answer has begun."""
        if self._begun:
            return
        body = json.dumps(error.body).encode()
        headers = {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **error.headers,
        }
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await self({"type": "http.response.start", "status": error.status, "headers": raw})
        await self({"type": "http.response.body", "body": body})


def _of_this_machine(host: str) -> bool:
    name = (
        host.rpartition("]")[0].removeprefix("[")
        if host.startswith("[")
        else host.partition(":")[0]
    )
    return is_loopback(name)


def _kinds(error: BaseException | None) -> str:
    """The kinds of an error and its causes, outermost first; none of their words."""
    names: list[str] = []
    while error is not None and len(names) < 5:
        names.append(type(error).__name__)
        error = error.__cause__
    return " from ".join(names)


def _said(facts: dict[str, Any]) -> str:
    return "".join(
        f" {name}={value}" for name, value in facts.items() if name != "id" and value is not None
    )
