"""A strict HTTP server on 127.0.0.1 for tests: it answers what it was told, notes what it was
asked, and 404 is a failed test."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from loopback import listening

CHAT = "/v1/chat/completions"


@dataclass(frozen=True)
class Said:
    """One answer: a status, a body (text as it is, anything else as JSON), headers; ``cut`` of the
    body's bytes are not sent."""

    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut: int = 0


@dataclass
class LocalServer:
    """What stands behind ``url``. ``routes`` maps "/path" to a function of the request's JSON (None
    for a GET)."""

    url: str
    routes: dict[str, Callable[[Any], Said]]
    asked: list[tuple[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)

    def bodies(self, path: str = CHAT) -> list[Any]:
        """What was posted to ``path``, in order."""
        return [body for asked, body in self.asked if asked == path]


@contextmanager
def local_server(routes: dict[str, Callable[[Any], Said]]) -> Iterator[LocalServer]:
    """A running server; leaving the context fails when it was asked for something that it was not
    told."""
    unknown: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._say(None)

        def do_POST(self) -> None:
            self._say(json.loads(self.rfile.read(int(self.headers["content-length"]))))

        def _say(self, body: Any) -> None:
            server.asked.append((self.path, body))
            server.headers.append({name.lower(): value for name, value in self.headers.items()})
            if self.path not in server.routes:
                unknown.append(self.path)
            said = server.routes.get(self.path, lambda _: Said("", 404))(body)
            data = (
                said.body.encode() if isinstance(said.body, str) else json.dumps(said.body).encode()
            )
            self.send_response(said.status)
            for name, value in {"content-type": "application/json", **said.headers}.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) - said.cut])
            if said.cut:
                self.close_connection = True

        def log_message(self, format: str, *args: Any) -> None: ...

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server = LocalServer(f"http://127.0.0.1:{http.server_port}", routes)
    with listening(http):
        yield server
    assert not unknown, f"asked for {unknown}, which nobody said it would be"


def completion(text: str = "yes", finish_reason: str = "stop", **choice: Any) -> Said:
    """A chat completion of 7 prompt and 3 generated tokens."""
    message = {"role": "assistant", "content": text}
    return Said(
        {
            "id": "x",
            "object": "chat.completion",
            "model": "m",
            "choices": [{"index": 0, "finish_reason": finish_reason, "message": message, **choice}],
            "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
        }
    )
