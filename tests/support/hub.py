"""A Hub on loopback: the few endpoints that an upload of small files asks, strict about what it
gets, and a memory of it."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from loopback import listening, send_json

TOKEN = "hf_" + "made4thistestonly"


class Hub:
    """Takes datasets and models. ``files`` holds what was committed, ``datasets`` name -> whether
    it is private (models too)."""

    def __init__(self) -> None:
        self.datasets: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.bodies: list[bytes] = []
        self.commits = 0
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                hub.bodies.append(body)
                self._answer(body)

            def do_GET(self) -> None:
                self._answer(b"")

            def _answer(self, body: bytes) -> None:
                path = self.path.partition("?")[0]
                hub.asked.append(f"{self.command} {path}")
                allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
                status, answer = (
                    hub.answer(self.command, path, body)
                    if allowed
                    else (401, {"error": "Invalid token"})
                )
                send_json(self, status, answer)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def answer(self, command: str, path: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON of one request."""
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            there = name in self.datasets
            kind = wanted.get("type", "model")
            assert kind in ("dataset", "model")
            self.datasets.setdefault(name, wanted["visibility"] == "private")
            return (409 if there else 200), {
                "url": f"{self.url}/{'datasets/' if kind == 'dataset' else ''}{name}",
                "name": name,
            }
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        name = "/".join(path.split("/")[3:5])
        if not path.startswith(("/api/datasets/", "/api/models/")) or name not in self.datasets:
            return 404, {"error": f"no {path}"}
        if command == "GET":
            return 200, {"id": name, "private": self.datasets[name], "sha": "0" * 40}
        if "/preupload/" in path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return 200, {"files": files}
        assert "/commit/" in path
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        self.commits += 1
        return 200, {"commitUrl": f"{self.url}/datasets/{name}/commit/1", "commitOid": "1" * 40}


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A Hub that listens while the context lasts."""
    hub = Hub()
    with listening(hub.server):
        yield hub
