"""Requests of any number of threads -> batches: one queue, one worker, and requests join a batch
that is on its way.

A request joins as soon as enough of them wait to be worth a pass over the weights, or after a few
steps of patience. While another engine of the process waits for its turn, nobody joins any more,
and the batch runs to its end. When a batch fails, its halves are tried, so that the failure (or the
lack of memory) falls on the one request that it belongs to.

Engines of one process share its cores: two batches at once would only slow each other down, so they
take turns (:data:`COMPUTE`), and all of their work is done in one thread. OpenMP keeps a team of
workers for every thread that has computed, and as soon as there are more of them than cores, its
barriers wait in the kernel instead of in a loop: a step of decoding, which has a thousand short
products, took 220 ms instead of 130 (64 rows of 135 million parameters on two cores). For the same
reason the thread ends when it has had nothing to do for a moment: training, in its own thread, then
has the cores to itself.
"""

from __future__ import annotations

import atexit
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from dspy.lm15 import (
    InvalidRequestError,
    Response,
    StreamDeltaEvent,
    StreamEndEvent,
    StreamStartEvent,
    TextDelta,
)

from cowest_dspy.lms.local import weights
from cowest_dspy.lms.local.attention import Prefix, compute_prefix
from cowest_dspy.lms.local.generate import PREFILL_TOKENS, Finished
from cowest_dspy.lms.local.lora import LoraModel
from cowest_dspy.lms.local.sampling import Completion, PromptRow

Result = TypeVar("Result")

_IDLE = 0.5  # seconds
_LAST_WAIT = 30.0  # seconds
PREFIXES_KEPT = 8
PATIENCE = 8  # steps that a request waits for others to join with
# A batch that is not full waits so many seconds for threads that are about to ask.
_LULL = 0.02


class ComputeThread:
    """Work of many threads, done in one, in the order in which it was asked for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tasks: queue.Queue[tuple[Callable[[], Any], Future[Any]]] = queue.Queue()
        self._thread: threading.Thread | None = None
        self.ending = False
        atexit.register(self._end)

    def _end(self) -> None:
        """At the end of the process: waits for the work in hand. Python ends threads that are in
        the midst of a computation by unwinding them, which C++ answers by aborting the process.
        Long work looks at ``ending`` now and then, and stops."""
        self.ending = True
        thread = self._thread
        if thread is not None:
            thread.join(_LAST_WAIT)

    @property
    def wanted(self) -> bool:
        """Whether other work waits for its turn."""
        return not self._tasks.empty()

    def run(self, work: Callable[[], Result]) -> Result:
        """The result of ``work()`` when its turn has come; at once in the computing thread."""
        if threading.current_thread() is self._thread:
            return work()
        result: Future[Result] = Future()
        with self._lock:
            self._tasks.put((work, result))
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._serve, name="cowest compute", daemon=True
                )
                self._thread.start()
        return result.result()

    def _serve(self) -> None:
        while True:
            try:
                work, result = self._tasks.get(timeout=_IDLE)
            except queue.Empty:
                with self._lock:
                    if self._tasks.empty():
                        self._thread = None
                        return
                continue
            if self.ending:
                return
            try:
                result.set_result(work())
            except BaseException as error:
                result.set_exception(error)
            # Otherwise the weights that a task closes over would live until the next one.
            del work, result
            if self.ending:
                return


COMPUTE = ComputeThread()


class Batch(Protocol):
    """The interface of a batch: :class:`cowest_dspy.lms.local.generate.Session` or
    :class:`cowest_dspy.lms.local.generate.PlainSession`."""

    @property
    def live(self) -> int:
        """The number of rows on their way."""
        ...

    @property
    def adapters(self) -> list[str | None]:
        """The adapters of the rows on their way."""
        ...

    def admit(self, rows: Sequence[PromptRow]) -> Finished:
        """Take rows in."""
        ...

    def step(self) -> Finished:
        """One more token for every row."""
        ...


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory: its weights and adapters, and how a batch of it is begun. ``joinable``:
    rows may come in later."""

    lora: LoraModel
    tokenizer: Any
    end_tokens: frozenset[int]
    begin: Callable[[], Batch]
    joinable: bool


@dataclass(eq=False)
class PendingRequest:
    """One request on its way: its prompt, how many tokens of it others may share, how to continue
    it, and where that goes."""

    tokens: tuple[int, ...]
    head: int
    row: PromptRow
    future: Future[Completion] = field(default_factory=Future)
    waited: int = 0

    @property
    def prompt(self) -> tuple[str | None, tuple[int, ...]]:
        """The key of requests that share one prompt."""
        return (self.row.adapter, self.tokens)


class Batcher:
    """The queue of one engine, and the thread that works on it.

    Args:
        open: gives the model in memory; called at the beginning of every batch.
        max_batch: sequences computed together, at most.
        name: of the thread.
    """

    def __init__(self, open: Callable[[], LoadedModel], max_batch: int, name: str) -> None:
        self._open, self._max_batch, self._name = open, max_batch, name
        self._queue: queue.Queue[PendingRequest] = queue.Queue()
        self._prefixes: OrderedDict[tuple[str | None, tuple[int, ...]], Prefix] = OrderedDict()
        self._worker: threading.Thread | None = None
        self._starting = threading.Lock()

    def submit(self, work: PendingRequest) -> None:
        """Put a request into the queue; its future is set when it is answered."""
        with self._starting:
            if self._worker is None or not self._worker.is_alive():
                self._worker = threading.Thread(
                    target=self._work_forever, name=self._name, daemon=True
                )
                self._worker.start()
        self._queue.put(work)

    def forget(self) -> None:
        """Free the stored prefixes."""
        self._prefixes.clear()

    def prefix(self, loaded: LoadedModel, adapter: str | None, tokens: tuple[int, ...]) -> Prefix:
        """The keys and values of a prompt's beginning; the last few are stored."""
        key = (adapter, tokens)
        if key not in self._prefixes:
            model = loaded.lora.select([adapter])
            self._prefixes[key] = compute_prefix(
                model, loaded.lora.model.config, tokens, loaded.lora.model.device
            )
        self._prefixes.move_to_end(key)
        while len(self._prefixes) > PREFIXES_KEPT:
            self._prefixes.popitem(last=False)
        return self._prefixes[key]

    def _work_forever(self) -> None:
        waiting: list[PendingRequest] = []
        while True:
            if not waiting:
                waiting.append(self._queue.get())
            COMPUTE.run(lambda: self._turn(waiting))

    def _turn(self, waiting: list[PendingRequest]) -> None:
        waiting.extend(self._arrived(self._max_batch - len(waiting)))
        self._run_batch(waiting)

    def _arrived(self, wanted: int) -> list[PendingRequest]:
        """The requests that have come in; as long as fewer than ``wanted`` have, after a moment for
        threads that are about to ask."""
        arrived: list[PendingRequest] = []
        while True:
            try:
                arrived.append(self._queue.get(block=len(arrived) < wanted, timeout=_LULL))
            except queue.Empty:
                return arrived

    def _run_batch(self, waiting: list[PendingRequest]) -> None:
        """Work on ``waiting`` and on what comes in meanwhile; what is left in it has to wait for
        the next turn."""
        try:
            loaded = self._open()
        except Exception as error:
            while waiting:
                waiting.pop().future.set_exception(error)
            return
        alive: dict[PromptRow, PendingRequest] = {}
        joining: list[PendingRequest] = []
        batch, first = loaded.begin(), True
        try:
            while (first or batch.live) and not COMPUTE.ending:
                joining = (
                    self._joining(waiting, batch, loaded) if first or not COMPUTE.wanted else []
                )
                first = False
                if joining:
                    came = {self._row(loaded, work): work for work in joining}
                    alive.update(came)
                    _settle(batch.admit(list(came)), alive)
                if batch.live:
                    _settle(batch.step(), alive)
                waiting.extend(self._arrived(0))
        except Exception as error:
            unanswered = [work for work in {*alive.values(), *joining} if not work.future.done()]
            self._answer_halves(unanswered or waiting[:1], error)
            waiting[:] = [work for work in waiting if not work.future.done()]

    def _joining(
        self, waiting: list[PendingRequest], batch: Batch, loaded: LoadedModel
    ) -> list[PendingRequest]:
        """Take out of ``waiting`` what joins now: in the order of arrival, those of one prompt
        together."""
        room = self._max_batch - batch.live
        if not waiting or room < 1 or (batch.live and not loaded.joinable):
            return []
        prompts: dict[Any, list[PendingRequest]] = {}
        for work in waiting:
            prompts.setdefault(work.prompt, []).append(work)
        taken: list[PendingRequest] = []
        for together in prompts.values():
            if (taken or batch.live) and len(taken) + len(together) > room:
                break
            if self._mix(
                [*batch.adapters, *(work.row.adapter for work in taken)],
                together[0].row.adapter,
                loaded,
            ):
                taken += together[: room - len(taken)]
        if batch.live and not self._worth_a_pass(taken):
            for work in waiting:
                work.waited += 1
            return []
        gone = {id(work) for work in taken}
        waiting[:] = [work for work in waiting if id(work) not in gone]
        return taken

    def _mix(self, present: Sequence[str | None], adapter: str | None, loaded: LoadedModel) -> bool:
        if set(present) <= {adapter}:
            return True
        try:
            return loaded.joinable and loaded.lora.can_mix([*present, adapter])
        # An adapter that cannot be loaded, for whatever reason of PEFT's, of safetensors' or of the
        # disk's: in a batch of its own it is loaded again, and the error falls on those who asked
        # for it.
        except Exception:
            return False

    def _worth_a_pass(self, taken: Sequence[PendingRequest]) -> bool:
        if not taken:
            return False
        tokens = sum({work.prompt: len(work.row.tokens) for work in taken}.values())
        patient = max(work.waited for work in taken) < PATIENCE
        return not patient or tokens >= PREFILL_TOKENS or len(taken) >= self._max_batch // 4

    def _row(self, loaded: LoadedModel, work: PendingRequest) -> PromptRow:
        """The row of a request, behind the beginning that it shares."""
        if not work.head:
            return work.row
        return replace(
            work.row, prefix=self.prefix(loaded, work.row.adapter, work.tokens[: work.head])
        )

    def _answer_halves(self, works: list[PendingRequest], error: Exception) -> None:
        """After a failure: each half for itself, down to the request that it belongs to."""
        weights.return_memory()
        if not works:
            return
        if len(works) == 1:
            works[0].future.set_exception(_explained(error, works[0]))
            return
        middle = len(works) // 2
        for half in (works[:middle], works[middle:]):
            self._answer_together(half)

    def _answer_together(self, works: list[PendingRequest]) -> None:
        alive: dict[PromptRow, PendingRequest] = {}
        try:
            loaded = self._open()
            batch = loaded.begin()
            alive.update({self._row(loaded, work): work for work in works})
            adapters = {work.row.adapter for work in works}
            if len(adapters) > 1 and not (loaded.joinable and loaded.lora.can_mix(list(adapters))):
                raise RuntimeError("these adapters cannot stand in one batch")
            _settle(batch.admit(list(alive)), alive)
            while batch.live:
                _settle(batch.step(), alive)
        except Exception as error:
            self._answer_halves([work for work in works if not work.future.done()], error)


def _settle(finished: Finished, alive: dict[PromptRow, PendingRequest]) -> None:
    for row, completion in finished:
        alive.pop(row).future.set_result(completion)


def _explained(error: Exception, work: PendingRequest) -> Exception:
    """A lack of memory in words; any other failure as it is."""
    if not isinstance(error, MemoryError) and "memory" not in str(error).lower():
        return error
    explained = InvalidRequestError(
        f"Out of memory for one request alone, of {len(work.tokens)} prompt tokens and max_tokens "
        f"= {work.row.max_tokens}. "
        f"Shorten it, lower max_tokens, or use a smaller model or precision. ({error})"
    )
    explained.__cause__ = error
    return explained


# What a tokenizer writes for a character of which it has seen only some bytes.
_UNFINISHED = "\ufffd"


class TextStream:
    """The text of a row while it is generated, from its tokens, which the computing thread puts in
    after each one.

    Only what is certain is passed on: no half characters, and nothing that may turn out to be the
    beginning of a stop string.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._held = max((len(stop) - 1 for stop in stops), default=0)
        self._tokens: queue.SimpleQueue[tuple[int, ...] | None] = queue.SimpleQueue()

    def __call__(self, tokens: Sequence[int]) -> None:
        """Another token has come."""
        self._tokens.put(tuple(tokens))

    def end(self) -> None:
        """Nothing more will come."""
        self._tokens.put(None)

    def texts(self) -> Iterator[str]:
        """The text so far, again and again, each time longer; ends with :meth:`end`."""
        while (tokens := self._tokens.get()) is not None:
            text = self._tokenizer.decode(tokens, skip_special_tokens=True)
            certain = text[: len(text) - self._held]
            if certain and not certain.endswith(_UNFINISHED):
                yield certain


def events(model: str, stream: TextStream, result: Callable[[], Response]) -> Iterator[Any]:
    """The events of one answer: its beginning, its text in pieces, and its end with the tokens
    used. ``result`` gives the whole answer, or raises why there is none."""
    yield StreamStartEvent(model=model)
    sent = ""
    for text in stream.texts():
        if text.startswith(sent) and len(text) > len(sent):
            yield StreamDeltaEvent(delta=TextDelta(text=text[len(sent) :]))
            sent = text
    response = result()
    rest = (response.message.text or "")[len(sent) :]
    if rest or response.logprobs:
        yield StreamDeltaEvent(delta=TextDelta(text=rest, logprobs=response.logprobs or ()))
    yield StreamEndEvent(finish_reason=response.finish_reason, usage=response.usage)
