"""A real HTTP server on this machine that speaks the OpenAI protocol, answers from a script, and
fails as it is told to.

    with OpenAIServer({"What is 2+2?": "4"}, key="secret", faults=[Fault.status(429,
    retry_after=0.2), Fault.reset()]) as server:
        lm = dspy.LM(f"openai/{server.model}", api_base=server.api_base, api_key="secret",
        cache=False)
        lm("What is 2+2?")                       # ["4"], at the third attempt
        [one.fault.kind if one.fault else "answered" for one in server.received]     # ["status",
            "reset", "answered"]

It serves POST /v1/chat/completions (whole, or streamed as server-sent events), GET /v1/models and
GET /health. It is strict: an unknown path, field or model, a value out of range, a wrong key and a
prompt that is not in the script are errors in OpenAI's form.
"""

from __future__ import annotations

import json
import random
import socket
import struct
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from cowest_dspy.testing.engine import NotScripted, Script, scripted
from cowest_dspy.testing.protocol import (
    Choice,
    ProtocolError,
    StrictRequest,
    choice_of,
    error_body,
    read_request,
    stream_events,
    whole_body,
)


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong with one request. Make it with the class methods."""

    kind: str
    code: int = 0
    retry_after: float | None = None
    seconds: float = 0.0
    error_code: str | None = None
    message: str = ""

    @classmethod
    def status(
        cls,
        code: int,
        *,
        retry_after: float | None = None,
        error_code: str | None = None,
        message: str = "",
    ) -> Fault:
        """An HTTP error in OpenAI's form: 429 with ``Retry-After`` seconds, 500, 503, 401 ...

        ``error_code`` is the protocol's own, such as ``"context_length_exceeded"`` (with 400) or
        ``"insufficient_quota"``.
        """
        return cls("status", code, retry_after, 0.0, error_code, message)

    @classmethod
    def reset(cls) -> Fault:
        """The connection is reset before an answer."""
        return cls("reset")

    @classmethod
    def slow(cls, seconds: float) -> Fault:
        """The right answer, after so many seconds of silence."""
        return cls("slow", seconds=seconds)

    @classmethod
    def drip(cls, seconds: float) -> Fault:
        """The right answer, byte by byte over so many seconds: there is never silence for long."""
        return cls("drip", seconds=seconds)

    @classmethod
    def truncated(cls) -> Fault:
        """Half of the right answer's body, then the connection is closed."""
        return cls("truncated")

    @classmethod
    def garbled(cls) -> Fault:
        """Status 200 and a whole body that is not JSON."""
        return cls("garbled")


class FaultPlan:
    """The faults of a server: those declared, in order of arrival, then random ones at a rate;
    thread-safe.

    None in ``faults`` lets a request pass. Random faults are drawn from a seeded generator in order
    of arrival.
    """

    def __init__(self, faults: Iterable[Fault | None], rate: float, seed: int) -> None:
        self._declared, self._rate, self._random = iter(tuple(faults)), rate, random.Random(seed)
        self._lock = threading.Lock()
        self._kinds = (
            Fault.status(429, retry_after=0.05),
            Fault.status(500),
            Fault.reset(),
            Fault.truncated(),
            Fault.garbled(),
        )

    def next(self) -> Fault | None:
        """The fault of the next request, or None."""
        with self._lock:
            for fault in self._declared:
                return fault
            return self._random.choice(self._kinds) if self._random.random() < self._rate else None


@dataclass(frozen=True)
class Received:
    """A well-formed chat request as it came in: ``at`` on ``time.monotonic()``'s clock, headers in
    lower case without the key, and the fault that it met."""

    at: float
    body: dict[str, Any]
    headers: dict[str, str]
    fault: Fault | None


class OpenAIServer:
    """The server; it runs inside ``with``, on a free port of 127.0.0.1.

    Args:
        script: from a part of the last message to the answer; or a function of the request as a
            dictionary (``model``, ``messages``, ``config``), which is asked once for each of the
            ``n`` choices. A :class:`Fault` as an answer goes wrong every time. ``stop`` and
            ``max_tokens`` cut what the script says; a token is a word with the space before it.
        model: the name that it serves; several as a tuple.
        key: the API key that it asks for; None takes any.
        faults: what goes wrong, one for each request in order of arrival; None lets one pass. After
            them all is well, unless ``fault_rate`` says what part of the requests fails (429, 500,
            reset, truncated or garbled, drawn with ``seed``).

    ``received`` lists every well-formed request, ``most_at_once`` says how many were under way
    together at most.
    """

    def __init__(
        self,
        script: Script[str | Fault],
        *,
        model: str | tuple[str, ...] = "scripted",
        key: str | None = None,
        faults: Iterable[Fault | None] = (),
        fault_rate: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.script, self.key = script, key
        self.models = (model,) if isinstance(model, str) else model
        self.received: list[Received] = []
        self.most_at_once = 0
        self._plan, self._lock, self._at_once = (
            FaultPlan(faults, fault_rate, seed),
            threading.Lock(),
            0,
        )
        self._closing = threading.Event()
        self._http: _Http | None = None

    @property
    def model(self) -> str:
        """The first of the names that it serves."""
        return self.models[0]

    @property
    def api_base(self) -> str:
        """The address for clients: ``http://127.0.0.1:PORT/v1``.

        Raises:
            RuntimeError: outside ``with``.
        """
        if self._http is None:
            raise RuntimeError(
                "The server does not run: use it as `with OpenAIServer(...) as server:`."
            )
        return f"http://127.0.0.1:{self._http.server_port}/v1"

    def __enter__(self) -> OpenAIServer:
        self._http = _Http(self)
        threading.Thread(
            target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            self._http = None

    def check_key(self, authorization: str) -> None:
        """Whether the request may be served.

        Raises:
            ProtocolError: 401, where a key was set and another, or none, was given.
        """
        if self.key is not None and authorization != f"Bearer {self.key}":
            raise ProtocolError(401, "Incorrect API key provided.", "invalid_api_key")

    def receive(
        self, request: StrictRequest, body: dict[str, Any], headers: dict[str, str]
    ) -> Fault | None:
        """Record a request; return what goes wrong with it.

        Raises:
            ProtocolError: 404, where the model is not served here.
        """
        if request.model not in self.models:
            raise ProtocolError(
                404,
                f"There is no model {request.model!r} here, only {list(self.models)}.",
                "model_not_found",
            )
        with self._lock:
            fault = self._plan.next()
            self.received.append(Received(time.monotonic(), body, headers, fault))
        return fault

    def answers(self, request: StrictRequest) -> list[Choice] | Fault:
        """The script's answers, a choice for each of ``n``.

        Raises:
            ProtocolError: 400, where the script has no answer.
        """
        try:
            texts = [scripted(self.script, request.to_script()) for _ in range(request.n or 1)]
        except NotScripted as error:
            raise ProtocolError(400, str(error), "not_scripted") from None
        choices: list[Choice] = []
        for text in texts:
            if isinstance(text, Fault):
                return text
            choices.append(choice_of(text, request))
        return choices

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count a request as under way."""
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            yield
        finally:
            with self._lock:
                self._at_once -= 1

    def pause(self, seconds: float) -> None:
        """Wait so long, or until the server is closed."""
        self._closing.wait(seconds)


class _Http(ThreadingHTTPServer):
    request_queue_size = 128  # the default of 5 would refuse a burst of threads

    def __init__(self, owner: OpenAIServer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.owner = owner
        self._open: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        super().server_close()
        for connection in tuple(self._open):  # kept alive by clients: their threads would stay
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Silent where a client has gone away, which is its right; anything else is a bug here and
        is printed."""
        import sys

        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 300.0  # A client that sends nothing would keep its thread for good.
    wbufsize = -1
    server: _Http  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        """The models, or that it is alive."""
        owner = self.server.owner
        listed = [
            {"id": name, "object": "model", "created": 1, "owned_by": "script"}
            for name in owner.models
        ]
        known: dict[str, dict[str, Any]] = {
            "/v1/models": {"object": "list", "data": listed},
            "/health": {"status": "ok"},
        }
        try:
            if self.path == "/v1/models":
                owner.check_key(self.headers.get("Authorization", ""))
            if self.path not in known:
                raise ProtocolError(
                    404, f"There is no GET {self.path} here, only {', '.join(known)}."
                )
        except ProtocolError as error:
            self._send(error.status, error.body)
        else:
            self._send(200, known[self.path])

    def do_POST(self) -> None:
        """A chat completion, or what goes wrong with it."""
        owner = self.server.owner
        with owner.counting():
            try:
                data = self._body()
                owner.check_key(self.headers.get("Authorization", ""))
                if self.path != "/v1/chat/completions":
                    raise ProtocolError(
                        404, f"There is no POST {self.path} here, only /v1/chat/completions."
                    )
                request = read_request(data)
                headers = {
                    key.lower(): value
                    for key, value in self.headers.items()
                    if key.lower() != "authorization"
                }
                fault = owner.receive(request, json.loads(data), headers)
                answers = owner.answers(request)
            except ProtocolError as error:
                self._send(error.status, error.body)
                return
            if isinstance(answers, Fault):
                fault, answers = fault or answers, [choice_of("", request)]
            self._answer(request, answers, fault)

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or len(length) > 9:  # "²" is a digit, and no number.
            self.close_connection = True
            raise ProtocolError(411, "A Content-Length below 1 GB is needed.")
        return self.rfile.read(int(length))

    def _answer(self, request: StrictRequest, choices: list[Choice], fault: Fault | None) -> None:
        if fault is not None and fault.kind == "status":
            message = fault.message or f"Scripted to fail with status {fault.code}."
            self._send(
                fault.code, error_body(fault.code, message, fault.error_code), fault.retry_after
            )
            return
        if fault is not None and fault.kind == "reset":
            # Linger 0: closing sends a reset, where it would otherwise be a polite end.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return
        if fault is not None and fault.kind == "slow":
            self.server.owner.pause(fault.seconds)
        if request.stream:
            data, kind = b"".join(stream_events(request, choices)), "text/event-stream"
        else:
            data, kind = json.dumps(whole_body(request, choices)).encode(), "application/json"
        if fault is not None and fault.kind == "garbled":
            data = data.replace(b"{", b"<")
        self._head(200, kind, len(data))
        if fault is not None and fault.kind == "truncated":
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        elif fault is not None and fault.kind == "drip":
            self._drip(data, fault.seconds)
        else:
            self.wfile.write(data)

    def _drip(self, data: bytes, seconds: float) -> None:
        for place in range(len(data)):
            self.wfile.write(data[place : place + 1])
            self.wfile.flush()
            self.server.owner.pause(seconds / len(data))

    def _send(self, status: int, value: dict[str, Any], retry_after: float | None = None) -> None:
        data = json.dumps(value).encode()
        self._head(status, "application/json", len(data), retry_after)
        self.wfile.write(data)

    def _head(self, status: int, kind: str, length: int, retry_after: float | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length))
        if retry_after is not None:
            self.send_header("Retry-After", f"{retry_after:g}")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: the server's ``received`` says what came."""
