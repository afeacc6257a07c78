"""Connections: so many at once, and a deadline for what each client has to do next.

Uvicorn's own limits begin where the head of a request is whole, and asyncio accepts connections
until the process has no file descriptor left, which it then logs without end. So connections are
accepted here, and given to uvicorn one by one:

- Where as many are open as may be, those that have waited for their client longest (for a head, the
  rest of a body, the next request, or to have their answer read) are closed for the new one. So
  silent clients only stand in each other's way. If all wait for their answer, the new one gets a
  503.
- A head must be whole, and an answer read, within a time that no byte now and then makes longer.
  (The body's time is front.py's.)
- What happened is counted, and logged once a minute at most, however often it happens.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import resource
import socket
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import h11

from cowest_dspy.serve import refusals
from cowest_dspy.serve.config import ServeLimits
from cowest_dspy.serve.metrics import Closed, Metrics
from cowest_dspy.serve.refusals import Refused

log = logging.getLogger(__name__)
HEAD_SECONDS, READ_SECONDS = 10.0, 30.0
"""For the head of a request, from its first byte or the connection's start; and for a client to
read on, where so much is unread (64 KB, beside the system's own buffers) that no more is written.
Neither is longer than [serve.limits] seconds."""
KEEP_ALIVE = 30
"""Seconds that a connection stays open without a request."""
TICK, PAUSE, LOG_SECONDS = 0.1, 0.1, 60.0
"""Seconds between two looks at the connections; without accepting, where there is no file
descriptor; between two lines of log."""
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

Owed = Literal["head", "body", "rest", "reading", "next request"]
"""What a client has to do. "rest": to send what is left of a body whose answer it has already."""
TEXTS: dict[Closed, str] = {
    "late": "were closed: the request did not come, or its answer was not read, in time",
    "displaced": "were closed for new ones while they waited for their client",
    "refused": "were refused (503): all others wait for their answer",
    "unreadable": "sent what is no HTTP (400)",
}


def most_connections(limits: ServeLimits) -> int:
    """How many connections may be open at once: several for each request that is answered or waits,
    and half of the process' file descriptors at most, since models, stores and logs need theirs."""
    useful = 64 + 4 * (limits.concurrency + limits.queue)
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return useful if files == resource.RLIM_INFINITY else min(useful, max(1, files // 2))


def owed(connection: Any) -> Owed | None:
    """What the client of one of uvicorn's connections has to do next; None while it waits for its
    answer."""
    transport, conn, cycle = connection.transport, connection.conn, connection.cycle
    if connection.flow.write_paused or (
        transport.is_closing() and transport.get_write_buffer_size()
    ):
        return "reading"
    answered = cycle is None or cycle.response_complete
    if conn.their_state is h11.SEND_BODY:
        return "rest" if answered else "body"
    if not answered:
        return None
    return "head" if cycle is None or conn.trailing_data[0] else "next request"


@dataclass(frozen=True)
class _Debt:
    """What a client owes, after which request (its cycle), since when by the loop's clock."""

    owed: Owed | None
    cycle: Any
    since: float


class Door:
    """Accepts connections for a server of uvicorn's, which has started without a socket of its own.

    Args:
        server: its protocol is a :func:`connection_class`.
        listener: a listening socket; ``close()`` closes it.
        limits: [serve.limits].
        metrics: where connections are counted.
    """

    def __init__(
        self, server: Any, listener: socket.socket, limits: ServeLimits, metrics: Metrics
    ) -> None:
        self._server, self._listener, self._metrics = server, listener, metrics
        self._loop = asyncio.get_running_loop()
        self._connections: set[Any] = server.server_state.connections
        self._opening: set[asyncio.Task[None]] = set()
        self._debts: dict[Any, _Debt] = {}
        self._most = most_connections(limits)
        # So many are accepted, and displaced, in one round of the loop: sockets that are closed go
        # in the next one only.
        self._step = max(1, min(32, self._most // 8))
        head = min(HEAD_SECONDS, limits.seconds)
        self._deadlines: dict[Owed, float] = {
            "head": head,
            "rest": head,
            "reading": min(READ_SECONDS, limits.seconds),
            # Uvicorn's own timer forgets connections that sent the rest of a body.
            "next request": KEEP_ALIVE,
        }
        self._untold: Counter[str] = Counter()
        self._log_again = 0.0
        self._refusal = _as_bytes(refusals.crowded())
        self._timers: dict[str, asyncio.TimerHandle] = {}
        wanted = limits.concurrency + limits.queue
        if self._most < wanted:
            log.warning(
                "at most %d connections may be open (half of `ulimit -n`), fewer than the %d "
                "requests of [serve.limits] "
                "concurrency and queue: raise `ulimit -n`",
                self._most,
                wanted,
            )

    def open(self) -> None:
        """Begins to accept."""
        self._listener.setblocking(False)
        self._metrics.watch_connections(lambda: len(self._connections))
        self._start_accepting()
        self._look_at_all()

    def close(self) -> None:
        """Accepts no more; connections stay open."""
        self._loop.remove_reader(self._listener)
        for timer in self._timers.values():
            timer.cancel()
        self._tell()
        self._listener.close()

    def note(self, why: Closed) -> None:
        """Counts a connection that ended before its time."""
        self._metrics.closed(why)
        self._untold[TEXTS[why]] += 1

    def _start_accepting(self) -> None:
        self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        for _ in range(self._step):
            try:
                accepted, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno in EXHAUSTED:
                    self._wait_for_files()
                    return
                continue  # The client has gone already.
            accepted.setblocking(False)
            if self._has_room():
                opening = self._loop.create_task(self._begin(accepted))
                self._opening.add(opening)
                opening.add_done_callback(self._opening.discard)
            else:
                self._refuse(accepted)

    def _wait_for_files(self) -> None:
        """Accepts nothing for a moment: the listening socket stays readable, and would be tried
        without end."""
        self._untold["times no file descriptor was left (`ulimit -n`), and accepting waited"] += 1
        self._displace(1)
        self._loop.remove_reader(self._listener)
        self._timers["accepting"] = self._loop.call_later(PAUSE, self._start_accepting)

    async def _begin(self, accepted: socket.socket) -> None:
        state = self._server.server_state

        def protocol() -> asyncio.Protocol:
            config = self._server.config
            return config.http_protocol_class(config=config, server_state=state, app_state={})

        try:
            await self._loop.connect_accepted_socket(protocol, accepted)
        except OSError:  # The client has gone already.
            accepted.close()

    def _has_room(self) -> bool:
        if len(self._connections) + len(self._opening) >= self._most:
            self._displace(self._step)
        return len(self._connections) + len(self._opening) < self._most

    def _displace(self, most: int) -> None:
        """Closes up to so many connections that wait for their client, those first that wait
        longest."""
        self._note_debts()
        waiting = [connection for connection, debt in self._debts.items() if debt.owed is not None]
        waiting.sort(key=lambda connection: self._debts[connection].since)
        for connection in waiting[:most]:
            self._end(connection, "displaced")

    def _refuse(self, accepted: socket.socket) -> None:
        with accepted, suppress(OSError):
            accepted.send(self._refusal)
            accepted.shutdown(socket.SHUT_WR)
            accepted.recv(
                65536
            )  # What is closed with bytes unread is reset, and the client would not see the answer.
        self.note("refused")

    def _look_at_all(self) -> None:
        self._timers["looking"] = self._loop.call_later(TICK, self._look_at_all)
        self._note_debts()
        now = self._loop.time()
        for connection, debt in self._debts.items():
            if debt.owed in self._deadlines and now - debt.since > self._deadlines[debt.owed]:
                self._end(connection, "late")
        if now >= self._log_again:
            self._tell()

    def _note_debts(self) -> None:
        now = self._loop.time()
        self._debts = {connection: self._debt(connection, now) for connection in self._connections}

    def _debt(self, connection: Any, now: float) -> _Debt:
        what, before = owed(connection), self._debts.get(connection)
        if before is None:
            return _Debt(what, connection.cycle, connection.opened)
        if (before.owed, before.cycle) == (what, connection.cycle):
            return before
        return _Debt(what, connection.cycle, now)

    def _end(self, connection: Any, why: Closed) -> None:
        connection.transport.abort()
        self._connections.discard(connection)
        self.note(why)

    def _tell(self) -> None:
        if self._untold:
            log.warning(
                "connections: %s",
                "; ".join(f"{count} {text}" for text, count in self._untold.items()),
            )
            self._untold.clear()
            self._log_again = self._loop.time() + LOG_SECONDS


def connection_class(note: Callable[[Closed], None]) -> Any:
    """Uvicorn's protocol for HTTP/1.1, which knows when it was opened, and answers what is no HTTP
    in OpenAI's form."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Connection(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            self.opened = self.loop.time()
            super().connection_made(transport)

        def send_400_response(self, msg: str) -> None:
            """Uvicorn's own raises an error where an answer was sent already, and its application
            may still send one after it."""
            note("unreadable")
            if self.cycle is not None and not self.cycle.response_complete:
                self.cycle.disconnected = True
                self.cycle.message_event.set()
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                self.transport.write(_as_bytes(refusals.unreadable()))
            self.transport.close()

    return Connection


def _as_bytes(error: Refused) -> bytes:
    """A whole HTTP answer, after which the connection is closed."""
    body = json.dumps(error.body)
    reason = {400: "Bad Request", 503: "Service Unavailable"}[error.status]
    headers = {
        "Content-Type": "application/json",
        "Content-Length": len(body),
        "Connection": "close",
        **error.headers,
    }
    lines = [
        f"HTTP/1.1 {error.status} {reason}",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return ("\r\n".join(lines) + "\r\n\r\n" + body).encode()
