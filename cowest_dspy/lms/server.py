"""ServerEngine: a server that speaks the OpenAI protocol behind ``dspy.LM(engine=...)``; one that
runs, or one that we start.

    engine = ServerEngine(Server(kind="server", server="vllm", model="smollm2",
    api_base="http://127.0.0.1:8000/v1",
                                 weights="models/SmolLM2-135M-Instruct"))
    weak = engine.lm(temperature=0.0, max_tokens=64)         # a dspy.LM
    tuned = weak.copy(model=engine.load_adapter(folder))     # the same server, with an adapter

The engine routes on ``request.model``, as LocalEngine does, and like it owns no cache and no
retry; DSPy and the run's store do. It can be copied, pickled and saved with a program: only its
settings travel. Weights stay in the server.

Unlike LocalEngine, an equal seed need not give an equal text: in a server the sums depend,
in their last bits, on what shares the batch and what is left of earlier prompts. What was said once
is in the run's store.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dspy
import httpx
from dspy.lm15 import (
    InvalidRequestError,
    LM15Error,
    ProviderError,
    Request,
    Response,
    TransportError,
    response_to_events,
)

from cowest_dspy.errors import ModelError
from cowest_dspy.lms import protocol
from cowest_dspy.lms.attempts import Exchange, Http
from cowest_dspy.lms.config import Server
from cowest_dspy.lms.keys import key_in
from cowest_dspy.lms.local import lora, weights
from cowest_dspy.lms.local.known_adapters import KnownAdapters, load_again
from cowest_dspy.lms.processes import Place, ServerProcess
from cowest_dspy.lms.served_adapters import LlamaAdapters, NoAdapters, ServedAdapters, VllmAdapters
from cowest_dspy.store import serialize
from cowest_dspy.store.rate_limit import current_stopping

# These are the LM's, not the engine's: two roles that differ in them only share one engine, and one
# started server.
_OF_THE_LM = ("temperature", "max_tokens", "num_retries", "adapter")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class ServerEngine:
    """A server as a DSPy engine. It is first spoken to, or started, at the first request.

    Args:
        settings: the table of a TOML; ``temperature``, ``max_tokens``, ``num_retries`` and
            ``adapter`` are the LM's (build.py).

    Raises:
        ModelError: ``weights`` that cannot be found, or a command without "{port}".
    """

    supports_function_calling = False
    supports_reasoning = False
    supports_response_schema = False
    supported_params = frozenset(protocol.SUPPORTED)

    base_folder: str
    """The folder of the served model's weights. Not there when they are not known or the server
    takes no adapters, so that the engine counts as tunable only when it is."""

    def __init__(self, settings: Server) -> None:
        self.settings = settings
        name = Path(settings.model).name
        located = weights.locate(settings.weights) if settings.weights else None
        self.model_id = (
            f"server/{name}@{weights.folder_hash(located)}" if located else f"server/{name}"
        )
        if located and settings.server != "openai":
            self.base_folder = str(located)
        self._served = _served_adapters(settings, str(located) if located else None)
        self._adapters = KnownAdapters(self.model_id)
        self._process = (
            ServerProcess(settings.command, startup=settings.startup, log=settings.log)
            if settings.command
            else None
        )
        self._slots = threading.BoundedSemaphore(settings.concurrency)
        self._opening = threading.Lock()
        self._http: Http | None = None

    def lm(self, model: str | None = None, **settings: Any) -> dspy.LM:
        """A ``dspy.LM`` on this engine; ``model`` is an adapter's id (default: the base),
        ``settings`` as of ``dspy.LM``.

        DSPy's own response cache is off, as with every engine here. DSPy tries passing failures
        again (``num_retries``).
        """
        settings.setdefault("cache", False)
        settings.setdefault("num_retries", self.settings.num_retries)
        return dspy.LM(
            model or self.model_id, engine=self, async_engine=AsyncServerEngine(self), **settings
        )

    # What DSPy calls

    def complete(self, request: Request) -> Response:
        """Asks the server, which is started when it is ours and does not run. Whatever the server
        does, it has ``timeout`` seconds for the answer; no stop ends a call before, once it has
        been sent.

        Raises:
            dspy.lm15.LM15Error: a request that cannot be (InvalidRequestError, ContextLengthError),
                or a call that failed; failures that pass are of a kind that DSPy tries again.
            ModelError: the server cannot be started, or does not have the adapter.
            KeyboardInterrupt: the work was stopped while the call waited for its turn.
        """
        try:
            return self._answer(request)
        except ProviderError as error:
            # DSPy waits as long as the error says before it tries again, and a server may say
            # anything.
            if error.retry_after is not None:
                error.retry_after = min(error.retry_after, self.settings.timeout)
            raise

    def _answer(self, request: Request) -> Response:
        adapter = self._adapter_of(request.model)
        body = self._served.neutral | protocol.body_of(request, self.model_id)
        with self._slots:
            current_stopping().check_before_sending()
            with self._reached() as (place, exchange):
                body |= self._served.fields(exchange, place, adapter)
                answer = exchange.post(f"{place.url}/chat/completions", json=body)
        return serialize.priced(protocol.response_of(request, answer), 0.0)

    def stream(self, request: Request) -> Any:
        """The finished answer as a stream of events (the text comes in one piece)."""
        return response_to_events(self.complete(request))

    def close(self) -> None:
        """Stops the server if it was started here, and closes connections; the next request starts
        it again."""
        with self._opening:
            client, self._http = self._http, None
        if client is not None:
            client.close()
        if self._process is not None:
            self._process.stop()

    def __deepcopy__(self, memo: dict[int, Any]) -> ServerEngine:
        return self

    def __copy__(self) -> ServerEngine:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return (ServerEngine.load_state, (self.dump_state(),))

    def dump_state(self) -> dict[str, Any]:
        """What is needed to make the engine again: settings (an API key only by its variable's
        name), and adapters' folders."""
        return {
            "settings": self.settings.model_dump(mode="json"),
            "adapters": self._adapters.folders(),
        }

    @classmethod
    def load_state(cls, state: dict[str, Any]) -> ServerEngine:
        """The process's engine for this state.

        Raises:
            ModelError: an adapter's folder is gone, or holds other weights than when the state was
                saved.
        """
        engine = shared_server(Server.model_validate(state["settings"]))
        load_again(engine.load_adapter, state.get("adapters", {}))
        return engine

    # Adapters

    def load_adapter(self, folder: Path) -> str:
        """Makes a PEFT adapter known; gives its model id, which ends in a hash of the adapter's
        weights. The server gets it with the first request that names it, or by :meth:`require`.

        Raises:
            ModelError: the folder holds no adapter, one that is damaged or is another model's, the
                server takes none, or the model's own ``weights`` are not known.
        """
        base = getattr(self, "base_folder", None)
        adapter_hash = (
            lora.identify(Path(folder), Path(base)) if base else weights.adapter_hash(Path(folder))
        )
        if base is None and self.settings.server != "openai":
            raise ModelError(
                f"{self.model_id}: adapters need weights, the folder or Hub id of the model that "
                "is served; "
                'set for instance weights = "../../models/SmolLM2-135M-Instruct".'
            )
        self._served.know(adapter_hash, Path(folder).resolve())
        return self._adapters.add(adapter_hash, Path(folder))

    def adapter_folder(self, model: str) -> Path | None:
        """The folder of the adapter that the model id ``model`` names; None for the base.

        Raises:
            ModelError: an id that is neither the base nor a known adapter.
        """
        return self._adapters.folder_of(model)

    def require(self, model: str) -> None:
        """Sees now that the server answers and has the adapter of ``model``, so that a run fails
        before its first question.

        Raises:
            ModelError: it does not.
        """
        adapter = self._adapter_of(model)
        try:
            with self._reached() as (place, exchange):
                self._served.fields(exchange, place, adapter)
        except LM15Error as error:
            raise ModelError(
                f"{model} cannot be had from {self.settings.api_base or 'its server'}: {error}"
            ) from error

    # The server

    def _adapter_of(self, model: str) -> str | None:
        if model not in self._adapters:
            raise InvalidRequestError(
                f"{self.model_id}: this engine does not know the model {model}."
            )
        return self._adapters.name_of(model)

    @contextlib.contextmanager
    def _reached(self) -> Iterator[tuple[Place, Exchange]]:
        """A context in which the server runs, and one attempt at it is made; what breaks between us
        and it becomes an error of DSPy's."""
        try:
            if self._process is None:
                yield Place(str(self.settings.api_base).rstrip("/"), 0), self._exchange()
                return
            with self._process.running(self._served.arguments()) as place:
                yield Place(f"{place.url}/v1", place.start), self._exchange()
        except (httpx.HTTPError, TimeoutError) as error:
            raise protocol.transport_failure(error, self.settings.timeout, self.model_id) from error
        except RuntimeError as error:
            # close() was called while this call was about to be made; httpx has no error of its own
            # for that.
            if "closed" not in str(error):
                raise
            raise TransportError(
                f"{self.model_id}: the engine was closed while it was asked."
            ) from error

    def _exchange(self) -> Exchange:
        """The requests of an attempt that begins now."""
        with self._opening:
            if self._http is None:
                limits = httpx.Limits(
                    max_connections=None, max_keepalive_connections=self.settings.concurrency
                )
                base = httpx.URL(self.settings.api_base or "http://127.0.0.1")
                # A proxy of the environment is for the network, not for this machine's own address.
                self._http = Http(
                    limits=limits, headers=self._headers(), trust_env=base.host not in _LOOPBACK
                )
            return self._http.exchange(self.settings.timeout)

    def _headers(self) -> dict[str, str]:
        variable = self.settings.api_key_env
        return {} if variable is None else {"Authorization": f"Bearer {key_in(variable)}"}


def _served_adapters(settings: Server, base: str | None) -> ServedAdapters:
    if settings.server == "vllm":
        return VllmAdapters(settings.model)
    if settings.server == "llama_cpp":
        return LlamaAdapters(settings.model, base, bool(settings.command))
    return NoAdapters(settings.model)


_engines: dict[str, ServerEngine] = {}
_engines_lock = threading.Lock()


def shared_server(settings: Server) -> ServerEngine:
    """The process's one engine for this server; made when first asked for."""
    key = settings.model_dump_json(exclude=set(_OF_THE_LM))
    with _engines_lock:
        if key not in _engines:
            _engines[key] = ServerEngine(settings)
        return _engines[key]


class AsyncServerEngine:
    """The same engine for ``lm.acall``: waiting happens in threads of its own, as many as calls may
    be under way at once."""

    def __init__(self, engine: ServerEngine) -> None:
        self.engine = engine
        self._threads: ThreadPoolExecutor | None = None

    async def complete(self, request: Request) -> Response:
        """As :meth:`ServerEngine.complete`."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(
                self.engine.settings.concurrency, thread_name_prefix="cowest server"
            )
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, self.engine.complete, request
        )

    async def aclose(self) -> None:
        """As :meth:`ServerEngine.close`."""
        await asyncio.to_thread(self.engine.close)

    def __deepcopy__(self, memo: dict[int, Any]) -> AsyncServerEngine:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return (AsyncServerEngine, (self.engine,))

    def dump_state(self) -> dict[str, Any]:
        """The state of the engine behind it."""
        return self.engine.dump_state()

    @classmethod
    def load_state(cls, state: dict[str, Any]) -> AsyncServerEngine:
        """The counterpart of the process's engine for this state."""
        return cls(ServerEngine.load_state(state))
