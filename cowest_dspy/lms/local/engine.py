"""LocalEngine: a transformers model behind ``dspy.LM(engine=...)``; requests of any number of
threads form batches.

For processors and small models. It runs on one GPU, but keeps keys and values in float32 there and
was never measured: on CUDA, serve the model with vLLM (:class:`ServerEngine`).

    engine = LocalEngine("models/SmolLM2-135M-Instruct")
    weak = engine.lm(temperature=0.0, max_tokens=64)         # a dspy.LM
    tuned = weak.copy(model=engine.load_adapter(folder))     # the same weights, with an adapter

The engine routes on ``request.model``: the base and every adapter share one copy of the weights,
and one batch. It owns no cache and no retry; DSPy and the run's store do. It can be copied, pickled
and saved with a program: only its settings travel, never the weights.

What is reproducible: on one machine, with one torch thread and one version of the packages, the
same (model id, messages, settings, seed) gives the same text, and its random numbers never depend
on what else is in the batch. The logits may: a matrix product of another size can add in another
order, and two tokens that are equally likely up to the last bits can change places. In float32 that
is rare, in bfloat16 (steps of 0.4 %) it is seen now and then; int8 rounds alike in every batch, but
its scale is that of a row, so that it is as reproducible as float32.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import dspy
from dspy.lm15 import ContextLengthError, InvalidRequestError, Request, Response, TokenLogprob

from cowest_dspy.errors import ModelError
from cowest_dspy.lms.base_engine import AsyncEngine, BaseEngine
from cowest_dspy.lms.local import attention, likelihood, scheduler, weights
from cowest_dspy.lms.local.generate import PlainSession, Session
from cowest_dspy.lms.local.lora import AdapterRegistry, LoraModel, identify, reload_adapters
from cowest_dspy.lms.local.sampling import Completion, PromptRow, TokenScore
from cowest_dspy.lms.local.scheduler import COMPUTE, Batcher, LoadedModel, PendingRequest
from cowest_dspy.store import serialize

SUPPORTED = ("max_tokens", "temperature", "top_p", "top_k", "stop", "seed", "logprobs")
_DEFAULT_MAX_TOKENS = 512


class LocalEngine(BaseEngine):
    """A model folder or Hub id as a DSPy engine on this machine (CPU or one GPU).

    Args:
        model: a folder with config.json and *.safetensors, or a Hub id.
        dtype: "auto" (bfloat16 where the hardware computes in it), "float32", "bfloat16",
            "float16", or "int8" (on a CPU several times faster for models of a billion parameters
            and more, see lms/int8.py; part of the model's id).
        max_batch: sequences computed together, at most.
        name: how the model is called in ids; by default the folder's name.

    Weights are loaded at the first request.
    """

    supported_params = frozenset(SUPPORTED)

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str = "auto",
        max_batch: int = 32,
        name: str | None = None,
    ) -> None:
        self.base_folder = str(weights.locate(str(model)))
        self.dtype, self.max_batch, self.concurrency = dtype, max_batch, max_batch
        self.name = name or Path(str(model)).name
        precision = "-int8" if dtype == "int8" else ""
        self.model_id = (
            f"local/{self.name}@{weights.folder_hash(Path(self.base_folder))}{precision}"
        )
        self._adapters = AdapterRegistry(self.model_id)
        self._loaded: LoadedModel | None = None
        self._chat: ChatTokens | None = None
        self._batcher = Batcher(self._load, max_batch, f"cowest {self.name}")

    def lm(self, model: str | None = None, **settings: Any) -> dspy.LM:
        """A ``dspy.LM`` on this engine; ``model`` is an adapter's id (default: the base),
        ``settings`` as of ``dspy.LM``.

        DSPy's own response cache is off: it would answer from disk without knowing about runs.
        ``cowest_dspy.tuning`` makes the LM tunable.
        """
        settings.setdefault("cache", False)
        return dspy.LM(
            model or self.model_id,
            engine=self,
            async_engine=AsyncLocalEngine(self),
            **settings,
        )

    # What DSPy calls

    def complete(self, request: Request) -> Response:
        """Answer one request; blocks until it has come to its end in a batch.

        Raises:
            dspy.lm15.InvalidRequestError: a model id or a setting that this engine does not know.
            dspy.lm15.ContextLengthError: the prompt and ``max_tokens`` do not fit the model's
                context.
        """
        work = self._work(request)
        self._batcher.submit(work)
        return self._response(request, work, work.future.result())

    def stream(self, request: Request) -> Iterator[Any]:
        """The answer as events, its text in pieces as it comes into being.

        Raises:
            dspy.lm15.InvalidRequestError, dspy.lm15.ContextLengthError: as :meth:`complete`.
        """
        stream = scheduler.TextStream(self._load().tokenizer, request.config.stop or ())
        work = self._work(request, stream)
        self._batcher.submit(work)
        work.future.add_done_callback(lambda _: stream.end())
        yield from scheduler.events(
            request.model, stream, lambda: self._response(request, work, work.future.result())
        )

    def score(
        self, asked: Sequence[tuple[list[dict[str, str]], str]], model: str | None = None
    ) -> list[likelihood.Likelihood]:
        """Compute how likely the model finds texts as its answers: for each (chat messages, text)
        the log-probability of that text and of ending there, in order. Nothing is sampled.

        ``model`` is an adapter's id; by default the base is asked.

        Raises:
            dspy.lm15.ContextLengthError: a prompt and its text do not fit the model's context.
            ModelError: a model id that this engine does not know.
        """
        name = self._adapters.name_of(model or self.model_id)
        rows = [self._scorable(messages, text) for messages, text in asked]
        groups: dict[tuple[int, ...], list[int]] = {}
        for place, (tokens, head, _) in enumerate(rows):
            groups.setdefault(tokens[:head], []).append(place)
        found: dict[int, likelihood.Likelihood] = {}
        for head, places in groups.items():
            parts = [(rows[place][0][len(head) :], rows[place][2]) for place in places]
            made = COMPUTE.run(functools.partial(self._likelihoods, name, head, parts))
            found.update(zip(places, made, strict=True))
        return [found[place] for place in range(len(rows))]

    def close(self) -> None:
        """Free the weights; the next request loads them again."""
        COMPUTE.run(self._let_go)

    def dump_state(self) -> dict[str, Any]:
        """The state from which the engine can be made again: settings and the folders of its
        adapters, no weights."""
        return {
            "model": self.base_folder,
            "dtype": self.dtype,
            "max_batch": self.max_batch,
            "name": self.name,
            "adapters": self._adapters.folders(),
        }

    @classmethod
    def load_state(cls, state: dict[str, Any]) -> LocalEngine:
        """The process's engine for this state; one per model, however many predictors name it.

        Raises:
            ModelError: an adapter's folder is gone, or holds other weights than when the state was
                saved.
        """
        engine = shared_engine(
            state["model"], dtype=state["dtype"], max_batch=state["max_batch"], name=state["name"]
        )
        reload_adapters(engine.load_adapter, state.get("adapters", {}))
        return engine

    # Adapters

    def load_adapter(self, folder: Path) -> str:
        """Make a PEFT adapter available; return its model id, which ends in a hash of the adapter's
        weights.

        Raises:
            ModelError: the folder holds no adapter, one that is damaged or is another model's, or
                the engine computes in int8.
        """
        if self.dtype == "int8":
            raise ModelError(
                f'{self.model_id}: adapters need float weights. Set dtype = "auto" for a model '
                "that is tuned."
            )
        return self._adapters.add(identify(Path(folder), Path(self.base_folder)), folder)

    def adapter_folder(self, model: str) -> Path | None:
        """The folder of the adapter that the model id ``model`` names; None for the base.

        Raises:
            ModelError: an id that is neither the base nor a loaded adapter.
        """
        return self._adapters.folder_of(model)

    # From requests to batches

    def _work(
        self, request: Request, on_tokens: scheduler.TextStream | None = None
    ) -> PendingRequest:
        described = serialize.request_to_dict(request)
        config = described["config"]
        unknown = [name for name in config if name not in SUPPORTED]
        if unknown or request.model not in self._adapters:
            wrong = f"settings {unknown}" if unknown else f"the model {request.model}"
            raise InvalidRequestError(f"{self.model_id}: this engine does not know {wrong}.")
        tokens, head = self._tokens(described["messages"])
        room = self._room(tokens)
        if room < 1 or config.get("max_tokens", 1) > room:
            raise ContextLengthError(
                f"{self.model_id}: {len(tokens)} prompt tokens and "
                f"max_tokens={config.get('max_tokens')} do not fit its context."
            )
        row = PromptRow(
            tokens[head:],
            config.get("max_tokens", min(room, _DEFAULT_MAX_TOKENS)),
            temperature=float(config.get("temperature", 0.0)),
            top_p=float(config.get("top_p", 1.0)),
            top_k=int(config.get("top_k", 0)),
            seed=int(config.get("seed", 0)),
            stop=tuple(config.get("stop", ())),
            logprobs=config.get("logprobs"),
            adapter=self._adapters.name_of(request.model),
            on_tokens=on_tokens,
        )
        return PendingRequest(tokens, head, row)

    def _tokens(self, messages: list[dict[str, str]]) -> tuple[tuple[int, ...], int]:
        """The prompt's tokens, and how many of them may be computed apart from the rest."""
        loaded = self._load()
        assert self._chat is not None
        return self._chat.split(messages) if loaded.joinable else (self._chat.prompt(messages), 0)

    def _room(self, tokens: tuple[int, ...]) -> int:
        """The number of tokens that the context still takes after these."""
        return getattr(self._load().lora.model.config, "max_position_embeddings", 1 << 30) - len(
            tokens
        )

    def _scorable(
        self, messages: list[dict[str, str]], text: str
    ) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
        """The prompt's tokens, how many of them can be shared, and the tokens of ``text`` with the
        end of the turn."""
        tokens, head = self._tokens(messages)
        tokenizer = self._load().tokenizer
        assert self._chat is not None
        target = (*self._chat.text(text), tokenizer.eos_token_id)
        if len(target) > self._room(tokens):
            raise ContextLengthError(
                f"{self.model_id}: {len(tokens)} prompt tokens and a text of {len(target)} do not "
                "fit its context."
            )
        return tokens, head, target

    def _response(self, request: Request, work: PendingRequest, done: Completion) -> Response:
        logprobs = None if done.scores is None else tuple(map(self._logprob, done.scores))
        read, written = len(work.tokens), len(done.tokens)
        return serialize.make_response(
            request.model, done.text, done.finish_reason, read, written, logprobs, usd=0.0
        )

    def _logprob(self, score: TokenScore) -> TokenLogprob:
        decode = self._load().tokenizer.decode
        top = [
            {"token": decode([token]), "logprob": lp, "token_id": token} for token, lp in score.top
        ]
        return serialize.token_logprob(decode([score.token]), score.logprob, score.token, top)

    def _likelihoods(
        self,
        name: str | None,
        head: tuple[int, ...],
        parts: list[tuple[tuple[int, ...], tuple[int, ...]]],
    ) -> list[likelihood.Likelihood]:
        loaded = self._load()
        prefix = self._batcher.prefix(loaded, name, head) if head else None
        selected: Any = loaded.lora.select([name])
        return likelihood.score(selected, parts, prefix)

    def _load(self) -> LoadedModel:
        """The model in memory; loaded when it is not there."""
        return self._loaded or COMPUTE.run(self._load_now)

    def _load_now(self) -> LoadedModel:
        if self._loaded is None:
            tokenizer = weights.load_tokenizer(Path(self.base_folder))
            # Asked in floats: rounding to int8 hides whether attention in parts is the same, and
            # would be taken for a "no".
            model = weights.load_model(
                Path(self.base_folder), self.dtype, in_floats=attention.enable_parts
            )
            in_parts = attention.has_parts(model)
            ends, lora = (
                weights.end_tokens(model, tokenizer),
                LoraModel(model, self._adapters.by_name),
            )
            kind = Session if in_parts else PlainSession
            self._chat = ChatTokens(tokenizer)
            self._loaded = LoadedModel(
                lora,
                tokenizer,
                ends,
                lambda: kind(model, tokenizer, ends, lora.select),
                in_parts,
            )
        return self._loaded

    def _let_go(self) -> None:
        self._loaded = None
        self._batcher.forget()
        weights.return_memory()


_engines: dict[tuple[str, str], LocalEngine] = {}
_engines_lock = threading.Lock()


def shared_engine(
    model: str | Path, *, dtype: str = "auto", max_batch: int = 32, name: str | None = None
) -> LocalEngine:
    """The process's one engine for these weights and this precision; made when first asked for."""
    key = (str(weights.locate(str(model))), dtype)
    with _engines_lock:
        if key not in _engines:
            _engines[key] = LocalEngine(model, dtype=dtype, max_batch=max_batch, name=name)
        return _engines[key]


class AsyncLocalEngine(AsyncEngine):
    """The same engine for ``await lm.acall(...)``."""

    kind = LocalEngine


# A beginning of fewer tokens is not worth being kept apart.
SHORTEST_BEGINNING = 32

Messages = list[dict[str, str]]


class ChatTokens:
    """A tokenizer's chat template at work; the beginnings that it has met are remembered."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = {
            str(token) for token in tokenizer.added_tokens_decoder.values() if token.special
        } | {*tokenizer.all_special_tokens}
        # The longest first: one may begin with another.
        names = sorted((token for token in added if token.strip()), key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")

    def prompt(self, messages: Messages) -> tuple[int, ...]:
        """The tokens of ``messages`` and of the beginning of the answer."""
        return self._tokens(messages, True)

    def split(self, messages: Messages) -> tuple[tuple[int, ...], int]:
        """The prompt's tokens, and how many of them come from all messages but the last:
        instructions and worked examples, which are the same for every question. 0 when they are too
        few, or do not stand at the beginning."""
        tokens = self.prompt(messages)
        if len(messages) < 2:
            return tokens, 0
        head = self._tokens(messages[:-1], False)
        apart = SHORTEST_BEGINNING <= len(head) < len(tokens) and tokens[: len(head)] == head
        return tokens, len(head) if apart else 0

    def text(self, text: str) -> tuple[int, ...]:
        """The tokens of a text, none of them special."""
        return self._encoded(self._special.split(text))

    def _tokens(self, messages: Messages, answering: bool) -> tuple[int, ...]:
        """The text of special tokens is taken out of the messages while the template is applied; a
        mark stands there for each."""
        hidden: list[str] = []
        start = _unused(messages)

        def hide(found: re.Match[str]) -> str:
            hidden.append(found.group())
            return f"{start}{len(hidden) - 1}{_END}"

        plain = [
            {**message, "content": self._special.sub(hide, message["content"])}
            for message in messages
        ]
        whole = self._tokenizer.apply_chat_template(
            plain, add_generation_prompt=answering, tokenize=False
        )
        parts = re.split(rf"{start}(\d+){_END}", whole) if hidden else [whole]
        return self._encoded(
            [hidden[int(part)] if place % 2 else part for place, part in enumerate(parts)]
        )

    def _encoded(self, parts: list[str]) -> tuple[int, ...]:
        """The tokens of the parts, one after the other. Every second part is the text of a special
        token, and encoded as text."""
        tokens: list[int] = []
        for place, part in enumerate(parts):
            as_text = {"split_special_tokens": True} if place % 2 else {}
            tokens += self._tokenizer(part, add_special_tokens=False, **as_text)["input_ids"]
        return tuple(tokens)


# Signs of Unicode's private use: no template changes them.
_START, _END = "\ue000", "\ue001"


def _unused(messages: Messages) -> str:
    """How a mark begins that none of the messages has."""
    start = _START
    while any(start in message["content"] for message in messages):
        start += _START
    return start
