"""How adapters get into a running server, and how a request names one: llama.cpp's way, vLLM's way,
and none.

An adapter is known by the hash of its weights, and its name in the server is made of it: a name is
never used for other weights.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Protocol

import httpx
from dspy.lm15 import ServerError

from cowest_dspy.errors import ModelError, masked
from cowest_dspy.lms import lora_gguf, protocol
from cowest_dspy.lms.attempts import Exchange
from cowest_dspy.lms.processes import Place


class ServedAdapters(Protocol):
    """The adapters of one server. ``start`` of a place tells which start of the server it is: a new
    one has forgotten them."""

    neutral: dict[str, Any]
    """Fields of a request where it says nothing itself: as in LocalEngine, and not as the
    server would do by itself."""

    def know(self, adapter_hash: str, folder: Path) -> None:
        """Takes note of an adapter; nothing is sent to the server yet."""
        ...

    def arguments(self) -> tuple[str, ...]:
        """What a server that we start must be given on its command line."""
        ...

    def fields(self, exchange: Exchange, place: Place, adapter_hash: str | None) -> dict[str, Any]:
        """The fields of a request that make the adapter speak (None: the base alone); puts it into
        the server when needed.

        Raises:
            ModelError: the server does not have it and cannot be given it.
        """
        ...


def server_name(adapter_hash: str) -> str:
    """How an adapter is called in a server."""
    return Path(lora_gguf.file_name(adapter_hash)).stem


_QUIET: dict[str, Any] = {
    "temperature": 0.0,
    "seed": 0,
    "max_tokens": 512,
    "top_p": 1.0,
    "min_p": 0.0,
}


class NoAdapters:
    """A server that only the protocol is known of."""

    neutral: dict[str, Any] = {}  # noqa: RUF012 - a constant

    def __init__(self, model: str) -> None:
        self.model = model

    def know(self, adapter_hash: str, folder: Path) -> None:
        """Never takes one.

        Raises:
            ModelError: always.
        """
        raise ModelError(
            f"{self.model}: the OpenAI protocol has no way to load an adapter. "
            'Say what serves there: server = "llama_cpp" or server = "vllm".'
        )

    def arguments(self) -> tuple[str, ...]:
        """Nothing."""
        return ()

    def fields(self, exchange: Exchange, place: Place, adapter_hash: str | None) -> dict[str, Any]:
        """The model's name."""
        return {"model": self.model}


class VllmAdapters:
    """vLLM loads an adapter's folder at run time, and serves it as a model of its own name.

    On a CPU, do not ask the base and an adapter at the same time: vLLM 0.32 adds the adapter of its
    last slot to the base's rows of a batch that has both (vLLM pull request 48421; base
    log-probabilities were off by 0.11 on average, up to 0.65). A stage of a run asks one of them at
    a time. GPUs have other kernels, and those leave the base alone.
    """

    # vLLM would otherwise sample with what the model's generation_config.json says.
    neutral: dict[str, Any] = _QUIET | {"top_k": -1, "repetition_penalty": 1.0}

    def __init__(self, model: str) -> None:
        self.model = model
        self._folders: dict[str, Path] = {}
        self._loaded: set[tuple[int, str]] = set()
        self._loading = threading.Lock()

    def know(self, adapter_hash: str, folder: Path) -> None:
        """Takes note of the folder."""
        self._folders.setdefault(adapter_hash, folder)

    def arguments(self) -> tuple[str, ...]:
        """Nothing: vLLM needs no restart."""
        return ()

    def fields(self, exchange: Exchange, place: Place, adapter_hash: str | None) -> dict[str, Any]:
        """The name of the model or of the adapter, which is loaded when this start of the server
        has not seen it."""
        if adapter_hash is None:
            return {"model": self.model}
        with self._loading:
            if (place.start, adapter_hash) not in self._loaded:
                self._load(exchange, place, adapter_hash)
                self._loaded.add((place.start, adapter_hash))
        return {"model": server_name(adapter_hash)}

    def _load(self, exchange: Exchange, place: Place, adapter_hash: str) -> None:
        name, folder = server_name(adapter_hash), self._folders[adapter_hash]
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


class LlamaAdapters:
    """llama.cpp's server has the adapters that it was started with; each request says how strongly
    each of them speaks."""

    # The server's own defaults are temperature 0.8, top_k 40, top_p 0.95 and min_p 0.05.
    neutral: dict[str, Any] = _QUIET | {"top_k": 0, "repeat_penalty": 1.0}

    def __init__(self, model: str, base: str | None, ours: bool) -> None:
        self.model, self._base, self._ours = model, base, ours
        self._files: dict[str, Path] = {}
        self._listed: tuple[int, list[str]] = (-1, [])
        self._listing = threading.Lock()

    def know(self, adapter_hash: str, folder: Path) -> None:
        """Converts the adapter to GGUF, once."""
        assert self._base is not None
        if adapter_hash not in self._files:
            self._files[adapter_hash] = lora_gguf.convert(folder, Path(self._base))

    def arguments(self) -> tuple[str, ...]:
        """``--lora`` for every known adapter, none of which speaks unasked.

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
        with self._listing:
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
