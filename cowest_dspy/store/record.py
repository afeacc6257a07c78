"""A bound LM: its calls are collected for listeners, and served from a ledger where there is one.

``recorded(lm)`` is a ``dspy.LM`` that behaves like ``lm``, in the context of call_context.py.
Inside ``with listening() as calls:`` each of its calls is appended to ``calls`` with its messages,
raw completion and finish reason, whatever module or adapter made it. Inside ``with
keeping(ledger):`` a call that the ledger knows is answered by it, and any other is committed to it
before it is used.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import dspy
from dspy.lm15 import LM15Error, Request, Response
from dspy.utils.exceptions import AdapterParseError, LMError, LMServerError

from cowest_dspy.compat import has_async_engine
from cowest_dspy.errors import masked
from cowest_dspy.store import serialize
from cowest_dspy.store.call_context import Call, call_context, with_context
from cowest_dspy.store.rate_limit import retry
from cowest_dspy.utils.masking import remember_secret

EXPECTED_FAILURES = (LMError, LM15Error, AdapterParseError)
LONGEST_PAUSE = 30.0


UNUSABLE = ("parse", "refusal", "truncated")
"""Kinds of failures of answers that were given. Of any other kind the call itself failed, and the
ledger knows of it."""


def _is_news(record: logging.LogRecord) -> bool:
    """Whether DSPy's log may say it: where endings are counted, a line for each of some hundred
    drafts that were cut off would hide everything else."""
    cut_off = "LM response was truncated" in record.getMessage()
    return not (cut_off and call_context().counted)


logging.getLogger("dspy.clients.lm").addFilter(_is_news)


def call_failed(error: str | None) -> bool:
    """Whether an error ("kind: text") is that of a call that got no answer, which can be made
    again; an answer that was given and cannot be used is kept."""
    return error is not None and error.partition(":")[0].rpartition(" ")[2] not in UNUSABLE


def count_unusable(kind: str) -> None:
    """Count an answer that was given and cannot be used, if the ledger counts failures."""
    counts = getattr(call_context().ledger, "count_unusable", None)
    if counts is not None and kind in UNUSABLE:
        counts(kind)


def recorded(lm: dspy.LM) -> dspy.LM:
    """``lm`` with its calls noted; the same object when it is recorded already. Its keys and
    endpoint stay inside ``lm``."""
    if isinstance(lm.engine, RecordingEngine):
        return lm
    from dspy.clients.backend_selection import CLIENT_KEYS

    options = {
        key: value
        for key, value in lm.kwargs.items()
        if key not in CLIENT_KEYS and value is not None
    }
    remember_secret(lm.kwargs.get("api_key"))
    engine = RecordingEngine(lm)
    return RecordedLM(
        lm.model,
        engine=engine,
        async_engine=AsyncRecordingEngine(engine),
        provider=lm.provider,
        cache=False,
        num_retries=0,
        **options,
    )


def unrecorded(lm: dspy.LM) -> dspy.LM:
    """The LM behind a recorded one, under the recorded one's model id; any other LM as it is."""
    engine = lm.engine
    return engine.inner_for(lm.model) if isinstance(engine, RecordingEngine) else lm


class RecordedLM(dspy.LM):
    """A bound LM, made by :func:`recorded`. A copy for another rollout, as DSPy's samplers make it,
    draws other samples, and a ledger keeps them apart: the rollout is the seed of calls that have
    none, and makes another one of the seed of those that have. Its calls are in the history of the
    LM behind, too: that is the one that a user has in hand."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Ask like ``dspy.LM``."""
        with _streaming_behind():
            return super().__call__(*args, **kwargs)

    async def acall(self, *args: Any, **kwargs: Any) -> Any:
        """Ask like ``dspy.LM.acall``."""
        with _streaming_behind():
            return await super().acall(*args, **kwargs)

    def copy(self, **kwargs: Any) -> dspy.LM:
        """Copy like ``dspy.LM.copy``."""
        rollout, engine = kwargs.get("rollout_id"), self.engine
        if rollout is not None and "engine" not in kwargs and isinstance(engine, RecordingEngine):
            varied = RecordingEngine(engine.inner, int(rollout))
            kwargs |= {"engine": varied, "async_engine": AsyncRecordingEngine(varied)}
        return super().copy(**kwargs)

    def update_history(self, entry: Any) -> None:
        """Note a call where DSPy does, and in the history of the LM behind."""
        super().update_history(entry)
        most = dspy.settings.max_history_size
        if most and isinstance(self.engine, RecordingEngine):
            history = self.engine.inner.history
            del history[: max(0, len(history) + 1 - most)]
            history.append(entry)

    def dump_state(self) -> dict[str, Any]:
        """Nothing: a saved program, also one that contains a Collaboration, has no bound LM in it.
        Models are bound again when it is loaded."""
        return {}


@contextmanager
def _streaming_behind() -> Iterator[None]:
    """Leave an answer that is streamed to the LM behind, which has it piece by piece: the recorded
    one would stream the whole of it once more."""
    stream = dspy.settings.send_stream
    if stream is None:
        yield
        return
    with with_context(stream=stream), dspy.context(send_stream=None):
        yield


class RecordingEngine:
    """An engine that asks another ``dspy.LM`` and records its answers. ``rollout`` is the seed of a
    call that has none; with the seed of a call it makes another, so that the rollouts of a draft
    that is itself sampled differ too."""

    def __init__(self, inner: dspy.LM, rollout: int | None = None) -> None:
        self.inner, self._rollout = inner, rollout
        self.supports_function_calling = inner.supports_function_calling
        self.supports_reasoning = inner.supports_reasoning
        self.supports_response_schema = inner.supports_response_schema
        self.supported_params = inner.supported_params
        # The LM around us has checked the request, and an LM that neither caches nor retries would
        # only do so again.
        plain = type(inner) is dspy.LM and not isinstance(inner.engine, str) and not inner.callbacks
        self._direct: Any = (
            inner.engine if plain and not inner.cache and not inner.num_retries else None
        )
        self._once: dict[str, dspy.LM] = {}

    def inner_for(self, model: str) -> dspy.LM:
        """The LM behind this engine, under the id ``model`` (an adapter's, for instance)."""
        return self.inner if self.inner.model == model else self.inner.copy(model=model)

    def complete(self, request: Request) -> Response:
        """The answer of the LM behind, or of the ledger; recorded for a listener."""
        request, plain = self._sampled(request)

        def ask() -> Response:
            if self._direct is not None and call_context().stream is None:
                return self._direct.complete(plain)
            with _behind():
                return self._tried(plain)

        ledger = call_context().ledger
        response, cached = ledger.answer(request, ask) if ledger else (ask(), False)
        self._record(request, response, cached)
        return response

    async def acomplete(self, request: Request) -> Response:
        """The answer as :meth:`complete` gives it, the LM behind awaited.

        In a thread where there is a ledger, whose calls are synchronous, or where the LM behind has
        no asynchronous engine. DSPy makes the retries of an LM that is awaited.
        """
        inner = self.inner_for(request.model)
        if call_context().ledger is not None or not has_async_engine(inner):
            asyncify: Any = dspy.asyncify  # of any callable; DSPy types it as of modules
            return await asyncify(self.complete)(request)
        request, plain = self._sampled(request)
        with _behind():
            answer = await inner.acall(plain, **self._rollout_id)
            response = _require_answer(answer, request.model)
        self._record(request, response, cached=False)
        return response

    def _sampled(self, request: Request) -> tuple[Request, Request]:
        """The request with the settings of the context and the rollout's seed, by which it is kept;
        and as it is asked, without a seed that the LM behind does not know."""
        settings = call_context().sampling
        if settings:
            request = replace(request, config=replace(request.config, **settings))
        if self._rollout is None:
            return request, request
        seed = _of_both(request.config.seed, self._rollout)
        seeded = replace(request, config=replace(request.config, seed=seed))
        return seeded, seeded if "seed" in (self.supported_params or ()) else request

    @property
    def _rollout_id(self) -> dict[str, Any]:
        """What keeps rollouts apart in the cache of the LM behind."""
        return {} if self._rollout is None else {"rollout_id": self._rollout}

    def _record(self, request: Request, response: Response, cached: bool) -> None:
        context = call_context()
        if context.calls is not None:
            answer = serialize.response_to_dict(response)
            context.calls.append(
                Call(
                    request.model,
                    tuple(serialize.request_messages(request)),
                    answer["text"],
                    answer["finish_reason"],
                    answer["input_tokens"],
                    answer["output_tokens"],
                    cached,
                    answer["usd"],
                    request=serialize.request_key(request),
                )
            )

    def _tried(self, request: Request) -> Response:
        """The answer of the LM behind, whose own cache keeps rollouts apart. DSPy's retries are
        made here: each of them is counted, and a stop ends the wait for it. Of an answer that is
        streamed they stay with DSPy, which knows what has been shown."""
        lm = self.inner_for(request.model)
        options, paying = self._rollout_id, call_context().paying
        if dspy.settings.send_stream is not None and not (paying and paying.limited):
            return _require_answer(lm(request, **options), request.model)
        once = self._without_retries(lm)

        def pause(error: LMError, number: int) -> float:
            if error.status == 200:  # No answer in it, and DSPy's own cache may hold it.
                options["cache"] = False
            return min(max(error.retry_after or 0.0, 0.5 * 2**number), LONGEST_PAUSE)

        return retry(
            lambda: _require_answer(once(request, **options), request.model), lm.num_retries, pause
        )

    def _without_retries(self, lm: dspy.LM) -> dspy.LM:
        """The LM as one that asks once: the same copy each time, since a copy has connections of
        its own."""
        if lm.num_retries and lm.model not in self._once:
            self._once[lm.model] = lm.copy(num_retries=0)
        return self._once.get(lm.model, lm)

    def __deepcopy__(self, memo: dict[int, Any]) -> RecordingEngine:
        return self


class AsyncRecordingEngine:
    """A :class:`RecordingEngine` for ``await lm.acall(...)``."""

    def __init__(self, engine: RecordingEngine) -> None:
        self.engine = engine

    async def complete(self, request: Request) -> Response:
        """The answer, recorded."""
        return await self.engine.acomplete(request)

    def __deepcopy__(self, memo: dict[int, Any]) -> AsyncRecordingEngine:
        return self


@contextmanager
def _behind() -> Iterator[None]:
    """Ask the LM behind a recorded one: it streams, and leaves history and usage, which the
    recorded one notes."""
    stream = call_context().stream
    with dspy.context(disable_history=True, usage_tracker=None, send_stream=stream):
        yield


def _of_both(seed: int | None, rollout: int) -> int:
    """The seed of a rollout, in 31 bits where the call has a seed of its own."""
    if seed is None:
        return rollout
    return (
        int.from_bytes(hashlib.sha256(f"{seed}|rollout {rollout}".encode()).digest()[:4], "big")
        >> 1
    )


def _require_answer(response: Response, model: str) -> Response:
    """The response, if it is one.

    Raises:
        LMServerError: there is no answer in it.
    """
    if serialize.lacks_answer(response):
        raise LMServerError(
            "The server answered, but with no answer of a model in it.", model=model, status=200
        )
    return response


_KINDS = (
    ("timeout", ("timeout",)),
    ("rate limit", ("ratelimit",)),
    ("context", ("contextlength", "contextwindow")),
    ("server", ("server", "serviceunavailable")),
    ("transport", ("transport", "connection", "network")),
    ("auth", ("auth",)),
    ("billing", ("billing",)),
    ("parse", ("parse",)),
)


def failure_in(calls: Iterable[Call]) -> str | None:
    """Why answered calls are no whole answer, as ``"kind: text"``: one was refused, or ended
    because ``max_tokens`` was reached."""
    ends = {call.finish_reason for call in calls if not call.left_out}
    if "content_filter" in ends:
        return "refusal: the provider or the model refused to answer"
    return "truncated: max_tokens was reached before the end" if "length" in ends else None


def failure(error: BaseException) -> str:
    """An expected failure as ``"kind: text"``, for instance ``"timeout: ..."``; kinds are those
    that tables count."""
    deepest = error
    while isinstance(deepest.__cause__, EXPECTED_FAILURES):
        deepest = deepest.__cause__
    name = type(deepest).__name__.lower()
    kind = next((kind for kind, words in _KINDS if any(word in name for word in words)), "error")
    return f"{kind}: {masked(' '.join(str(deepest).split()))[:300]}"
