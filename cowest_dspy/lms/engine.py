"""TransformersEngine: a transformers model behind ``dspy.LM(engine=...)``; requests of any number of threads form batches.

    engine = TransformersEngine("models/SmolLM2-135M-Instruct")
    weak = engine.lm(temperature=0.0, max_tokens=64)         # a dspy.LM
    tuned = weak.copy(model=engine.load_adapter(folder))     # the same weights, with an adapter

The engine routes on ``request.model``: the base and every adapter share one copy of the weights. It owns no cache and no retry;
DSPy and the run's store do. It can be copied, pickled and saved with a program: only its settings travel, never the weights.
"""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dspy
from dspy.lm15 import ContextLengthError, InvalidRequestError, Request, Response, TokenLogprob, response_to_events

from cowest_dspy.errors import ModelError
from cowest_dspy.lms import generation, likelihood, weights, wire

PREFIXES_KEPT = 8
SHORTEST_PREFIX = 32
SUPPORTED = ("max_tokens", "temperature", "top_p", "top_k", "stop", "seed", "logprobs")

# Engines share the machine's cores: two batches at once would only slow each other down.
_compute = threading.Lock()


@dataclass(frozen=True)
class _Work:
    """One request on its way: its prompt in tokens, the length of its shareable beginning, and where the answer goes."""

    tokens: tuple[int, ...]
    head: int
    row: generation.Row
    model: str
    future: Future[generation.Completion]


class TransformersEngine:
    """A model folder or Hub id as a DSPy engine on this machine (CPU or one GPU).

    Args:
        model: a folder with config.json and *.safetensors, or a Hub id.
        dtype: "auto" (bfloat16 where the hardware computes in it), "float32", "bfloat16", "float16", or "int8" (on a CPU
            several times faster for models of a billion parameters and more, see lms/int8.py; part of the model's id).
        max_batch: sequences computed together, at most.
        name: how the model is called in ids; by default the folder's name.

    Weights are loaded at the first request.
    """

    supports_function_calling = False
    supports_reasoning = False
    supports_response_schema = False
    supported_params = frozenset(SUPPORTED)

    def __init__(self, model: str | Path, *, dtype: str = "auto", max_batch: int = 32, name: str | None = None) -> None:
        self.base_folder = str(weights.locate(str(model)))
        self.dtype, self.max_batch = dtype, max_batch
        self.name = name or Path(str(model)).name
        precision = "-int8" if dtype == "int8" else ""
        self.model_id = f"local/{self.name}@{weights.folder_hash(Path(self.base_folder))}{precision}"
        self._adapters: dict[str, Path] = {}
        self._queue: queue.Queue[_Work] = queue.Queue()
        self._loading = threading.RLock()
        self._model: Any = None
        self._tokenizer: Any = None
        self._worker: threading.Thread | None = None
        self._loaded_adapters: set[str] = set()
        self._prefixes: OrderedDict[tuple[str, tuple[int, ...]], generation.Prefix] = OrderedDict()

    def lm(self, model: str | None = None, **settings: Any) -> dspy.LM:
        """A ``dspy.LM`` on this engine; ``model`` is an adapter's id (default: the base), ``settings`` as of ``dspy.LM``.

        DSPy's own response cache is off: it would answer from disk without knowing about runs. ``cowest_dspy.tuning``
        makes the LM tunable.
        """
        settings.setdefault("cache", False)
        return dspy.LM(model or self.model_id, engine=self, async_engine=AsyncTransformersEngine(self), **settings)

    # What DSPy calls

    def complete(self, request: Request) -> Response:
        """Answers one request; blocks until the batch that it joined has got to its end.

        Raises:
            dspy.lm15.InvalidRequestError: a model id or a setting that this engine does not know.
            dspy.lm15.ContextLengthError: the prompt and ``max_tokens`` do not fit the model's context.
        """
        work = self._work(request)
        self._ensure_worker()
        self._queue.put(work)
        done = work.future.result()
        logprobs = None if done.scores is None else tuple(map(self._logprob, done.scores))
        return wire.make_response(
            request.model, done.text, done.finish_reason, len(work.tokens), len(done.tokens), logprobs, usd=0.0
        )

    def stream(self, request: Request) -> Any:
        """The finished answer as a stream of events (the text comes in one piece)."""
        return response_to_events(self.complete(request))

    def score(self, asked: Sequence[tuple[list[dict[str, str]], str]], model: str | None = None) -> list[likelihood.Likelihood]:
        """How likely the model finds texts as its answers: for each (chat messages, text) the log-probability of that text and
        of ending there, in order. Nothing is sampled.

        ``model`` is an adapter's id; by default the base is asked.

        Raises:
            dspy.lm15.ContextLengthError: a prompt and its text do not fit the model's context.
            ModelError: a model id that this engine does not know.
        """
        self._load()
        rows = [self._scorable(messages, text) for messages, text in asked]
        groups: dict[tuple[int, ...], list[int]] = {}
        for place, (tokens, head, _) in enumerate(rows):
            groups.setdefault(tokens[:head], []).append(place)
        found: dict[int, likelihood.Likelihood] = {}
        for head, places in groups.items():
            with _compute:
                self._load()
                with self._speaking_as(model or self.model_id):
                    prefix = self._prefix(model or self.model_id, head) if head else None
                    parts = [(rows[place][0][len(head) :], rows[place][2]) for place in places]
                    found.update(zip(places, likelihood.score(self._model, parts, prefix), strict=True))
        return [found[place] for place in range(len(rows))]

    def close(self) -> None:
        """Lets go of the weights; the next request loads them again."""
        with _compute, self._loading:
            self._model = None
            self._loaded_adapters.clear()
            self._prefixes.clear()
            weights.return_memory()

    def __deepcopy__(self, memo: dict[int, Any]) -> TransformersEngine:
        return self

    def __copy__(self) -> TransformersEngine:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return (TransformersEngine.load_state, (self.dump_state(),))

    def dump_state(self) -> dict[str, Any]:
        """What is needed to make the engine again: settings and the folders of its adapters, no weights."""
        adapters = {model: str(folder) for model, folder in self._adapters.items()}
        return {
            "model": self.base_folder,
            "dtype": self.dtype,
            "max_batch": self.max_batch,
            "name": self.name,
            "adapters": adapters,
        }

    @classmethod
    def load_state(cls, state: dict[str, Any]) -> TransformersEngine:
        """The process's engine for this state; one per model, however many predictors name it.

        Raises:
            ModelError: an adapter's folder is gone, or holds other weights than when the state was saved.
        """
        engine = shared_engine(state["model"], dtype=state["dtype"], max_batch=state["max_batch"], name=state["name"])
        for model, folder in state.get("adapters", {}).items():
            if engine.load_adapter(Path(folder)) != model:
                raise ModelError(f"{folder} does not hold the weights of {model} any more.")
        return engine

    # Adapters

    def load_adapter(self, folder: Path) -> str:
        """Makes a PEFT adapter available; gives its model id, which ends in a hash of the adapter's weights.

        Raises:
            ModelError: the folder holds no adapter, or the engine computes in int8.
        """
        if self.dtype == "int8":
            raise ModelError(f'{self.model_id}: adapters need float weights. Set dtype = "auto" for a model that is tuned.')
        model = f"{self.model_id}+{weights.adapter_hash(folder)}"
        self._adapters.setdefault(model, Path(folder).resolve())
        return model

    def adapter_folder(self, model: str) -> Path | None:
        """The folder of the adapter that the model id ``model`` names; None for the base.

        Raises:
            ModelError: an id that is neither the base nor a loaded adapter.
        """
        if model == self.model_id:
            return None
        if model not in self._adapters:
            raise ModelError(f"{model} is not loaded here: the engine has {[self.model_id, *self._adapters]}.")
        return self._adapters[model]

    # From requests to batches

    def _work(self, request: Request) -> _Work:
        described = wire.request_to_dict(request)
        config = described["config"]
        unknown = [name for name in config if name not in SUPPORTED]
        if unknown or (request.model != self.model_id and request.model not in self._adapters):
            wrong = f"settings {unknown}" if unknown else f"the model {request.model}"
            raise InvalidRequestError(f"{self.model_id}: this engine does not know {wrong}.")
        self._load()
        tokens, head = self._tokenize(described["messages"])
        room = self._room(tokens)
        if room < 1 or config.get("max_tokens", 1) > room:
            raise ContextLengthError(
                f"{self.model_id}: {len(tokens)} prompt tokens and max_tokens={config.get('max_tokens')} do not fit its context."
            )
        row = generation.Row(
            tokens[head:],
            config.get("max_tokens", min(room, 512)),
            temperature=float(config.get("temperature", 0.0)),
            top_p=float(config.get("top_p", 1.0)),
            top_k=int(config.get("top_k", 0)),
            seed=int(config.get("seed", 0)),
            stop=tuple(config.get("stop", ())),
            logprobs=config.get("logprobs"),
        )
        return _Work(tokens, head, row, request.model, Future())

    def _room(self, tokens: tuple[int, ...]) -> int:
        """How many tokens the context still takes after these."""
        return getattr(self._model.config, "max_position_embeddings", 1 << 30) - len(tokens)

    def _scorable(self, messages: list[dict[str, str]], text: str) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
        """The prompt's tokens, how many of them can be shared, and the tokens of ``text`` with the end of the turn."""
        tokens, head = self._tokenize(messages)
        target = (*self._tokenizer(text, add_special_tokens=False)["input_ids"], self._tokenizer.eos_token_id)
        if len(target) > self._room(tokens):
            raise ContextLengthError(
                f"{self.model_id}: {len(tokens)} prompt tokens and a text of {len(target)} do not fit its context."
            )
        return tokens, head, target

    def _logprob(self, score: generation.TokenScore) -> TokenLogprob:
        top = [{"token": self._tokenizer.decode([token]), "logprob": lp, "token_id": token} for token, lp in score.top]
        return wire.token_logprob(self._tokenizer.decode([score.token]), score.logprob, score.token, top)

    def _tokenize(self, messages: list[dict[str, str]]) -> tuple[tuple[int, ...], int]:
        """The prompt's tokens, and how many of them come from all messages but the last (0 when too few to share)."""
        tokens = self._template(messages, True)
        if len(messages) < 2 or not self._can_share:
            return tokens, 0
        head = self._template(messages[:-1], False)
        shared = len(head) if SHORTEST_PREFIX <= len(head) < len(tokens) and tokens[: len(head)] == head else 0
        return tokens, shared

    def _template(self, messages: list[dict[str, str]], prompt: bool) -> tuple[int, ...]:
        text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _load(self) -> None:
        with self._loading:
            if self._model is None:
                self._tokenizer = weights.load_tokenizer(Path(self.base_folder))
                self._model = weights.load_model(Path(self.base_folder), self.dtype)
                self._can_share = weights.shares_prefix(self._model)
                self._end_tokens = weights.end_tokens(self._model, self._tokenizer)

    def _ensure_worker(self) -> None:
        with self._loading:
            if self._worker is None or not self._worker.is_alive():
                self._worker = threading.Thread(target=self._work_forever, name=f"cowest {self.name}", daemon=True)
                self._worker.start()

    def _work_forever(self) -> None:
        waiting: list[_Work] = []
        while True:
            if not waiting:
                waiting.append(self._queue.get())
            with _compute:
                waiting.extend(self._arrived(len(waiting)))
                batch, waiting = self._pick(waiting)
                self._answer(batch)

    def _arrived(self, already: int) -> list[_Work]:
        """What has come in; a batch that is not full waits a moment for threads that are about to ask."""
        arrived: list[_Work] = []
        while already + len(arrived) < 16 * self.max_batch:
            try:
                full = already + len(arrived) >= self.max_batch
                arrived.append(self._queue.get(block=not full, timeout=0.02))
            except queue.Empty:
                break
        return arrived

    def _pick(self, waiting: list[_Work]) -> tuple[list[_Work], list[_Work]]:
        """The next batch and what stays: those that share model and beginning with the oldest, alike in length."""
        first = waiting[0]
        kin = [work for work in waiting if (work.model, work.tokens[: work.head]) == (first.model, first.tokens[: first.head])]
        kin.sort(key=lambda work: (len(work.tokens), work.tokens))
        batch = kin[: self.max_batch]
        taken = {id(work) for work in batch}
        return batch, [work for work in waiting if id(work) not in taken]

    def _answer(self, batch: list[_Work]) -> None:
        """Computes one batch; when memory runs out, its halves; any other failure goes to the requests of this batch only."""
        try:
            completions = self._generate(batch)
        except Exception as error:
            if len(batch) > 1 and "out of memory" in str(error).lower():
                self._answer(batch[: len(batch) // 2])
                self._answer(batch[len(batch) // 2 :])
                return
            for work in batch:
                work.future.set_exception(error)
            return
        for work, completion in zip(batch, completions, strict=True):
            work.future.set_result(completion)

    def _generate(self, batch: list[_Work]) -> list[generation.Completion]:
        self._load()
        first = batch[0]
        with self._speaking_as(first.model):
            prefix = self._prefix(first.model, first.tokens[: first.head]) if first.head else None
            return generation.generate(self._model, self._tokenizer, [w.row for w in batch], self._end_tokens, prefix)

    def _prefix(self, model: str, tokens: tuple[int, ...]) -> generation.Prefix:
        key = (model, tokens)
        if key not in self._prefixes:
            self._prefixes[key] = generation.compute_prefix(self._model, tokens)
        self._prefixes.move_to_end(key)
        while len(self._prefixes) > PREFIXES_KEPT:
            self._prefixes.popitem(last=False)
        return self._prefixes[key]

    def _speaking_as(self, model: str) -> Any:
        """A context in which the weights are those of ``model``: the base, or one of its adapters."""
        from contextlib import nullcontext

        folder = self.adapter_folder(model)
        if folder is None:
            return self._model.disable_adapter() if self._loaded_adapters else nullcontext()
        name = model.rpartition("+")[2]
        if not self._loaded_adapters:
            from peft import PeftModel

            self._model = PeftModel.from_pretrained(self._model, folder, adapter_name=name, autocast_adapter_dtype=False).eval()
        elif name not in self._loaded_adapters:
            self._model.load_adapter(folder, adapter_name=name, autocast_adapter_dtype=False)
        weights.fold_linears(self._model)
        self._loaded_adapters.add(name)
        self._model.set_adapter(name)
        return nullcontext()


_engines: dict[tuple[str, str], TransformersEngine] = {}
_engines_lock = threading.Lock()


def shared_engine(model: str | Path, *, dtype: str = "auto", max_batch: int = 32, name: str | None = None) -> TransformersEngine:
    """The process's one engine for these weights and this precision; made when first asked for."""
    key = (str(weights.locate(str(model))), dtype)
    with _engines_lock:
        if key not in _engines:
            _engines[key] = TransformersEngine(model, dtype=dtype, max_batch=max_batch, name=name)
        return _engines[key]


class AsyncTransformersEngine:
    """The same engine for ``lm.acall``: waiting happens in a thread, so that the event loop stays free."""

    def __init__(self, engine: TransformersEngine) -> None:
        self.engine = engine

    async def complete(self, request: Request) -> Response:
        """As :meth:`TransformersEngine.complete`."""
        import asyncio

        return await asyncio.to_thread(self.engine.complete, request)

    async def aclose(self) -> None:
        """As :meth:`TransformersEngine.close`."""
        self.engine.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> AsyncTransformersEngine:
        return self

    def dump_state(self) -> dict[str, Any]:
        """The state of the engine behind it."""
        return self.engine.dump_state()

    @classmethod
    def load_state(cls, state: dict[str, Any]) -> AsyncTransformersEngine:
        """The counterpart of the process's engine for this state."""
        return cls(TransformersEngine.load_state(state))
