"""Clients that open connections and do not do their part: silent, slow, without end, or with what
is no HTTP."""

from __future__ import annotations

import json
import logging
import resource
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from live_task import SCRIPTED, until, written
from served_process import running
from serving_parts import Held, body, post, program, root, serving

CHAT = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
)
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
needs_prlimit = pytest.mark.skipif(
    not hasattr(resource, "prlimit"), reason="needs prlimit, which Linux has"
)


def asking(**more: Any) -> bytes:
    """A whole request."""
    data = json.dumps(body(**more)).encode()
    return CHAT + f"Content-Length: {len(data)}\r\n\r\n".encode() + data


WHOLE, DATA = asking(), json.dumps(body()).encode()


def connect(address: str, sent: bytes = b"", *, buffer: int | None = None) -> socket.socket:
    """A connection over which so much was sent. ``buffer``: bytes that this side takes before it is
    read."""
    where, made = urlsplit(address), socket.socket()
    if buffer is not None:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    made.settimeout(30)
    made.connect((where.hostname or "", where.port or 0))
    made.sendall(sent)
    return made


@contextmanager
def silent(address: str, count: int) -> Iterator[list[socket.socket]]:
    """So many connections over which nothing is sent."""
    with ExitStack() as stack:
        yield [stack.enter_context(connect(address)) for _ in range(count)]


def drained(connection: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    received = b""
    try:
        while piece := connection.recv(65536):
            received += piece
    except ConnectionResetError:
        pass
    return received


def trickled(connection: socket.socket, piece: bytes) -> bytes:
    """What comes until the server closes the connection, over which a piece is sent again and
    again."""
    end, received = time.monotonic() + 30, b""
    connection.settimeout(0.05)
    try:
        while time.monotonic() < end:
            connection.sendall(piece)
            try:
                more = connection.recv(65536)
            except TimeoutError:
                continue
            if not more:
                return received
            received += more
    except ConnectionError:
        return received
    pytest.fail(f"the server is still taking bytes, and has said {received!r}")


def get(address: str, path: str = "/healthz") -> httpx.Response:
    """An answer without a key."""
    return httpx.get(root(address) + path, timeout=60)


def code_of(received: bytes) -> str:
    """The code of the error in an HTTP answer."""
    return json.loads(received.partition(b"\r\n\r\n")[2])["error"]["code"]


@needs_prlimit
def test_silent_connections_are_closed_and_fill_no_log(tmp_path: Path) -> None:
    limits = "[serve.limits]\nseconds = 2.0\n"
    written(tmp_path, latency=0.0, more=f"{SCRIPTED}\n[serve]\nport = 0\n{limits}")
    with (
        running(tmp_path, "task.toml", files=96) as (process, address, _),
        httpx.Client(timeout=60) as before,
    ):
        health = f"{root(address)}/healthz"
        assert before.get(health).status_code == 200
        with silent(address, 300):
            assert before.get(health).status_code == 200, "who was there before is answered"
            assert get(address).status_code == 200, "who comes later is answered, too"
        process.terminate()
        _, _, log = ended(process)
    assert len(log) < 5_000 and "Traceback" not in log, log[:5_000]


@needs_prlimit
def test_without_a_file_descriptor_left_accepting_waits_and_says_so_once(tmp_path: Path) -> None:
    written(tmp_path, latency=0.0, more=f"{SCRIPTED}\n[serve]\nport = 0\n")
    with running(tmp_path, "task.toml") as (process, address, _):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert get(address).status_code == 200
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (4, hard))
        with silent(address, 20), ThreadPoolExecutor() as pool:
            answer = pool.submit(get, address)
            time.sleep(0.5)
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (soft, hard))
            assert answer.result().status_code == 200
        process.terminate()
        _, _, log = ended(process)
    assert log.count("ulimit -n") == 1 and len(log) < 2_000 and "Traceback" not in log, log[:5_000]


def ended(process: Any) -> tuple[int, str, str]:
    out, error = process.communicate(timeout=60)
    return process.returncode, out, error


def test_a_head_that_is_not_whole_in_time_is_closed_even_if_it_trickles() -> None:
    with (
        serving(limits={"seconds": 1.0}) as address,
        ThreadPoolExecutor() as pool,
        ExitStack() as stack,
    ):
        parts = [
            stack.enter_context(connect(address, sent))
            for sent in (b"", b"GET /heal", HEALTH[:-2], HEALTH[:-2])
        ]
        received = [*pool.map(drained, parts[:-1]), trickled(parts[-1], b"x")]
        assert received == [b""] * 4
        assert get(address).status_code == 200


def test_a_body_that_is_not_whole_in_time_is_refused_even_if_it_trickles() -> None:
    chunked = CHAT + b"Transfer-Encoding: chunked\r\n\r\n"
    with (
        serving(limits={"seconds": 1.0}) as address,
        ThreadPoolExecutor() as pool,
        ExitStack() as stack,
    ):
        halves = [
            stack.enter_context(connect(address, sent))
            for sent in (WHOLE[:-5], chunked + b"5\r\nab")
        ]
        slow = [
            stack.enter_context(connect(address, sent)) for sent in (WHOLE[: -len(DATA)], chunked)
        ]
        trickles = pool.map(trickled, slow, (b"{", b"1\r\n \r\n"))
        assert [code_of(received) for received in pool.map(drained, halves)] == [
            "body_too_late"
        ] * 2
        assert [b"HTTP/1.1 408" in received for received in trickles] == [True, True]


def test_a_refusal_before_the_whole_body_is_not_lost() -> None:
    with serving(limits={"body": 2_000}) as address:
        for _ in range(2):
            refused = httpx.post(
                f"{address}/chat/completions", content=b"x" * 1_000_000, timeout=60
            )
            assert refused.status_code == 413 and refused.json()["error"]["code"] == "body_too_long"
        assert post(address).status_code == 200


def test_more_connections_than_may_be_open_are_refused() -> None:
    held = Held()
    with (
        serving(program(weak=held), limits={"concurrency": 3, "connections": 3}) as address,
        ThreadPoolExecutor() as pool,
    ):
        waiting = [pool.submit(post, address) for _ in range(3)]
        held.wait_until_asked(3)
        assert get(address).status_code == 503
        held.go.set()
        assert [one.result().status_code for one in waiting] == [200] * 3
        until(lambda: get(address).status_code == 200)


def test_requests_that_come_at_once_are_answered_one_by_one() -> None:
    with (
        serving() as address,
        connect(
            address, WHOLE * 3 + HEALTH.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
        ) as made,
    ):
        received = drained(made)
    assert received.count(b"HTTP/1.1 200") == 4 and received.count(b'"finish_reason":"stop"') == 3


def test_what_is_no_http_is_an_error_and_no_trace_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    elsewhere = (
        CHAT.replace(b"localhost", b"elsewhere.example") + b"Transfer-Encoding: chunked\r\n\r\n"
    )
    with serving() as address:
        for sent in (
            b"hello\r\n\r\n",
            b"\x16\x03\x01\x02\x00",
            b"GET / HTTP/1.1\r\n\r\n",
            HEALTH[:-2] + b"X: y" * 20_000,
        ):
            with connect(address, sent) as connection:
                assert b"HTTP/1.1 400" in drained(connection), sent[:40]
        with connect(address, elsewhere) as connection:
            received = b""
            while b"wrong_host" not in received:
                received += connection.recv(65536)
            connection.sendall(b"zz\r\n")
            assert b"HTTP/1.1" not in drained(connection), "it was answered already"
        assert get(address).status_code == 200
    assert [
        record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR
    ] == []
