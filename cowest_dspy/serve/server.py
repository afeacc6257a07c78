"""Run the application on a socket: in the foreground until a signal comes, or in a thread as long
as a context lasts.

    with served(program, name="ferries") as address:      # "http://127.0.0.1:43567/v1"
        client = openai.OpenAI(base_url=address, api_key="any")

Asked to stop, the server takes no new request (503), finishes those under way, and ends; a second
signal ends it at once.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from cowest_dspy import compat
from cowest_dspy.errors import ConfigError
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.serve.answer import Answering, Chooser
from cowest_dspy.serve.app import Service, make_app
from cowest_dspy.serve.config import ServeRules
from cowest_dspy.serve.guard import Guard
from cowest_dspy.utils import interrupts
from cowest_dspy.utils.extras import check_extra

log = logging.getLogger("cowest_dspy.serve")
BACKLOG = 2048
HEAD_SECONDS, KEEP_ALIVE = 10.0, 30
"""Seconds for a connection's first request to begin; and that it stays open without another."""
QUIET = 0.3
"""Seconds in which a server that is asked to stop says 503, and closes each connection with that:
what comes over a connection as it is closed has no answer."""
TICK = 0.02


def bind(host: str, port: int) -> socket.socket:
    """Open a listening socket.

    Raises:
        ConfigError: the address is not this machine's, or its port is taken.
    """
    name = host.strip("[]")
    family = socket.AF_INET6 if ":" in name else socket.AF_INET
    try:
        listener = socket.create_server((name, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"{host}:{port} cannot be listened at ({error.strerror}): give another --port, or 0 "
            "for any."
        ) from error
    # For its connections, too: an answer's head and body are two writes, and the second would wait
    # 40 ms for the first's receipt.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def address_of(listener: socket.socket) -> str:
    """Format what a client is given: ``http://127.0.0.1:8000/v1``."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


def make_service(
    program: Collaboration,
    rules: ServeRules,
    name: str,
    *,
    inputs: tuple[str, ...] = (),
    router: Chooser | None = None,
) -> Service:
    """Build a service as [serve] says.

    Raises:
        ConfigError: [serve] fields names what the answer does not have.
    """
    answering = Answering(
        program,
        router,
        on_weak_failure=rules.on_weak_failure,
        on_strong_failure=rules.on_strong_failure,
    )
    return Service(answering, rules, name, inputs=inputs)


def run(guard: Guard, listener: socket.socket, say: Callable[[str], None] = lambda _: None) -> None:
    """Serve in the foreground until a signal comes: the first ends it cleanly, the second at once.
    ``say`` gets the address when requests are taken, and what is done about a signal."""
    stop = threading.Event()

    def on_signal(_: str) -> None:
        stop.set()
        say("stopping: requests under way are finished; once more stops at once")

    try:
        with interrupts.announcing(on_signal), interrupts.uninterrupted():
            asyncio.run(_serve(guard, listener, stop, lambda: say(address_of(listener))))
    except interrupts.Interrupted:
        return  # To be asked to stop is how a server ends.


@contextmanager
def served(
    program: Collaboration,
    rules: ServeRules | None = None,
    *,
    name: str = "collaboration",
    inputs: tuple[str, ...] = (),
    router: Chooser | None = None,
    key: str | None = None,
) -> Iterator[str]:
    """Serve the program at a free port of 127.0.0.1 as long as the context lasts; gives the address
    for clients.

    Args:
        program: both models bound.
        rules: as [serve] in a TOML; its host and port are not used.
        name: the model's, for clients.
        inputs: the program's, in order; by default those of its strong model alone.
        router: chooses a route after each draft.
        key: what clients must give; None takes any.

    Raises:
        ConfigError: the extra "serve" is not installed, or rules that do not fit the program.
    """
    check_extra("serve", "Serving")
    rules = rules or ServeRules()  # pyright: ignore[reportCallIssue]
    service = make_service(program, rules, name, inputs=inputs, router=router)
    with bind("127.0.0.1", 0) as listener:
        stop, ready = threading.Event(), threading.Event()
        serving = _serve(make_app(service, key=key), listener, stop, ready.set)
        thread = threading.Thread(
            target=asyncio.run, args=(serving,), name="cowest-serve", daemon=True
        )
        thread.start()
        try:
            while not ready.wait(TICK):
                if not thread.is_alive():
                    raise ConfigError("The server ended before it began.")
            yield address_of(listener)
        finally:
            stop.set()
            thread.join()


async def _serve(
    guard: Guard, listener: socket.socket, stop: threading.Event, ready: Callable[[], Any]
) -> None:
    """Serve until ``stop`` is set and what was under way is finished, or the grace is over."""
    import uvicorn

    class StoppableServer(uvicorn.Server):
        """Uvicorn's, which leaves signals to interrupts.py."""

        def capture_signals(self) -> Any:
            return nullcontext()

    limits = guard.limits
    head_seconds = min(HEAD_SECONDS, limits.seconds)
    config = uvicorn.Config(
        guard,
        http=compat.connection_class(head_seconds, KEEP_ALIVE),
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",  # Its warnings are of single requests, and say nothing of which.
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        # Uvicorn refuses at the limit, not beyond it.
        limit_concurrency=limits.connections + 1,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=1,
    )  # pyright: ignore[reportArgumentType]
    asyncio.get_running_loop().set_exception_handler(_log_once_a_minute())
    server = StoppableServer(config)
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    while not server.started and not serving.done():
        await asyncio.sleep(TICK)
    if not serving.done():
        ready()
    while not stop.is_set() and not serving.done():
        await asyncio.sleep(TICK)
    guard.stopping = True
    await asyncio.sleep(min(QUIET, limits.grace))
    end = time.monotonic() + limits.grace
    while guard.under_way and time.monotonic() < end:
        await asyncio.sleep(TICK)
    server.should_exit = True
    await serving


def _log_once_a_minute() -> Callable[[asyncio.AbstractEventLoop, dict[str, Any]], None]:
    """An event loop's handler of errors that logs one a minute: asyncio reports each connection
    that it cannot accept for want of a file descriptor, and tries without end."""
    logged = -math.inf

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal logged
        now = time.monotonic()
        if now - logged >= 60:
            logged = now
            error = context.get("exception")
            hint = ": raise `ulimit -n`" if isinstance(error, OSError) else ""
            log.warning("%s (%s)%s", context["message"], type(error).__name__, hint)

    return handle
