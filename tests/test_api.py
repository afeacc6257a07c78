"""A strong model behind an OpenAI-compatible endpoint, chosen by TOML: a real server on loopback, real HTTP, the real client."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import dspy
import pytest

from cowest_dspy import Collaboration, Sampling, Store, build_lm, collect
from cowest_dspy.config import Api
from cowest_dspy.errors import ConfigError
from cowest_dspy.testing import ScriptedEngine

KEY = "sk-test-1234567890abcdef"


class Endpoint(BaseHTTPRequestHandler):
    """Answers chat completions with the last line of the question; says 500 to the word "broken"."""

    asked: list[dict[str, Any]]
    keys: list[str]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        self.keys.append(self.headers.get("Authorization", ""))
        text = body["messages"][-1]["content"]
        if "broken" in text:
            self._send(500, {"error": {"message": f"broken, and your key is {KEY}", "type": "server_error"}})
            return
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text.splitlines()[-1]}}
        usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
        self._send(
            200, {"id": "1", "object": "chat.completion", "created": 1, "model": body["model"], "choices": [choice], "usage": usage}
        )

    def _send(self, status: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    Endpoint.asked, Endpoint.keys = [], []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("COWEST_TEST_KEY", KEY)
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def settings(endpoint: str) -> Api:
    values = {"kind": "api", "model": "openai/some-model", "api_base": endpoint, "api_key_env": "COWEST_TEST_KEY"}
    return Api.model_validate({**values, "num_retries": 0, "temperature": 0.0, "max_tokens": 9})


def example(number: int, question: str) -> dspy.Example:
    return dspy.Example(id=str(number), question=question, answer="Background: good").with_inputs("question")


def test_a_hosted_strong_model_refines_and_its_key_is_written_nowhere(endpoint: str, tmp_path: Path) -> None:
    weak = ScriptedEngine(lambda request: "good" if request["config"].get("seed", 0) % 2 else "bad")
    program = Collaboration("question -> answer").bind(weak=weak.lm(), strong=build_lm(settings(endpoint)))
    examples = [example(0, "What?"), example(1, "broken?")]
    with Store(tmp_path) as store:
        traces = collect(program, examples, lambda e, p, trace=None: float(p.answer == e.answer), Sampling(drafts=4), store=store)
    good = [trace for trace in traces if trace.example_id == "0"]
    assert {(trace.draft, trace.influence) for trace in good} <= {("good", 1.0), ("bad", 0.0)}
    assert good[0].tokens["strong_in"] == 7 and good[0].tokens["strong_out"] == 3
    broken = [trace for trace in traces if trace.example_id == "1"]
    assert all(trace.error and trace.error.startswith("server") and trace.influence is None for trace in broken)
    assert set(Endpoint.keys) == {f"Bearer {KEY}"}
    limits = [asked.get("max_tokens") or asked.get("max_completion_tokens") for asked in Endpoint.asked]
    assert set(limits) == {9} and {asked["temperature"] for asked in Endpoint.asked} == {0.0}
    program.save(tmp_path / "program.json")
    for file in tmp_path.iterdir():
        assert KEY.encode() not in file.read_bytes(), file.name


def test_a_key_that_is_not_set_names_the_variable(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COWEST_TEST_KEY")
    with pytest.raises(ConfigError, match="COWEST_TEST_KEY is not set"):
        build_lm(settings(endpoint))
