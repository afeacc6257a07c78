"""The strict fake of an OpenAI server: it speaks the protocol, counts, and refuses what it was not
told."""

from __future__ import annotations

import json
import socket
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from cowest_dspy.testing import Fault, OpenAIServer
from cowest_dspy.testing.protocol import token_logprob

SCRIPT = {"2+2": "It is 4.", "fail": Fault.status(503)}


def body(text: str = "What is 2+2?", **more: Any) -> dict[str, Any]:
    return {"model": "scripted", "messages": [{"role": "user", "content": text}], **more}


def post(
    server: OpenAIServer, value: Any, key: str = "k", path: str = "/chat/completions"
) -> httpx.Response:
    content = value if isinstance(value, bytes) else json.dumps(value).encode()
    return httpx.post(
        server.api_base + path,
        content=content,
        headers={"Authorization": f"Bearer {key}"},
        timeout=5,
        verify=False,
    )


def test_an_answer_has_choices_usage_and_a_reason() -> None:
    with OpenAIServer(SCRIPT) as server:
        answer = post(server, body(n=2)).json()
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["It is 4."] * 2
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["stop"] * 2
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9}


@pytest.mark.parametrize(
    ("more", "text", "reason"),
    [
        ({"max_tokens": 2}, "It is", "length"),
        ({"max_completion_tokens": 3}, "It is 4.", "stop"),
        ({"stop": " 4"}, "It is", "stop"),
        ({"stop": ["x", "t"]}, "I", "stop"),
    ],
)
def test_limits_and_stop_texts_cut_the_answer(more: dict[str, Any], text: str, reason: str) -> None:
    with OpenAIServer(SCRIPT) as server:
        choice = post(server, body(**more)).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (text, reason)


def test_log_probabilities_are_made_from_the_text_as_declared() -> None:
    with OpenAIServer(SCRIPT) as server:
        content = post(server, body(logprobs=True, top_logprobs=2)).json()["choices"][0][
            "logprobs"
        ]["content"]
    assert [(one["token"], one["logprob"]) for one in content] == [
        (t, token_logprob(t)) for t in ("It", " is", " 4.")
    ]
    assert [other["token"] for other in content[0]["top_logprobs"]] == ["It", "It~"]


def test_a_streamed_answer_is_the_whole_answer_in_events() -> None:
    with OpenAIServer(SCRIPT) as server:
        lines = post(server, body(stream=True, stream_options={"include_usage": True})).text.split(
            "\n\n"
        )
    assert lines[-2:] == ["data: [DONE]", ""]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert (
        "".join(
            choice["delta"].get("content", "") for event in events for choice in event["choices"]
        )
        == "It is 4."
    )
    assert (
        events[-2]["choices"][0]["finish_reason"] == "stop"
        and events[-1]["usage"]["total_tokens"] == 6
    )


@pytest.mark.parametrize(
    ("wrong", "status", "says"),
    [
        (b"{", 400, "not JSON"),
        (b"[" * 50_000, 400, "not JSON"),
        (b"9" * 5_000, 400, "not JSON"),
        (body(top_k=3), 400, "top_k: Extra inputs"),
        (body(temperature=3.0), 400, "temperature"),
        (body(max_tokens="9"), 400, "max_tokens"),
        ({"model": "scripted", "messages": []}, 400, "messages"),
        (body() | {"model": "other"}, 404, "no model 'other'"),
        (body("What is 3+3?"), 400, "The script has 0 answers"),
    ],
)
def test_what_the_protocol_or_the_script_does_not_know_is_an_error_in_openais_form(
    wrong: Any, status: int, says: str
) -> None:
    with OpenAIServer(SCRIPT) as server:
        answer = post(server, wrong)
    assert answer.status_code == status
    assert (
        says in answer.json()["error"]["message"]
        and answer.json()["error"]["type"] == "invalid_request_error"
    )


def test_an_unknown_path_a_wrong_key_and_a_scripted_fault_are_errors() -> None:
    with OpenAIServer(SCRIPT, key="k") as server:
        assert post(server, body(), path="/completions").status_code == 404
        assert post(server, body(), key="other").json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(server.api_base + "/models").status_code == 401
        assert post(server, body("fail")).status_code == 503
        assert post(server, body()).status_code == 200
        assert (
            "authorization" not in server.received[-1].headers
            and server.received[-1].body == body()
        )


def test_models_and_health_are_served() -> None:
    with OpenAIServer(SCRIPT, model=("a", "b")) as server:
        assert [one["id"] for one in httpx.get(server.api_base + "/models").json()["data"]] == [
            "a",
            "b",
        ]
        assert httpx.get(server.api_base.replace("/v1", "/health")).json() == {"status": "ok"}


def test_a_script_that_is_a_function_is_asked_for_each_choice() -> None:
    asked: list[dict[str, Any]] = []

    def script(request: dict[str, Any]) -> str:
        asked.append(request)
        return str(len(asked))

    with OpenAIServer(script) as server:
        choices = post(server, body(n=2, max_completion_tokens=5)).json()["choices"]
    assert [choice["message"]["content"] for choice in choices] == ["1", "2"]
    assert (
        asked[0]["messages"] == [{"role": "user", "content": "What is 2+2?"}]
        and asked[0]["config"]["max_tokens"] == 5
    )


def test_faults_come_in_order_and_then_no_more() -> None:
    faults = [
        Fault.status(429, retry_after=1.5),
        None,
        Fault.garbled(),
        Fault.truncated(),
        Fault.reset(),
        Fault.drip(0.05),
    ]
    with OpenAIServer(SCRIPT, faults=faults) as server:
        first = post(server, body())
        assert (first.status_code, first.headers["Retry-After"], first.json()["error"]["type"]) == (
            429,
            "1.5",
            "rate_limit_error",
        )
        assert post(server, body()).status_code == 200
        with pytest.raises(json.JSONDecodeError):
            post(server, body()).json()
        with pytest.raises(httpx.RemoteProtocolError):
            post(server, body())
        with pytest.raises(httpx.ReadError):
            post(server, body())
        assert post(server, body()).status_code == post(server, body()).status_code == 200
        assert [one.fault for one in server.received] == [*faults, None]


def test_random_faults_are_those_of_the_seed() -> None:
    def faults(seed: int) -> list[str]:
        with OpenAIServer(SCRIPT, fault_rate=0.5, seed=seed) as server:
            for _ in range(20):
                try:
                    post(server, body())
                except httpx.TransportError:
                    continue
            return [one.fault.kind if one.fault else "none" for one in server.received]

    assert faults(1) == faults(1) != faults(2)
    assert 0 < faults(1).count("none") < 20


def test_outside_of_with_it_has_no_address() -> None:
    with pytest.raises(RuntimeError, match="as `with OpenAIServer"):
        _ = OpenAIServer(SCRIPT).api_base


@pytest.mark.parametrize("length", ["\xb2", "-1", "9" * 30])
def test_an_odd_length_of_a_body_is_refused(length: str, capfd: pytest.CaptureFixture[str]) -> None:
    with (
        OpenAIServer(SCRIPT) as server,
        socket.create_connection(("127.0.0.1", urlsplit(server.api_base).port or 0), 30) as made,
    ):
        made.sendall(
            f"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: {length}\r\n\r\n".encode(
                "latin-1"
            )
        )
        assert made.recv(65536).startswith(b"HTTP/1.1 411")
    assert capfd.readouterr().err == ""
