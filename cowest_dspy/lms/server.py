"""ServerEngine: a server that speaks the OpenAI protocol behind ``dspy.LM(engine=...)``; one that
runs already, or one that a command starts (server_process.py).

    engine = ServerEngine(Server(kind="server", server="vllm", model="smollm2",
    api_base="http://127.0.0.1:8000/v1",
                                 weights="models/SmolLM2-135M-Instruct"))
    weak = engine.lm(temperature=0.0, max_tokens=64)         # a dspy.LM
    tuned = weak.copy(model=engine.load_adapter(folder))     # the same server, with an adapter

The engine routes on ``request.model``, as LocalEngine does, and like it owns no cache and no
retry; DSPy and the run's store do. It can be copied, pickled and saved with a program: only its
settings travel. Weights stay in the server.

Unlike LocalEngine, an equal seed need not give an equal text: in a server the sums depend,
in their last bits, on what shares the batch and what is left of earlier prompts. An answer that was
given is in the run's store.

An adapter is known by the hash of its weights, and its name in the server is made of it: a name is
never used for other weights.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
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
    ServerError,
    TransportError,
)

from cowest_dspy.errors import ModelError, masked
from cowest_dspy.lms import lora_gguf, protocol
from cowest_dspy.lms.base_engine import AsyncEngine, BaseEngine
from cowest_dspy.lms.config import Server, read_key
from cowest_dspy.lms.local import lora, weights
from cowest_dspy.lms.local.lora import AdapterRegistry, reload_adapters
from cowest_dspy.lms.protocol import Exchange, Http
from cowest_dspy.lms.server_process import Place, ServerProcess
from cowest_dspy.store import serialize
from cowest_dspy.store.call_context import current_stopping

# These are the LM's, not the engine's: two roles that differ in them only share one engine, and one
# started server.
_OF_THE_LM = ("temperature", "max_tokens", "num_retries", "adapter")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class ServerEngine(BaseEngine):
    """A server as a DSPy engine. It is first spoken to, or started, at the first request.

    Args:
        settings: the table of a TOML; ``temperature``, ``max_tokens``, ``num_retries`` and
            ``adapter`` are the LM's (build.py).

    Raises:
        ModelError: ``weights`` that cannot be found, or a command without "{port}".
    """

    supported_params = frozenset(protocol.SUPPORTED)

    base_folder: str
    """The folder of the served model's weights. Not there when they are not known or the server
    takes no adapters, so that the engine counts as tunable only when it is."""

    def __init__(self, settings: Server) -> None:
        self.settings, self.concurrency = settings, settings.concurrency
        name = Path(settings.model).name
        located = weights.locate(settings.weights) if settings.weights else None
        self.model_id = (
            f"server/{name}@{weights.folder_hash(located)}" if located else f"server/{name}"
        )
        if located and settings.server != "openai":
            self.base_folder = str(located)
        self._served = _ADAPTERS[settings.server](settings, str(located) if located else None)
        self._adapters = AdapterRegistry(self.model_id)
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
        """Ask the server, which is started first where a command starts it. The answer must come
        within ``timeout`` seconds; a stop does not end a call that has been sent.

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
        return serialize.with_price(protocol.response_of(request, answer), 0.0)

    def close(self) -> None:
        """Stop the server if it was started here, and close connections; the next request starts
        it again."""
        with self._opening:
            client, self._http = self._http, None
        if client is not None:
            client.close()
        if self._process is not None:
            self._process.stop()

    def dump_state(self) -> dict[str, Any]:
        """The state from which the engine can be made again: settings (an API key only by its
        variable's name), and adapters' folders."""
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
        reload_adapters(engine.load_adapter, state.get("adapters", {}))
        return engine

    # Adapters

    def load_adapter(self, folder: Path) -> str:
        """Register a PEFT adapter; return its model id, which ends in a hash of the adapter's
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
        self._served.register(adapter_hash, Path(folder).resolve())
        return self._adapters.add(adapter_hash, Path(folder))

    def adapter_folder(self, model: str) -> Path | None:
        """The folder of the adapter that the model id ``model`` names; None for the base.

        Raises:
            ModelError: an id that is neither the base nor a known adapter.
        """
        return self._adapters.folder_of(model)

    def require(self, model: str) -> None:
        """Check now that the server answers and has the adapter of ``model``, so that a run fails
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
                place = Place(str(self.settings.api_base).rstrip("/"))
            else:
                place = self._process.running(self._served.arguments())
            yield place, self._exchange()
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
        return {} if variable is None else {"Authorization": f"Bearer {read_key(variable)}"}


_engines: dict[str, ServerEngine] = {}
_engines_lock = threading.Lock()


def shared_server(settings: Server) -> ServerEngine:
    """The process's one engine for this server; made when first asked for."""
    key = settings.model_dump_json(exclude=set(_OF_THE_LM))
    with _engines_lock:
        if key not in _engines:
            _engines[key] = ServerEngine(settings)
        return _engines[key]


class AsyncServerEngine(AsyncEngine):
    """The same engine for ``await lm.acall(...)``."""

    kind = ServerEngine


_NEUTRAL: dict[str, Any] = {
    "temperature": 0.0,
    "seed": 0,
    "max_tokens": 512,
    "top_p": 1.0,
    "min_p": 0.0,
}


class ServedAdapters:
    """The adapters of a server; this one is of a server that only the protocol is known of, and
    takes none."""

    neutral: dict[str, Any] = {}  # noqa: RUF012 - a constant
    """Fields of a request that it does not set itself: as in LocalEngine, and not by the server's
    own defaults."""

    def __init__(self, settings: Server, base: str | None) -> None:
        self.model, self._base, self._ours = settings.model, base, bool(settings.command)
        self._lock = threading.Lock()

    def register(self, adapter_hash: str, folder: Path) -> None:
        """Take note of an adapter; nothing is sent to the server yet.

        Raises:
            ModelError: the server takes none.
        """
        raise ModelError(
            f"{self.model}: the OpenAI protocol has no way to load an adapter. "
            'Say what serves there: server = "llama_cpp" or server = "vllm".'
        )

    def arguments(self) -> tuple[str, ...]:
        """The arguments that a server that we start needs on its command line."""
        return ()

    def fields(self, exchange: Exchange, place: Place, adapter_hash: str | None) -> dict[str, Any]:
        """The fields of a request that select the adapter (None: the base alone); the server is
        given it when needed.

        Raises:
            ModelError: the server does not have it and cannot be given it.
        """
        return {"model": self.model}


class VllmAdapters(ServedAdapters):
    """vLLM loads an adapter's folder at run time, and serves it as a model of its own name.

    On a CPU, do not ask the base and an adapter at the same time: vLLM 0.32 adds the adapter of its
    last slot to the base's rows of a batch that has both (vLLM pull request 48421; base
    log-probabilities were off by 0.11 on average, up to 0.65). A stage of a run asks one of them at
    a time. GPUs have other kernels, and those leave the base alone.
    """

    # vLLM would otherwise sample with what the model's generation_config.json says.
    neutral: dict[str, Any] = _NEUTRAL | {"top_k": -1, "repetition_penalty": 1.0}

    def __init__(self, settings: Server, base: str | None) -> None:
        super().__init__(settings, base)
        self._folders: dict[str, Path] = {}
        self._loaded: set[tuple[int, str]] = set()

    def register(self, adapter_hash: str, folder: Path) -> None:
        """Take note of the folder."""
        self._folders.setdefault(adapter_hash, folder)

    def fields(self, exchange: Exchange, place: Place, adapter_hash: str | None) -> dict[str, Any]:
        """The name of the model or of the adapter, which is loaded when this start of the server
        has not seen it."""
        if adapter_hash is None:
            return {"model": self.model}
        with self._lock:
            if (place.start, adapter_hash) not in self._loaded:
                self._load(exchange, place, adapter_hash)
                self._loaded.add((place.start, adapter_hash))
        return {"model": _name(adapter_hash)}

    def _load(self, exchange: Exchange, place: Place, adapter_hash: str) -> None:
        name, folder = _name(adapter_hash), self._folders[adapter_hash]
        answer = exchange.post(
            f"{place.url}/load_lora_adapter", json={"lora_name": name, "lora_path": str(folder)}
        )
        # The name is a hash of the weights: what is loaded under it already is this adapter.
        if (
            answer.is_success
            or "already been loaded" in answer.text
            or "already loaded" in answer.text
        ):
            return
        raise ModelError(
            f"vLLM at {place.url} did not load the adapter {folder}: HTTP {answer.status_code} "
            f"{masked(answer.text)[:300]}. "
            "Start it with --enable-lora --max-lora-rank R (at least the adapter's) and with "
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True "
            "in its environment; it must see that folder under the same path."
        )


class LlamaAdapters(ServedAdapters):
    """llama.cpp's server has the adapters that it was started with; each request says how strongly
    each of them counts."""

    # The server's own defaults are temperature 0.8, top_k 40, top_p 0.95 and min_p 0.05.
    neutral: dict[str, Any] = _NEUTRAL | {"top_k": 0, "repeat_penalty": 1.0}

    def __init__(self, settings: Server, base: str | None) -> None:
        super().__init__(settings, base)
        self._files: dict[str, Path] = {}
        self._listed: tuple[int, list[str]] = (-1, [])

    def register(self, adapter_hash: str, folder: Path) -> None:
        """Convert the adapter to GGUF, once."""
        assert self._base is not None
        if adapter_hash not in self._files:
            self._files[adapter_hash] = lora_gguf.convert(folder, Path(self._base))

    def arguments(self) -> tuple[str, ...]:
        """``--lora`` for every known adapter, each of which is used only in requests that name it.

        ``--cache-ram 0``: the server's memory of earlier prompts does not ask which adapter
        computed them. Seen in build 11549: the base's prompt served to an adapter, and
        log-probabilities off by 0.7. Goes when that is mended.
        """
        loras = [part for file in list(self._files.values()) for part in ("--lora", str(file))]
        return (*loras, "--lora-init-without-apply", "--cache-ram", "0") if loras else ()

    def fields(self, exchange: Exchange, place: Place, adapter_hash: str | None) -> dict[str, Any]:
        """Every adapter of the server with scale 0, the wanted one with 1."""
        listed = self._list(exchange, place)
        name = lora_gguf.file_name(adapter_hash or "")
        wanted = next((index for index, path in enumerate(listed) if Path(path).name == name), None)
        if adapter_hash is not None and wanted is None:
            raise ModelError(
                f"The llama.cpp server at {place.url} does not have the adapter {adapter_hash}, "
                "and takes none while it runs. "
                f"Start it again with: --lora {self._files[adapter_hash]} "
                "--lora-init-without-apply --cache-ram 0"
            )
        fields: dict[str, Any] = {"model": self.model}
        if listed:
            fields["lora"] = [
                {"id": index, "scale": float(index == wanted)} for index in range(len(listed))
            ]
            # As above; how a server that we did not start keeps prompts is not known.
            fields |= {} if self._ours else {"cache_prompt": False}
        return fields

    def _list(self, exchange: Exchange, place: Place) -> list[str]:
        """The files of the server's adapters, in the order of their ids. One that others run is
        asked every time: between two calls it may have been started again, with other adapters
        under the same ids."""
        with self._lock:
            if not self._ours or self._listed[0] != place.start:
                answer = exchange.get(f"{place.url.removesuffix('/v1')}/lora-adapters")
                if not answer.is_success:
                    raise protocol.failure_of(answer)
                self._listed = (place.start, _paths(answer))
            return self._listed[1]


def _paths(answer: httpx.Response) -> list[str]:
    try:
        return [row["path"] for row in sorted(answer.json(), key=lambda row: row["id"])]
    except protocol.UNREADABLE as error:
        raise ServerError(
            f"What answers at {answer.url} is no server of llama.cpp: {masked(answer.text)[:300]}"
        ) from error


def _name(adapter_hash: str) -> str:
    """The name of an adapter in a server."""
    return Path(lora_gguf.file_name(adapter_hash)).stem


_ADAPTERS = {"openai": ServedAdapters, "vllm": VllmAdapters, "llama_cpp": LlamaAdapters}
