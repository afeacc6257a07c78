"""A server on a socket: in the foreground until it is asked to stop, or in a thread for as long as
a context lasts.

    with served(program, name="ferries") as address:      # "http://127.0.0.1:43567/v1"
        client = openai.OpenAI(base_url=address, api_key="any")

Asked to stop, it takes no new request (503), finishes those under way, and ends; a second signal
ends it at once.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any

from cowest_dspy.errors import ConfigError
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.serve.app import make_app
from cowest_dspy.serve.asking import Answering, Fallbacks, Router
from cowest_dspy.serve.config import KEY_VARIABLE, ServeRules, is_loopback
from cowest_dspy.serve.front import Front
from cowest_dspy.serve.metrics import Metrics
from cowest_dspy.serve.sampling import LiveSamples
from cowest_dspy.serve.service import Service
from cowest_dspy.utils import interrupts
from cowest_dspy.utils.masking import SHORTEST_SECRET

BACKLOG = 2048
QUIET, LONGEST_QUIET = 0.3, 5.0
"""Seconds without a request that a server which is asked to stop waits for before it closes its
connections, and how long it waits for them at most: what comes over a connection as it is closed
has no answer. Until then it says 503, and closes each with that."""
TICK = 0.02


def check_installed() -> None:
    """Raises ConfigError where what serves is not installed."""
    missing = [
        name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None
    ]
    if missing:
        raise ConfigError(
            f'{", ".join(missing)} is not installed: pip install "cowest_dspy[serve]".'
        )


def key_of(rules: ServeRules) -> str | None:
    """The API key that clients must give: what the variable of [serve] api_key_env holds, None
    where it is not set.

    Raises:
        ConfigError: there is none, and other machines may reach the address, or the TOML names a
            variable; or it is too short.
    """
    variable, key = rules.api_key_env, os.environ.get(rules.api_key_env, "")
    if not key and not is_loopback(rules.host):
        raise ConfigError(
            f"{rules.host} may be reached from other machines, and needs an API key: export "
            f"{variable}, which holds it. "
            f'`export {variable}="$(openssl rand -hex 24)"` makes one.'
        )
    if not key and variable != KEY_VARIABLE:
        raise ConfigError(
            f"The environment variable {variable} is not set ([serve] api_key_env): export it, it "
            "holds the API key."
        )
    if key and (
        len(key) < SHORTEST_SECRET or not key.isascii() or not key.isprintable() or " " in key
    ):
        raise ConfigError(
            f"The key in {variable} must have {SHORTEST_SECRET} or more printable ASCII "
            "characters, and no space."
        )
    return key or None


def bound(host: str, port: int) -> socket.socket:
    """A listening socket.

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
    """What a client is given: ``http://127.0.0.1:8000/v1``."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


@contextmanager
def service_of(
    program: Collaboration,
    rules: ServeRules,
    name: str,
    *,
    inputs: tuple[str, ...] = (),
    router: Router | None = None,
) -> Iterator[Service]:
    """A service as [serve] says; afterwards live traces are written and threads are let go.

    Raises:
        ConfigError: [serve] fields names what the answer does not have.
        StoreError: the run of [serve.sample] is in use.
    """
    fallbacks = Fallbacks(rules.on_weak_failure, rules.on_strong_failure)
    answering = Answering(program, router, fallbacks=fallbacks, breaker=rules.breaker)
    metrics = Metrics()
    with LiveSamples(rules.sample, answering.models, metrics.sampled) as samples:
        try:
            made = Service(answering, rules, name, inputs=inputs, metrics=metrics, samples=samples)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        try:
            yield made
        finally:
            made.close()


def run(
    front: Front,
    listener: socket.socket,
    grace: float,
    told: Callable[[str], None] = lambda _: None,
) -> None:
    """Serves in the foreground until a signal comes: the first ends it cleanly, the second at once.
    ``told`` gets the address when requests are taken, and what is done about a signal."""
    stop = threading.Event()

    def asked_to_stop(_: str) -> None:
        stop.set()
        told("stopping: requests under way are finished; once more stops at once")

    try:
        with interrupts.telling(asked_to_stop), interrupts.uninterrupted():
            asyncio.run(_serve(front, listener, grace, stop, lambda: told(address_of(listener))))
    except interrupts.Interrupted:
        return  # To be asked to stop is how a server ends.


@contextmanager
def served(
    program: Collaboration,
    rules: ServeRules | None = None,
    *,
    name: str = "collaboration",
    inputs: tuple[str, ...] = (),
    router: Router | None = None,
    key: str | None = None,
) -> Iterator[str]:
    """The program behind a free port of 127.0.0.1 as long as the context lasts; gives the address
    for clients.

    Args:
        program: both models bound.
        rules: as [serve] in a TOML; its host and port are not used.
        name: the model's, for clients.
        inputs: the program's, in order; by default those of its strong model alone.
        router: who answers, asked after each draft.
        key: what clients must give; None takes any.

    Raises:
        ConfigError: the extra "serve" is not installed, or rules that do not fit the program.
    """
    check_installed()
    rules = rules or ServeRules()  # pyright: ignore[reportCallIssue]
    with (
        service_of(program, rules, name, inputs=inputs, router=router) as service,
        bound("127.0.0.1", 0) as listener,
    ):
        front, stop, ready = make_app(service, key=key), threading.Event(), threading.Event()
        serving = _serve(front, listener, rules.limits.grace, stop, ready.set)
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
    front: Front,
    listener: socket.socket,
    grace: float,
    stop: threading.Event,
    ready: Callable[[], Any],
) -> None:
    """One server, from its start until ``stop`` is set and what was under way is finished, or
    ``grace`` seconds are over."""
    import uvicorn

    from cowest_dspy.serve.connections import KEEP_ALIVE, Door, connection_class

    class Server(uvicorn.Server):
        """Uvicorn's, which leaves signals to interrupts.py."""

        def capture_signals(self) -> Any:
            return nullcontext()

    # A connection's class is h11's, whose parser bounds the size of headers. It is built before the
    # door that it tells.
    config = uvicorn.Config(
        front,
        http=connection_class(lambda why: door.note(why)),
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",  # Its warnings are of single requests, and say nothing of which.
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=1,
    )  # pyright: ignore[reportArgumentType]
    server = Server(config)
    serving, door = (
        asyncio.ensure_future(server.serve(sockets=[])),
        Door(server, listener, front.limits, front.metrics),
    )
    while not server.started and not serving.done():
        await asyncio.sleep(TICK)
    if not serving.done():
        door.open()
        ready()
    while not stop.is_set() and not serving.done():
        await asyncio.sleep(TICK)
    front.stopping = True
    front.last = asked = time.monotonic()
    while front.under_way and time.monotonic() < asked + grace:
        await asyncio.sleep(TICK)
    done = time.monotonic()
    while time.monotonic() < min(front.last + QUIET, done + LONGEST_QUIET):
        await asyncio.sleep(TICK)
    door.close()
    server.should_exit = True
    await serving
