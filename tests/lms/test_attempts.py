"""One attempt over the network, of a hosted model and of a server alike: it ends within its
deadline whatever the server does, and no stop ends it before: what was paid for is kept and booked.
"""

from __future__ import annotations

import email.utils
import itertools
import json
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.utils.exceptions import LMError
from local_server import CHAT, Said, completion, local_server
from scripted import match, questions, weak_that_varies

from cowest_dspy import Budget, Collaboration, Sampling, Store, build_lm, collect
from cowest_dspy.errors import BudgetError
from cowest_dspy.lms import protocol
from cowest_dspy.lms.config import Api, Server
from cowest_dspy.store.call_context import keeping, stoppable
from cowest_dspy.store.record import failure, recorded

KINDS = ["api", "server"]


@pytest.fixture(autouse=True)
def _key_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COWEST_TEST_KEY", "correct horse battery staple")
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "true")


def lm_of(kind: str, address: str, **more: Any) -> dspy.LM:
    """The LM that a TOML gives for this address."""
    values: dict[str, Any] = {
        "kind": kind,
        "api_base": address,
        "api_key_env": "COWEST_TEST_KEY",
        "num_retries": 0,
        **more,
    }
    values["model"] = "openai/m" if kind == "api" else "m"
    return build_lm(Api.model_validate(values) if kind == "api" else Server.model_validate(values))


# The deadline


class Raw:
    """A server that writes what ``pieces`` gives, piece by piece, to everyone that connects;
    ``gone`` is set when a client that did not get all of it has hung up."""

    def __init__(self, pieces: Callable[[], Iterator[bytes]]) -> None:
        self._pieces, self.gone, self.sent = pieces, threading.Event(), 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listening.getsockname()[1]}/v1"

    def __enter__(self) -> Raw:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listening.accept()
                threading.Thread(target=self._write, args=(connection,), daemon=True).start()

    def _write(self, connection: socket.socket) -> None:
        with connection:
            connection.recv(65536)
            try:
                for piece in self._pieces():
                    connection.sendall(piece)
                    self.sent += len(piece)
            except OSError:
                self.gone.set()


def trickling_headers() -> Iterator[bytes]:
    yield b"HTTP/1.1 200 OK\r\n"
    for number in itertools.count():
        time.sleep(0.05)
        yield f"X-{number}: 1\r\n".encode()


def trickling_body() -> Iterator[bytes]:
    yield b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n"
    while True:
        time.sleep(0.05)
        yield b" "


def silence() -> Iterator[bytes]:
    time.sleep(4)
    while True:
        yield b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pieces", [trickling_headers, trickling_body, silence])
def test_an_attempt_ends_at_its_deadline_and_its_connection_is_closed(
    kind: str, pieces: Callable[[], Iterator[bytes]]
) -> None:
    with Raw(pieces) as server:
        with pytest.raises(LMError) as caught:
            lm_of(kind, server.address, timeout=1.5)("Ready?")
        assert failure(caught.value).startswith("timeout:"), caught.value
        assert server.gone.wait(20), "nobody reads on after the deadline"


@pytest.mark.parametrize("kind", KINDS)
def test_the_look_up_of_an_address_counts_to_the_deadline(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go = threading.Event()

    def slow(*_: Any, **__: Any) -> Any:
        let_go.wait(60)
        raise OSError("not found")

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    try:
        with pytest.raises(LMError) as caught:
            lm_of(kind, "http://somewhere.invalid/v1", timeout=0.3)("Ready?")
        assert failure(caught.value).startswith("timeout:")
    finally:
        let_go.set()


def test_a_body_without_end_is_cut_at_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "LARGEST_BODY", 2**20)

    def endless() -> Iterator[bytes]:
        yield b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n"
        while True:
            yield b" " * 65536

    with Raw(endless) as server:
        with pytest.raises(LMError, match="longer than 1048576 bytes") as caught:
            lm_of("server", server.address, timeout=60)("Ready?")
        assert failure(caught.value).startswith("transport:")
        assert server.gone.wait(20) and server.sent < 64 * 2**20


FAR = email.utils.formatdate(4_070_908_800, usegmt=True)


@pytest.mark.parametrize(
    ("kind", "after", "noted"),
    [
        ("api", FAR, False),
        ("server", "3600", False),
        ("server", FAR, True),
        ("server", "1e308", True),
    ],
)
def test_a_server_that_asks_for_a_long_wait_gets_the_timeout_at_most(
    kind: str, after: str, noted: bool
) -> None:
    said = iter(
        [Said({"error": {"message": "busy"}}, 503, {"retry-after": after}), completion("at last")]
    )
    with local_server({CHAT: lambda _: next(said)}) as server:
        lm = lm_of(kind, f"{server.url}/v1", timeout=2, num_retries=1)
        began = time.monotonic()
        assert (recorded(lm) if noted else lm)("Ready?") == ["at last"]
    assert time.monotonic() - began < 60


# A stop


def said_slowly(server: list[str], seconds: float = 0.3) -> Callable[[Any], Said]:
    """A route that takes its time for each answer, and counts what it has billed."""
    counting = threading.Lock()

    def answer(body: Any) -> Said:
        time.sleep(seconds)
        with counting:
            server.append(str(body["messages"]))
        return completion("yes")

    return answer


def strong_calls(folder: Path) -> list[tuple[str, float]]:
    """Of every answer of the strong model that the store has: what was asked, and what it cost."""
    with closing(sqlite3.connect(folder / "run.sqlite")) as db:
        query = "SELECT request, usd FROM calls WHERE model NOT LIKE 'scripted/%'"
        return [(request, usd) for request, usd in db.execute(query)]


@contextmanager
def collecting(
    kind: str, folder: Path, billed: list[str], budget: Budget | None = None
) -> Iterator[Callable[..., Any]]:
    """A function that collects in the run of this folder, with a strong model that is asked over
    HTTP, and takes its time."""
    with local_server({CHAT: said_slowly(billed)}) as server:
        # 3 generated tokens: USD 0.03 for each answer.
        price = {"price": {"input": 0.0, "output": 10_000.0}} if kind == "api" else {}
        lm = lm_of(kind, f"{server.url}/v1", **price)

        def run(**more: Any) -> Any:
            program = Collaboration("question -> answer").bind(
                weak=weak_that_varies(["{n}", "x"]).lm(), strong=lm
            )
            with Store(folder, budget=budget, strong=lm.model) as store:
                return collect(
                    program,
                    questions(6),
                    match,
                    Sampling(drafts=2),
                    store=store,
                    num_threads=6,
                    **more,
                )

        yield run


@pytest.mark.parametrize("kind", KINDS)
def test_an_interruption_keeps_and_books_every_answer_that_is_under_way(
    kind: str, tmp_path: Path
) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    billed: list[str] = []
    with collecting(kind, tmp_path, billed) as run:
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                run(on_progress=interrupt)
            assert len(strong_calls(tmp_path)) == len(billed), "billed is kept"
        traces = run()
    assert len(billed) == len(set(billed)) == 6 * 3, "nothing was asked twice"
    assert all(trace.error is None for trace in traces)
    with Store(tmp_path) as store:
        assert store.bill().usd == pytest.approx(0.03 * len(billed) if kind == "api" else 0.0), (
            "billed is booked"
        )
        assert store.bill().tokens >= 10 * len(billed)


@pytest.mark.parametrize(
    ("kind", "budget"), [("api", {"usd": 0.1}), ("server", {"strong_calls": 9})]
)
def test_a_budget_that_is_reached_keeps_and_books_every_answer_that_is_under_way(
    kind: str, budget: dict[str, Any], tmp_path: Path
) -> None:
    billed: list[str] = []
    with collecting(kind, tmp_path, billed, Budget.model_validate(budget)) as run:
        for _ in range(2):
            with pytest.raises(BudgetError):
                run()
    found = strong_calls(tmp_path)
    assert len(found) == len(billed) == len(set(billed)) > 0
    with Store(tmp_path) as store:
        assert store.bill().usd == pytest.approx(sum(usd for _, usd in found)) and store.bill(
            "openai/m"
        ).strong_calls in (
            0,
            len(billed),
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_ends_what_waits_and_not_what_is_under_way(kind: str, tmp_path: Path) -> None:
    """One answer is under way, one is to be tried again, one waits for its turn: only the first
    comes, and nothing more is sent."""
    arrived, refused, let_go = threading.Event(), threading.Event(), threading.Event()

    def answer(body: Any) -> Said:
        if "refused" in str(body):
            refused.set()
            return Said({"error": {"message": "busy"}}, 503, {"retry-after": "60"})
        arrived.set()
        let_go.wait(60)
        return completion("paid for")

    outcomes: dict[str, Any] = {}
    with local_server({CHAT: answer}) as server, Store(tmp_path) as store:
        more: dict[str, Any] = {"timeout": 120.0, "num_retries": 3}
        one = recorded(
            lm_of(
                kind, f"{server.url}/v1", **more, **({"concurrency": 1} if kind == "server" else {})
            )
        )
        other = recorded(lm_of(kind, f"{server.url.replace('127.0.0.1', 'localhost')}/v1", **more))

        def ask(lm: dspy.LM, question: str) -> None:
            try:
                outcomes[question] = lm(question)
            except BaseException as error:
                outcomes[question] = error

        def work() -> None:
            import contextvars

            with keeping(store), stoppable():
                for lm, question in ((one, "under way"), (other, "refused"), (one, "waits")):
                    if kind == "api" and question == "waits":
                        continue
                    threads.append(
                        threading.Thread(
                            target=contextvars.copy_context().run, args=(ask, lm, question)
                        )
                    )
                    threads[-1].start()
                    assert (arrived if question == "under way" else refused).wait(20)
                time.sleep(0.2)
                raise KeyboardInterrupt

        threads: list[threading.Thread] = []
        with pytest.raises(KeyboardInterrupt):
            work()
        threads[1].join(20)
        assert isinstance(outcomes["refused"], KeyboardInterrupt) and threads[0].is_alive()
        let_go.set()
        for thread in threads:
            thread.join(20)
        assert outcomes["under way"] == ["paid for"] and store.calls() == 1
        assert isinstance(outcomes.get("waits", KeyboardInterrupt()), KeyboardInterrupt)
        assert len(server.asked) == 2


# An answer that is none

NONE = [
    {"choices": []},
    {},
    {"choices": None},
    {"choices": [{}]},
    {"choices": [{"finish_reason": "stop", "message": {"content": 3}}]},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("body", NONE, ids=str)
def test_a_body_without_an_answer_is_a_failure_that_passes(
    kind: str, body: dict[str, Any], tmp_path: Path
) -> None:
    head = {"id": "1", "object": "chat.completion", "model": "m"}
    said = iter([Said(head | body), Said(head | body), completion("at last")])
    with (
        local_server({CHAT: lambda _: next(said)}) as server,
        Store(tmp_path) as store,
        keeping(store),
    ):
        lm = recorded(lm_of(kind, f"{server.url}/v1"))
        with pytest.raises(LMError) as caught:
            lm("Ready?")
        assert failure(caught.value).startswith("server:") and store.calls() == 0
        again = recorded(lm_of(kind, f"{server.url}/v1", num_retries=1))
        assert again("Ready?") == ["at last"]


@pytest.mark.parametrize("cache", [False, True])
def test_an_lm_of_ones_own_keeps_no_body_without_an_answer_either(
    cache: bool, tmp_path: Path
) -> None:
    said = iter(
        [
            Said({"id": "1", "object": "chat.completion", "model": "m", "choices": []}),
            completion("at last"),
        ]
    )
    with (
        local_server({CHAT: lambda _: next(said)}) as server,
        Store(tmp_path) as store,
        keeping(store),
    ):
        lm = recorded(
            dspy.LM(
                "openai/m", api_base=f"{server.url}/v1", api_key="none", cache=cache, num_retries=1
            )
        )
        assert lm(f"Ready? {cache}") == ["at last"] and store.calls() == 1


def whole(text: str) -> bytes:
    body = json.dumps(
        {"choices": [{"finish_reason": "stop", "message": {"role": "assistant", "content": text}}]}
    ).encode()
    return (
        b"HTTP/1.1 200 OK\r\nX-Name: \xe9\r\nContent-Type: application/json\r\nContent-Length: "
        b"%d\r\n\r\n"
    ) % len(body) + body


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_that_comes_after_an_interim_one_is_never_that_to_another_question(
    kind: str,
) -> None:
    came = threading.Event()

    def serve() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=answer, args=(listening.accept()[0],), daemon=True).start()

    def answer(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            while asked := connection.recv(65536):
                while b"first" not in asked and b"second" not in asked:
                    asked += connection.recv(65536)
                if b"first" in asked:
                    connection.sendall(b"HTTP/1.1 102 Processing\r\n\r\n")
                    time.sleep(0.2)
                connection.sendall(whole("first" if b"first" in asked else "second"))
                came.set()

    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        threading.Thread(target=serve, daemon=True).start()
        lm = lm_of(kind, f"http://127.0.0.1:{listening.getsockname()[1]}/v1", timeout=20.0)
        with suppress(LMError):
            assert lm("The first?") == ["first"]
        assert came.wait(20)
        time.sleep(0.1)
        assert lm("The second?") == ["second"]
        assert lm("And again the second?") == ["second"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "part",
    [
        '"x": [' + "[" * 50_000 + "]" * 50_000 + "]",
        '"usage": {"prompt_tokens": 1e999}',
        '"usage": [1]',
    ],
)
def test_a_body_that_cannot_be_read_is_a_failure_that_passes(kind: str, part: str) -> None:
    choice = '{"finish_reason": "stop", "message": {"role": "assistant", "content": "yes"}}'
    said = iter([Said(f'{{"choices": [{choice}], {part}}}'), completion("at last")])
    with local_server({CHAT: lambda _: next(said)}) as server:
        assert lm_of(kind, f"{server.url}/v1", num_retries=1)("Ready?") == ["at last"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_answer_is_an_answer(kind: str) -> None:
    with local_server({CHAT: lambda _: completion("")}) as server:
        assert lm_of(kind, f"{server.url}/v1")("Ready?") == [""]
