"""A hostile server on loopback that answers chat completions in some hundred ways, from right to a
reset in a header; what it was asked, what it has billed and who never hung up is kept."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

KEY = "a-key-of-N0-known-shape"
TIMEOUT = 2.0
"""Seconds that clients give an attempt."""
HUNG_UP = 60.0
"""Seconds after which a client that has not closed a connection over its deadline never will."""
RESET, CLOSE, WAIT = "reset", "close", "wait until the client hangs up"
Piece = bytes | float | str
"""Bytes to send, seconds to wait, or an end of the connection; without one it is kept."""
Way = Callable[[str], Iterable[Piece]]


# What the server says


def chat(
    text: Any, *, choice: Any = None, usage: Any = None, reason: Any = "stop", **more: Any
) -> dict[str, Any]:
    """A chat completion with this text."""
    one = {"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": text}}
    counts = (
        {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10} if usage is None else usage
    )
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [choice or one],
        "usage": counts,
        **more,
    }


def head(*lines: str, status: str = "200 OK", version: str = "1.1") -> bytes:
    return "\r\n".join(
        [f"HTTP/{version} {status}", "Content-Type: application/json", *lines, "", ""]
    ).encode("latin-1")


def whole(value: Any, *lines: str, status: str = "200 OK") -> bytes:
    """A whole answer: JSON, or a body as it is."""
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return head(f"Content-Length: {len(body)}", *lines, status=status) + body


def dumped(text: str) -> bytes:
    return json.dumps(chat(text)).encode()


def trickled(data: bytes, pieces: int, seconds: float) -> Iterator[Piece]:
    size = -(-len(data) // pieces)
    for place in range(0, len(data), size):
        yield data[place : place + size]
        yield seconds


def endless(start: bytes, piece: bytes, seconds: float = 0.01) -> Iterator[Piece]:
    yield start
    while True:
        yield piece
        yield seconds


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def refusal(status: str, *lines: str, says: str = "busy") -> Way:
    return lambda _: [
        whole({"error": {"message": says, "type": "x", "code": None}}, *lines, status=status)
    ]


def counting(count: str) -> Way:
    """The right answer with this in the place of its counts of tokens."""
    usage = f'{{"prompt_tokens": {count}, "completion_tokens": {count}, "total_tokens": {count}}}'
    return lambda text: [
        whole(json.dumps(chat(text, usage="COUNTS")).replace('"COUNTS"', usage).encode())
    ]


def saying(make: Callable[[str], Any]) -> Way:
    return lambda text: [whole(make(text))]


RIGHT: dict[str, Way] = {
    "plain": saying(chat),
    "slow": lambda text: [0.2, whole(chat(text))],
    "trickled": lambda text: trickled(whole(chat(text)), 7, 0.02),
    "chunked": lambda text: [
        head("Transfer-Encoding: chunked"),
        *map(chunk, [dumped(text)[:9], dumped(text)[9:]]),
        b"0\r\n\r\n",
    ],
    "gzip": lambda text: [whole(gzip.compress(dumped(text)), "Content-Encoding: gzip")],
    "HTTP/1.0": lambda text: [head(version="1.0"), dumped(text), CLOSE],
    "without a length": lambda text: [head("Connection: close"), dumped(text), CLOSE],
    "more fields": saying(
        lambda text: chat(text, choices_too=[[]], system_fingerprint=None, x={"": []})
    ),
    "no usage": saying(
        lambda text: {key: value for key, value in chat(text).items() if key != "usage"}
    ),
    "counts of null": counting("null"),
    "an unknown finish_reason": saying(lambda text: chat(text, reason="eos_token")),
    "a header beyond ASCII": lambda text: [whole(chat(text), "X-Name: \xe9\xff")],
    "Retry-After of a success": lambda text: [whole(chat(text), "Retry-After: 3600")],
}
"""Right and whole answers within the deadline: paid for, and kept."""

COUNTS = (
    "1180591620717411303424",
    "-5",
    '"12"',
    "1.5",
    "NaN",
    "1e999",
    "[]",
    "true",
    '"\\ud800"',
    "9" * 5000,
)
ODD: dict[str, Way] = {
    # DSPy's transport, of kind "api", takes the 100 for the answer.
    "100 Continue first": lambda text: [b"HTTP/1.1 100 Continue\r\n\r\n", whole(chat(text))],
    "102 Processing, later the answer": lambda text: [
        b"HTTP/1.1 102 Processing\r\n\r\n",
        0.1,
        whole(chat(text)),
    ],
    **{f"counts of {count[:20]}": counting(count) for count in COUNTS},
    "usage is a list": saying(lambda text: chat(text, usage=[1])),
    "usage is a text": saying(lambda text: chat(text, usage="many")),
    "content is null": saying(lambda text: chat(None)),
    "content is empty": saying(lambda text: chat("")),
    "content is a list": saying(lambda text: chat([{"type": "text", "text": text}])),
    "content is a list of numbers": saying(lambda text: chat([1, None])),
    "content is a number": saying(lambda text: chat(3)),
    "content is an object": saying(lambda text: chat({"text": text})),
    "no content": saying(
        lambda text: chat(text, choice={"finish_reason": "stop", "message": {"role": "assistant"}})
    ),
    "finish_reason length": saying(lambda text: chat(text, reason="length")),
    "finish_reason content_filter": saying(lambda text: chat(text, reason="content_filter")),
    **{
        f"finish_reason {odd!r}": saying(lambda text, odd=odd: chat(text, reason=odd))
        for odd in (None, 3, [], {})
    },
    "no finish_reason": saying(
        lambda text: chat(text, choice={"message": {"role": "assistant", "content": text}})
    ),
    "an error beside": saying(lambda text: chat(text, error={"message": "no", "code": 500})),
    "a wrong charset": lambda text: [
        whole(chat(text), "Content-Type: application/json; charset=no-such-thing")
    ],
    "UTF-16": lambda text: [whole(json.dumps(chat(text)).encode("utf-16"))],
    "a byte order mark": lambda text: [whole(b"\xef\xbb\xbf" + dumped(text))],
    "no UTF-8": lambda text: [whole(dumped(text).replace(b'"1"', b'"\xff\xfe"'))],
    "a surrogate beside": saying(lambda text: chat(text, x="\ud800")),
    "duplicate keys": lambda text: [whole(b'{"choices": [], ' + dumped(text)[1:])],
    "NaN": lambda text: [whole(dumped(text).replace(b'"created": 1', b'"created": NaN'))],
    "1e999": lambda text: [whole(dumped(text).replace(b'"created": 1', b'"created": 1e999'))],
    "deep": lambda text: [
        whole(dumped(text).replace(b'"created": 1', b'"created": ' + b"[" * 50_000 + b"]" * 50_000))
    ],
    "many digits": lambda text: [
        whole(dumped(text).replace(b'"created": 1', b'"created": ' + b"9" * 5_000))
    ],
    "twenty choices": saying(lambda text: {**chat(text), "choices": chat(text)["choices"] * 20}),
    "a bomb": lambda text: [
        whole(gzip.compress(dumped(text) + b" " * 20 * 2**20), "Content-Encoding: gzip")
    ],
    "200 in other words": lambda text: [whole(chat(text), status="200 \xe9\xff")],
    "status -1": lambda text: [whole(chat(text), status="-1 Odd"), CLOSE],
    "201": lambda text: [whole(chat(text), status="201 Created")],
    "two lengths": lambda text: [whole(chat(text), "Content-Length: 3"), CLOSE],
    "a large header": lambda text: [whole(chat(text), "X: " + "y" * 100_000), CLOSE],
    "many headers": lambda text: [whole(chat(text), *["X: y"] * 5_000), CLOSE],
    "a header without a name": lambda text: [whole(chat(text), ": x", "no colon"), CLOSE],
}
"""Answers that can be read in more than one way: as the right text, as none, or not at all."""

AFTER = (
    "0",
    "3600",
    "Fri, 01 Jan 2099 00:00:00 GMT",
    "soon",
    "-1",
    "nan",
    "1e400",
    "9" * 5_000,
    "Fri, 99 Foo 2099",
    "\xb2",
)
WRONG: dict[str, Way] = {
    **{
        f"{status[:3]} after {after[:20]}": refusal(status, f"Retry-After: {after}")
        for status, after in zip(
            itertools.cycle(["429 Too Many Requests", "503 Busy", "500 Error"]), AFTER, strict=False
        )
    },
    "401 with the key": refusal("401 Unauthorized", f"X-Key: {KEY}", says=f"wrong key: {KEY}"),
    "400 with the key": refusal("400 Bad", says=f"Bearer {KEY} is no key"),
    "500 with the key": refusal("500 Error", says=f'{{"authorization": "{KEY}"}}'),
    "429 with no JSON": lambda _: [
        whole(b"<html>" + KEY.encode() + b"</html>", status="429 Too Many Requests")
    ],
    "500 with deep JSON": lambda _: [whole(b"[" * 50_000, status="500 Error")],
    "500 with odd JSON": lambda _: [
        whole(b'{"error": {"message": ["\\ud800", 1e999]}}', status="500 Error")
    ],
    "500 with a list": lambda _: [whole([None], status="500 Error")],
    "404": lambda _: [whole(b"", status="404 Not Found")],
    "a redirect": lambda _: [
        whole(b"", "Location: /v1/chat/completions", status="307 Temporary Redirect")
    ],
    "a redirect for good": lambda _: [whole(b"", "Location: chat/completions", status="301 Moved")],
    "204": lambda _: [head(status="204 No Content")],
    "101": lambda _: [
        head("Upgrade: websocket", "Connection: Upgrade", status="101 Switching Protocols"),
        CLOSE,
    ],
    "status 999": lambda text: [whole(chat(text), status="999 Odd"), CLOSE],
    "no HTTP": lambda _: [b"SSH-2.0-OpenSSH_9\r\n", CLOSE],
    "noise": lambda text: [random.Random(text).randbytes(500), CLOSE],
    "nothing": lambda _: [whole(b"")],
    "HTML": lambda _: [whole(b"<html>It works</html>")],
    **{
        f"JSON {value}": saying(lambda _, value=value: value)
        for value in (None, [], {}, 3, "text", [{}])
    },
    **{
        f"choices {value}": saying(lambda text, value=value: {**chat(text), "choices": value})
        for value in (None, [], {}, "x", 3)
    },
    **{
        f"choice {value}": saying(lambda text, value=value: {**chat(text), "choices": [value]})
        for value in (None, [], {}, "x")
    },
    **{
        f"message {v}": saying(
            lambda text, v=v: chat(text, choice={"finish_reason": "stop", "message": v})
        )
        for v in (None, [], 3)
    },
    "half of a surrogate pair": saying(lambda text: chat(f"{text} \ud800")),
    "no such inflation": lambda text: [whole(dumped(text), "Content-Encoding: gzip")],
    "half of an inflation": lambda text: [
        whole(gzip.compress(dumped(text))[:-20], "Content-Encoding: gzip")
    ],
    "cut": lambda text: [whole(chat(text))[:-9], CLOSE],
    "cut in a chunk": lambda text: [
        head("Transfer-Encoding: chunked"),
        chunk(dumped(text))[:-9],
        CLOSE,
    ],
    "no last chunk": lambda text: [
        head("Transfer-Encoding: chunked"),
        chunk(dumped(text)[:-1]),
        CLOSE,
    ],
    "a chunk of no size": lambda text: [
        head("Transfer-Encoding: chunked"),
        b"zz\r\n",
        dumped(text),
        CLOSE,
    ],
    "a chunk of 2^70": lambda text: [
        head("Transfer-Encoding: chunked"),
        b"%x\r\n" % 2**70,
        dumped(text),
        CLOSE,
    ],
    "too short a length": lambda text: [
        head(f"Content-Length: {len(dumped(text)) - 5}"),
        dumped(text),
        CLOSE,
    ],
    "too large a length": lambda text: [
        head(f"Content-Length: {len(dumped(text)) + 5}"),
        dumped(text),
        CLOSE,
    ],
    "a length of 2^70": lambda text: [head(f"Content-Length: {2**70}"), dumped(text), CLOSE],
    "closed": lambda _: [CLOSE],
    "reset": lambda _: [RESET],
    "reset in the status": lambda _: [b"HTTP/1.1 2", RESET],
    "reset in a header": lambda _: [b"HTTP/1.1 200 OK\r\nContent-Le", RESET],
    "reset after the headers": lambda _: [head("Content-Length: 500"), 0.05, RESET],
    "reset in the body": lambda text: [whole(chat(text))[:-9], 0.05, RESET],
    "silence": lambda _: [WAIT],
    "too slow": lambda text: [TIMEOUT + 0.5, whole(chat(text))],
    "trickled for ever": lambda text: endless(head("Content-Length: 100000"), b" ", 0.05),
    "headers for ever": lambda _: endless(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n", 0.05),
    "100 Continue for ever": lambda _: endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.05),
    "no end": lambda text: endless(head(), b" " * 2**16),
    "chunks for ever": lambda _: endless(
        head("Transfer-Encoding: chunked"), chunk(b'{"a": "' + b"x" * 2**16)
    ),
    "half, then silence": lambda text: [whole(chat(text))[:-9], WAIT],
}
"""No answers: each is a failure of the call that got it."""

WAYS = {**RIGHT, **ODD, **WRONG}
SILENT = (
    "silence",
    "too slow",
    "trickled for ever",
    "headers for ever",
    "100 Continue for ever",
    "half, then silence",
)
"""Ways that end at the client's deadline."""
Name = str


def identity(asked: Any) -> str:
    """Of a request, as it was sent or as a store keeps it: what it is about."""
    seed = asked.get("seed", asked.get("config", {}).get("seed"))
    return json.dumps([asked["model"].split("/")[-1], asked["messages"], seed], sort_keys=True)


def right_text(asked: Any) -> str:
    """What a good model says. The weak one names the number of its question for some seeds; the
    strong one says what it reads."""
    last = asked["messages"][-1]["content"]
    if "weak" in asked["model"]:
        number = re.findall(r"\d+", last)[-1]
        return [number, f"x{number}", "I do not know"][drawn("draft", identity(asked)) % 3]
    return next(
        (
            line.removeprefix("Background: ")
            for line in last.splitlines()
            if line.startswith("Background: ")
        ),
        "none",
    )


def drawn(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")


class Endpoint:
    """The server. ``choose`` says in what way it answers a request, given how often it came before.

    ``billed``: what it has answered rightly, wholly and well within the deadline. ``given``: every
        text that its answers to a request can be read as. ``hanging``: ways after which nobody hung
        up. ``most``: the most bytes that one answer took.
    """

    def __init__(
        self, choose: Callable[[Any, int], Name], say: Callable[[Any], str] = right_text
    ) -> None:
        self.choose, self.say = choose, say
        self.asked, self.ways, self.billed = Counter[str](), Counter[Name](), set[str]()
        self.given: dict[str, set[str]] = {}
        self.hanging: list[Name] = []
        self.most = 0
        self._lock, self._open, self._threads = (
            threading.Lock(),
            set[socket.socket](),
            list[threading.Thread](),
        )
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=200)
        self.address = f"http://127.0.0.1:{self._listening.getsockname()[1]}/v1"

    def run(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listening.accept()
                with self._lock:
                    self._open.add(connection)
                self._threads.append(
                    threading.Thread(target=self._serve, args=(connection,), daemon=True)
                )
                self._threads[-1].start()

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        with self._lock:
            for connection in self._open:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(HUNG_UP)

    def _serve(self, connection: socket.socket) -> None:
        try:
            connection.settimeout(HUNG_UP)
            with connection, suppress(OSError), connection.makefile("rb") as reading:
                while self._answer(connection, reading):
                    pass
        finally:
            with self._lock:
                self._open.discard(connection)

    def _answer(self, connection: socket.socket, reading: Any) -> bool:
        """One request and its answer; whether another may come."""
        lines = list(iter(reading.readline, b"\r\n")) if reading.peek(1) else []
        if not lines:
            return False
        started = time.monotonic()
        fields = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(b":") for line in lines)
        }
        asked = json.loads(reading.read(int(fields[b"content-length"])))
        assert fields[b"authorization"] == b"Bearer " + KEY.encode()
        with self._lock:
            way = self.choose(asked, self.asked[identity(asked)])
            self.asked[identity(asked)] += 1
            self.ways[way] += 1
            text = self.say(asked)
            if way not in WRONG:
                self.given.setdefault(identity(asked), set()).update(
                    {text, ""} if way in ODD else {text}
                )
        try:
            kept = self._send(connection, WAYS[way](text), started)
        except TimeoutError:
            kept = False
        except OSError:  # The client has hung up.
            return False
        if time.monotonic() - started > HUNG_UP - 1:
            self.hanging.append(way)
        with self._lock:
            if way in RIGHT and time.monotonic() - started < TIMEOUT / 2:
                self.billed.add(identity(asked))
        return kept

    def _send(self, connection: socket.socket, pieces: Iterable[Piece], started: float) -> bool:
        sent = 0
        for piece in pieces:
            if isinstance(piece, bytes):
                connection.sendall(piece)
                sent += len(piece)
                self.most = max(self.most, sent)
            elif isinstance(piece, float):
                time.sleep(piece)
            elif piece == WAIT:
                connection.recv(1)
                return False
            else:
                if piece == RESET:
                    connection.setsockopt(
                        socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                    )
                else:
                    connection.shutdown(socket.SHUT_WR)
                return False
            if time.monotonic() - started > HUNG_UP:
                return False
        return True


@contextmanager
def endpoint(
    choose: Callable[[Any, int], Name], say: Callable[[Any], str] = right_text
) -> Iterator[Endpoint]:
    """A server that runs inside this context."""
    server = Endpoint(choose, say)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.close()
        thread.join(HUNG_UP)
