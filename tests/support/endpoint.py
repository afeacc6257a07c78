"""A small OpenAI-compatible endpoint on loopback: what it lists and says is given; what it was
asked is kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from loopback import listening, send_json


class Endpoint(ThreadingHTTPServer):
    """Answers GET from ``pages`` (path -> JSON value, or a status), and every chat completion with
    ``answer``."""

    daemon_threads = True

    def __init__(self, pages: dict[str, Any], answer: str, key: str | None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.pages, self.answer, self.key = pages, answer, key
        self.asked: list[dict[str, Any]] = []

    @property
    def address(self) -> str:
        """As ``api_base``."""
        return f"http://127.0.0.1:{self.server_port}/v1"


@contextmanager
def serving(
    pages: dict[str, Any] | None = None, *, answer: str = "yes", key: str | None = None
) -> Iterator[Endpoint]:
    """An endpoint that runs inside this context; with a ``key`` it refuses any other."""
    endpoint = Endpoint(pages or {}, answer, key)
    with listening(endpoint):
        yield endpoint


class _Handler(BaseHTTPRequestHandler):
    @property
    def endpoint(self) -> Endpoint:
        assert isinstance(self.server, Endpoint)
        return self.server

    def do_GET(self) -> None:
        page = self.endpoint.pages.get(self.path, 404)
        self._send(
            page if isinstance(page, int) else 200,
            {"error": {"message": "no"}} if isinstance(page, int) else page,
        )

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.endpoint.asked.append(body)
        choice = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": self.endpoint.answer},
        }
        usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        head = {"id": "1", "object": "chat.completion", "created": 1, "model": body["model"]}
        self._send(200, {**head, "choices": [choice], "usage": usage})

    def _send(self, status: int, value: Any) -> None:
        if self.endpoint.key and self.headers.get("Authorization") != f"Bearer {self.endpoint.key}":
            status, value = 401, {"error": {"message": "wrong key"}}
        send_json(self, status, value)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""
