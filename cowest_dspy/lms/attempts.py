"""One attempt at a model over a network: it ends within one deadline whatever the server does, and
a stop does not end it before.

    response = within(120.0, lambda: lm.acall(request))      # blocks, in any thread

Attempts run on one event loop, in a thread of its own. At its deadline an attempt is cancelled
wherever it is (the look-up of the address, connecting, headers that trickle, a body without end),
and its connection is closed. What is under way may be paid for: a stop ends only what waits for its
turn or for another try (limits.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
import weakref
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

T = TypeVar("T")

LARGEST_BODY = 64 * 2**20
"""Bytes of an answer, uncompressed. The longest answers with log-probabilities of all their tokens
stay below."""
GRACE = 5.0
"""Seconds in which an attempt that was cancelled must have ended; after them nobody waits for it
any more."""
# Addresses are looked up in threads, and some look-ups hang: as many may do so as attempts are
# commonly under way.
_LOOK_UPS = 64
_OF_THE_TRANSFER = (b"content-encoding", b"content-length", b"transfer-encoding")


def within(seconds: float, attempt: Callable[[], Awaitable[T]]) -> T:
    """What ``attempt()`` gives, awaited under the caller's context; this thread waits for it.

    Raises:
        TimeoutError: it has not ended within so many seconds, and was cancelled.
        BaseException: its own.
    """
    return _on_loop(_ended(attempt, seconds), seconds)


async def _ended(attempt: Callable[[], Awaitable[T]], seconds: float) -> T:
    async with asyncio.timeout(seconds):
        return await attempt()


def _on_loop(coroutine: Any, seconds: float) -> Any:
    future = asyncio.run_coroutine_threadsafe(coroutine, _loop())
    try:
        return future.result(max(seconds, 0.0) + GRACE)
    finally:
        future.cancel()  # Of one that has ended: nothing.


_loops: dict[int, asyncio.AbstractEventLoop] = {}
_loops_lock = threading.Lock()


def _loop() -> asyncio.AbstractEventLoop:
    """The process's loop; a fork has none of its parent's threads, and makes its own."""
    with _loops_lock:
        loop = _loops.get(os.getpid())
        if loop is None:
            loop = _loops[os.getpid()] = asyncio.new_event_loop()
            loop.set_default_executor(ThreadPoolExecutor(_LOOK_UPS, "cowest-look-up"))
            threading.Thread(target=loop.run_forever, name="cowest-http", daemon=True).start()
        return loop


class Http:
    """An HTTP client for attempts, with connections that are kept. Thread-safe; a forked process
    has connections of its own.

    Args:
        options: of ``httpx.AsyncClient``, less its timeouts.
    """

    def __init__(self, **options: Any) -> None:
        self._options, self._lock = options, threading.Lock()
        self._client: tuple[asyncio.AbstractEventLoop, httpx.AsyncClient] | None = None
        self._closed = False

    def exchange(self, seconds: float) -> Exchange:
        """The requests of one attempt that begins now: together they end within so many seconds.

        Raises:
            RuntimeError: it is closed.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("The HTTP client has been closed.")
            if self._client is None or self._client[0] is not _loop():
                self._client = (_loop(), httpx.AsyncClient(timeout=None, **self._options))
                weakref.finalize(self, _close_later, *self._client).atexit = False
            return Exchange(self._client[1], time.monotonic() + seconds)

    def close(self) -> None:
        """Closes its connections; requests that are under way fail."""
        with self._lock:
            client, self._client, self._closed = self._client, None, True
        if client is not None and client[0] is _loop():
            with contextlib.suppress(TimeoutError):
                within(GRACE, client[1].aclose)


def _close_later(loop: asyncio.AbstractEventLoop, client: httpx.AsyncClient) -> None:
    """Closes the connections of a client that nobody has any more."""
    if loop is _loops.get(os.getpid()):
        asyncio.run_coroutine_threadsafe(client.aclose(), loop)


@dataclass(frozen=True)
class Exchange:
    """The requests of one attempt: one deadline on ``time.monotonic()``'s clock for all of them
    together, one bound for each answer's body."""

    client: httpx.AsyncClient
    deadline: float

    def get(self, url: str) -> httpx.Response:
        """The whole answer to a GET.

        Raises:
            TimeoutError: the deadline has come.
            httpx.HTTPError: the connection broke, or the answer is longer than ``LARGEST_BODY``.
        """
        return self._whole("GET", url)

    def post(self, url: str, *, json: Any) -> httpx.Response:
        """The whole answer to a POST; raises as :meth:`get`."""
        return self._whole("POST", url, json=json)

    def _whole(self, method: str, url: str, **content: Any) -> httpx.Response:
        async def ask() -> httpx.Response:
            async with self.client.stream(method, url, **content) as answer:
                body = bytearray()
                async for piece in answer.aiter_bytes():
                    body += piece
                    if len(body) > LARGEST_BODY:
                        raise httpx.RemoteProtocolError(
                            f"the answer is longer than {LARGEST_BODY} bytes",
                            request=answer.request,
                        )
            # As bytes: a value may be beyond ASCII, and httpx writes none that is.
            headers = [
                (name, value)
                for name, value in answer.headers.raw
                if name.lower() not in _OF_THE_TRANSFER
            ]
            return httpx.Response(
                answer.status_code, headers=headers, content=bytes(body), request=answer.request
            )

        return within(self.deadline - time.monotonic(), ask)
