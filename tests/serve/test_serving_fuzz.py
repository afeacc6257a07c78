"""Random bytes, broken HTTP and random JSON: the server answers in OpenAI's form, or closes the
connection, and logs no trace.

COWEST_FUZZ_SECONDS says for how long (10 by default), COWEST_FUZZ_SEED with what seed.
"""

from __future__ import annotations

import json
import logging
import os
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import h11
import pytest
from serving_parts import body, post, program, serving

from cowest_dspy.serve import server
from cowest_dspy.serve.chat import ChatRequest

SECONDS, SEED = (
    float(os.environ.get("COWEST_FUZZ_SECONDS", "10")),
    int(os.environ.get("COWEST_FUZZ_SEED", "0")),
)
CLIENTS = 8
PATHS = (
    "/v1/chat/completions",
    "/v1/models",
    "/healthz",
    "/metrics",
    "/openapi.json",
    "/",
    "*",
    "/%ff%00",
    "//x?y=z#",
    "http://[/",
)
METHODS = ("POST", "GET", "PUT", "OPTIONS", "CONNECT", "PRI", "x")
ODD_HEADERS = (
    "Expect: 100-continue",
    "Upgrade: websocket\r\nConnection: Upgrade",
    "Content-Length: 99999999999999999999",
    "Content-Length: -1",
    "Content-Length: \xb2",
    "Transfer-Encoding: gzip, chunked",
    "Content-Encoding: gzip",
    "Host: [",
    "Authorization: Bearer \xff",
    "Content-Type: text/plain; charset=\xe9",
    "X: " + "y" * 20_000,
    " folded",
)
ODD_VALUES = (
    None,
    True,
    0,
    -1,
    2**70,
    1e308,
    "",
    "\ud800",
    "\0",
    "9" * 5_000,
    [],
    {},
    [[]],
    {"": {}},
    "x" * 5_000,
)
ODD_TEXTS = (
    "[" * 50_000,
    "9" * 5_000,
    "NaN",
    "1e999",
    '"\\ud800"',
    "{",
    "\ufeff{}",
    '{"model": "handbook", "model": 1}',
)


def value(rng: random.Random, depth: int = 3) -> Any:
    """Random JSON."""
    kind = rng.randrange(6 if depth else 4)
    if kind < 4:
        return rng.choice(ODD_VALUES)
    if kind == 4:
        return [value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {
        rng.choice([*ChatRequest.model_fields, "role", "content", "x"]): value(rng, depth - 1)
        for _ in range(rng.randrange(4))
    }


def content(rng: random.Random) -> bytes:
    """A body: a chat request with random parts, some odd text, or noise."""
    kind = rng.randrange(10)
    if kind == 0:
        return rng.randbytes(rng.randrange(200))
    if kind == 1:
        return rng.choice(ODD_TEXTS).encode("utf-8", "surrogatepass")
    asked = body(stream=rng.random() < 0.3)
    if kind < 7:
        asked[rng.choice(list(ChatRequest.model_fields))] = value(rng)
    if kind < 4:
        asked["messages"] = [
            {"role": rng.choice(["user", "system", "x"]), "content": value(rng)}
            for _ in range(rng.randrange(3))
        ]
    return json.dumps(asked).encode()


def request(rng: random.Random) -> bytes:
    """A request that is HTTP, but for an odd header here and there."""
    usual = rng.random() < 0.7
    method, path = ("POST", PATHS[0]) if usual else (rng.choice(METHODS), rng.choice(PATHS))
    head = [
        f"{method} {path} HTTP/1.{rng.choice('1110')}",
        f"Host: {rng.choice(['localhost', '127.0.0.1:1', 'elsewhere.example'])}",
    ]
    head += ["Content-Type: application/json"] if rng.random() < 0.9 else []
    head += ["Connection: close"] if rng.random() < 0.8 else []
    head += [rng.choice(ODD_HEADERS)] if rng.random() < 0.2 else []
    data = content(rng)
    if rng.random() < 0.3:
        head.append("Transfer-Encoding: chunked")
        size = rng.randrange(1, 2_000)
        pieces = [data[place : place + size] for place in range(0, len(data), size)]
        data = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    else:
        head.append(
            "Content-Length: "
            f"{len(data) + (rng.choice([-1, 1, 1_000]) if rng.random() < 0.05 else 0)}"
        )
    return "\r\n".join(head).encode("latin-1") + b"\r\n\r\n" + data


def broken(rng: random.Random, data: bytes) -> bytes:
    """The same with some bytes changed, left out, repeated or put in."""
    made = bytearray(data)
    for _ in range(rng.randrange(1, 6)):
        place = rng.randrange(min(len(made), 300) + 1)
        kind, size = rng.randrange(4), rng.randrange(1, 20)
        if kind == 0:
            made[place : place + 1] = rng.randbytes(1)
        elif kind == 1:
            del made[place : place + size]
        elif kind == 2:
            made[place:place] = made[place : place + size]
        else:
            made[place:place] = rng.choice(
                [b"\r\n", b"\n", b"\0", b"\r\n\r\n", b":", b" ", b"\xff"]
            )
    return bytes(made)


def pieces(rng: random.Random) -> list[bytes]:
    """What one client sends, in up to four writes."""
    kind = rng.randrange(10)
    if kind == 0:
        data = rng.randbytes(rng.randrange(400))
    elif kind < 4:
        data = broken(rng, request(rng))
    else:
        data = b"".join(request(rng) for _ in range(1 if kind < 9 else 3))
    cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.choice([0, 0, 1, 3])))
    return [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def exchanged(where: tuple[str, int], sent: list[bytes], *, ends: bool) -> tuple[bytes, bool]:
    """What came until the server closed the connection, and whether an answer may be cut off: by a
    reset, or since this side ``ends``, which is how a client goes away."""
    received = b""
    with socket.create_connection(where, timeout=60) as connection:
        try:
            for piece in sent:
                connection.sendall(piece)
            if ends:
                connection.shutdown(socket.SHUT_WR)
            while more := connection.recv(65536):
                received += more
        except TimeoutError:
            pytest.fail(f"the connection stays open; sent {sent!r}, received {received[-500:]!r}")
        except OSError:
            return received, True
    return received, ends


def check(received: bytes, cut: bool) -> int:
    """Whether each answer is in OpenAI's form; the number of answers."""
    answers = 0
    while received:
        parser = h11.Connection(h11.CLIENT)
        parser.send(h11.Request(method="GET", target="/", headers=[("Host", "x")]))
        parser.send(h11.EndOfMessage())
        parser.receive_data(received)
        parser.receive_data(b"")
        try:
            events = list(iter(parser.next_event, h11.EndOfMessage()))
        except h11.RemoteProtocolError:
            assert cut, f"half an answer: {received[:500]!r}"
            return answers
        head = next(event for event in events if isinstance(event, h11.Response))
        check_answer(head, b"".join(event.data for event in events if isinstance(event, h11.Data)))
        answers, received = answers + 1, parser.trailing_data[0]
    return answers


def check_answer(head: h11.Response, text: bytes) -> None:
    """Whether one answer is as OpenAI's are, or one of the other paths'."""
    kind = dict(head.headers).get(b"content-type", b"").partition(b";")[0]
    assert head.status_code in (200, 400, 404, 405, 408, 413, 421, 504), (head.status_code, text)
    if kind == b"text/event-stream":
        assert text.endswith(b"data: [DONE]\n\n")
    elif head.status_code == 400 and kind == b"text/plain":
        pass  # Uvicorn's own, to what is no HTTP.
    elif head.status_code == 200:
        assert (
            kind == b"text/plain"
            or {"choices", "data", "status", "openapi"} & json.loads(text).keys()
        ), text
    else:
        assert set(json.loads(text)["error"]) == {"message", "type", "param", "code"}, text


def client(address: str, seed: int) -> tuple[int, int]:
    """One client after another until the time is over: how many there were, and how many answers
    they got."""
    where, rng, end = urlsplit(address), random.Random(seed), time.monotonic() + SECONDS
    clients = answers = 0
    while time.monotonic() < end:
        sent = pieces(rng)
        received, cut = exchanged(
            (where.hostname or "", where.port or 0), sent, ends=rng.random() < 0.5
        )
        try:
            answers += check(received, cut)
        except (AssertionError, ValueError, KeyError) as error:
            raise AssertionError(
                f"seed {seed}: {error}; sent {sent!r}, received {received!r}"
            ) from error
        clients += 1
    return clients, answers


def test_whatever_comes_gets_an_answer_in_openais_form_or_a_closed_connection(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "KEEP_ALIVE", 1)
    made = program(strong=lambda text: text[:40] or "no")
    with (
        serving(made, limits={"seconds": 1.0, "concurrency": 2 * CLIENTS}) as address,
        ThreadPoolExecutor(CLIENTS) as pool,
    ):
        found = list(
            pool.map(lambda number: client(address, SEED * 1_000 + number), range(CLIENTS))
        )
        assert post(address).status_code in (200, 504), "504: a busy machine"
    clients, answers = (sum(numbers) for numbers in zip(*found, strict=True))
    assert answers > clients / 4 > 0, (clients, answers)
    told = [
        record for record in caplog.records if record.levelno >= logging.ERROR or record.exc_info
    ]
    assert [record.getMessage() for record in told] == []
