"""What goes wrong behind and before a served collaboration: failing models, too many requests, slow
ones, clients that go away."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from serving_parts import FACT, QUESTION, Held, body, post, program, refined, root, rules, serving

from cowest_dspy.errors import ProgramError
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.serve import Answering, Unanswered
from cowest_dspy.serve.chat import UNREFINED

BOOM = RuntimeError("the model behind is broken: sk-1234567890abcdef")


GONE = 'cowest_requests_total{status="499"}'


def failing(text: str) -> Exception:
    return BOOM


class Sometimes:
    """Fails as long as ``broken`` is set; counts its calls."""

    def __init__(self, answer: Callable[[str], Any]) -> None:
        self.answer, self.broken, self.calls = answer, True, 0

    def __call__(self, text: str) -> Any:
        self.calls += 1
        return BOOM if self.broken else self.answer(text)


def alone(text: str) -> str:
    return "refined" if "Background" in text else "alone"


def test_where_the_weak_model_fails_the_strong_one_answers_alone_and_it_is_said() -> None:
    with serving(program(weak=failing, strong=alone)) as address:
        said = post(address)
    assert said.json()["choices"][0]["message"]["content"] == "alone"
    told = said.json()["cowest"]
    assert (told["route"], told["fallback"], told["failed"]) == (
        "strong",
        "strong alone",
        {"weak": "error"},
    )
    assert said.headers["x-cowest-fallback"] == "strong-alone"


@pytest.mark.parametrize(("draft", "kind"), [("cut off...", "truncated"), ("", "parse")])
def test_a_draft_that_cannot_be_used_is_a_failure_and_no_draft(draft: str, kind: str) -> None:
    with serving(program(weak=lambda _: draft, strong=alone)) as address:
        told = post(address).json()["cowest"]
    assert told["failed"] == {"weak": kind} and told["fallback"] == "strong alone"


def test_without_fallbacks_a_failure_is_an_error_that_tells_no_secret() -> None:
    for made, role in ((program(weak=failing), "weak"), (program(strong=failing), "strong")):
        with serving(made, on_weak_failure="error") as address:
            said = post(address)
        assert said.status_code == 502 and said.json()["error"]["code"] == f"{role}_model_failed"
        assert "sk-" not in said.text and QUESTION not in said.text


def test_the_draft_in_the_strong_models_place_is_marked_in_text_header_and_facts() -> None:
    with serving(program(strong=failing), on_strong_failure="draft") as address:
        said, parsed = post(address), post(address, body(response_format={"type": "json_object"}))
    assert said.json()["choices"][0]["message"]["content"] == UNREFINED + FACT
    assert said.json()["cowest"]["fallback"] == said.headers["x-cowest-fallback"] == "draft"
    assert said.json()["cowest"]["failed"] == {"strong": "error"}
    assert parsed.status_code == 502, "a note is no answer that a program could parse"
    with serving(
        program(weak=lambda _: "18", strong=failing, draft="direct"), on_strong_failure="draft"
    ) as address:
        parsed = post(address, body(response_format={"type": "json_object"}))
    assert json.loads(parsed.json()["choices"][0]["message"]["content"]) == {"answer": "18"}
    assert parsed.json()["cowest"]["fallback"] == "draft"


def test_where_both_fail_there_is_no_draft_to_give() -> None:
    with serving(program(weak=failing, strong=failing), on_strong_failure="draft") as address:
        assert post(address).status_code == 502


def test_a_stream_that_has_shown_the_draft_ends_in_an_error_the_sdk_raises() -> None:
    with (
        serving(program(strong=failing)) as address,
        openai.OpenAI(base_url=address, api_key="any", max_retries=0) as client,
    ):
        wish: Any = {"cowest": {"draft": True}}
        messages: Any = [{"role": "user", "content": QUESTION}]
        stream = client.chat.completions.create(
            model="handbook", messages=messages, stream=True, extra_body=wish
        )
        seen = []
        with pytest.raises(openai.APIError, match="strong model gave no usable answer"):
            seen.extend(
                getattr(chunk.choices[0].delta, "reasoning_content", None) for chunk in stream
            )
        assert FACT in seen
        with pytest.raises(openai.InternalServerError):
            client.chat.completions.create(model="handbook", messages=messages, stream=True)


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_more_than_are_asked_at_once_wait_for_their_turn() -> None:
    held = Held()
    with (
        serving(program(weak=held), limits={"concurrency": 1}) as address,
        ThreadPoolExecutor(8) as pool,
    ):
        first = pool.submit(post, address)
        held.wait_until_asked()
        waiting = [pool.submit(post, address) for _ in range(2)]
        until(lambda: counted(address, "cowest_waiting") == 2)
        assert counted(address, "cowest_active") == 1
        held.go.set()
        assert [one.result().status_code for one in (first, *waiting)] == [200] * 3


def test_what_takes_too_long_is_an_error_and_asks_nothing_more() -> None:
    held, strong = Held(FACT), Sometimes(refined)
    strong.broken = False
    with serving(
        program(weak=held, strong=strong), limits={"seconds": 0.3, "concurrency": 1}
    ) as address:
        late, behind = post(address), post(address)
        assert [late.status_code, behind.status_code] == [504, 504], (
            "the turn is taken as long as the model is asked"
        )
        assert late.json()["error"]["code"] == "timeout"
        held.go.set()
        until(lambda: post(address).status_code == 200)
        assert strong.calls == 1, "for what was given up the strong model was not asked"


def counted(address: str, name: str) -> float:
    """A number of /metrics."""
    lines = httpx.get(f"{root(address)}/metrics").text.splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(name)), 0.0)


def asking(address: str) -> socket.socket:
    """A connection over which a request was sent, whose answer nobody reads."""
    where = urlsplit(address)
    connection = socket.create_connection((where.hostname or "", where.port or 0))
    data = json.dumps(body()).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
        "application/json\r\nContent-Length: "
    )
    connection.sendall(f"{head}{len(data)}\r\n\r\n".encode() + data)
    return connection


def test_a_client_that_goes_away_leaves_the_queue_and_asks_nothing_more() -> None:
    held, strong = Held(FACT), Sometimes(refined)
    strong.broken = False
    with serving(program(weak=held, strong=strong), limits={"concurrency": 1}) as address:
        first = asking(address)
        held.wait_until_asked()
        second = asking(address)
        until(lambda: counted(address, "cowest_waiting") == 1)
        second.close()
        until(lambda: counted(address, GONE) == 1)
        assert counted(address, "cowest_waiting") == 0
        first.close()
        until(lambda: counted(address, GONE) == 2)
        assert counted(address, "cowest_active") == 1, "the model that is being asked is waited for"
        held.go.set()
        until(lambda: counted(address, "cowest_active") == 0)
        assert strong.calls == 0 and post(address).status_code == 200 and strong.calls == 1


def test_a_body_that_is_too_long_is_refused_whether_it_says_so_or_not() -> None:
    with serving(limits={"body": 2000}) as address:
        assert post(address, body("x" * 3000)).status_code == 413
        chunks = (chunk for chunk in [b"x" * 1500] * 3)
        said = httpx.post(
            f"{address}/chat/completions",
            content=chunks,
            headers={"Content-Type": "application/json"},
        )
        assert said.status_code == 413 and said.json()["error"]["code"] == "body_too_long"
        assert post(address).status_code == 200


def test_with_a_key_only_who_has_it_is_answered_and_health_is_open() -> None:
    with serving(key="correct horse battery") as address:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Basic correct horse battery"},
        ):
            said = post(address, headers=headers)
            assert said.status_code == 401 and said.json()["error"]["code"] == "invalid_api_key", (
                headers
            )
        good = {"Authorization": "Bearer correct horse battery"}
        assert post(address, headers=good).status_code == 200
        assert httpx.get(f"{root(address)}/healthz").status_code == 200
        for path in ("/metrics", "/openapi.json", "/v1/models"):
            assert httpx.get(root(address) + path).status_code == 401
            assert httpx.get(root(address) + path, headers=good).status_code == 200
        with (
            pytest.raises(openai.AuthenticationError),
            openai.OpenAI(base_url=address, api_key="wrong") as client,
        ):
            client.models.list()


def test_without_a_key_another_name_for_this_machine_is_refused() -> None:
    with serving() as address:
        assert post(address, headers={"Host": "evil.example"}).status_code == 421
        for host in ("localhost:1", "127.0.0.1", "[::1]:8000"):
            assert post(address, headers={"Host": host}).status_code == 200


def test_the_draft_goes_out_before_the_strong_model_has_answered() -> None:
    held = Held("yes")
    with (
        serving(program(strong=held)) as address,
        openai.OpenAI(base_url=address, api_key="any", max_retries=0) as client,
    ):
        wish: Any = {"cowest": {"draft": True}}
        messages: Any = [{"role": "user", "content": QUESTION}]
        stream = iter(
            client.chat.completions.create(
                model="handbook", messages=messages, stream=True, extra_body=wish
            )
        )
        next(stream)
        assert next(stream).choices[0].delta.reasoning_content == FACT  # pyright: ignore[reportAttributeAccessIssue]
        held.go.set()
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "yes"


def test_in_python_an_answering_says_who_failed() -> None:
    answering = Answering(program(weak=failing), on_weak_failure="error")
    with pytest.raises(Unanswered, match="weak model") as error:
        answering.answer({"question": QUESTION})
    assert (error.value.role, error.value.kind) == ("weak", "error")
    with pytest.raises(ProgramError):
        Answering(Collaboration("question -> answer"))


def test_threads_that_serve_keep_no_history(monkeypatch: pytest.MonkeyPatch) -> None:
    made = program()
    with serving(made, limits={"concurrency": 2}) as address:
        for _ in range(5):
            post(address)
        assert (
            sum(thread.name.startswith("cowest-serve-model") for thread in threading.enumerate())
            <= 2
        )
    assert made.weak.history == [] and rules().limits.concurrency == 8
