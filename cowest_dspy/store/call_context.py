"""What a model is called for: the store that keeps the answer, how the call samples, who listens,
what stops it, and which budget pays.

    with keeping(store), sampling(temperature=1.0, seed=3), listening() as calls:
        program(question="...")          # a user's own dspy.Module, which knows nothing of these

Between our own functions such things are arguments. A call of a model goes through a user's
``dspy.Module`` or metric, and through DSPy's ``dspy.LM``, which hand none of them on. So they stand
in one value, :class:`CallContext`, in ``dspy.context``: that is DSPy's own way, and its executors
(Evaluate, Parallel, optimisers) carry it to their threads.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import dspy
from dspy.lm15 import Request, Response

from cowest_dspy.store.budget import Paying


@dataclass(frozen=True)
class Call:
    """One answered call: chat messages in, raw text out. ``cached``: it came from the ledger and
    cost nothing now. ``usd`` is what it cost when it was made, in US dollars; None where its price
    is not known. ``left_out``: its sample failed and a vote went on without it, so that the way it
    ended is not the way its step ended. ``request`` is the key of what was asked in a store."""

    model: str
    messages: tuple[dict[str, str], ...]
    text: str
    finish_reason: str
    input_tokens: int
    output_tokens: int
    cached: bool
    usd: float | None = None
    left_out: bool = False
    request: str = ""


class Ledger(Protocol):
    """A store of answers: ``answer`` returns what is known for a request, or asks and commits
    before it returns."""

    def answer(self, request: Request, ask: Any) -> tuple[Response, bool]:
        """``(response, cached)``. ``ask()`` makes the real call; two equal requests at once cost
        one."""
        ...


@dataclass(frozen=True)
class CallContext:
    """The purpose of the calls that are made now.

    ``ledger`` answers or keeps them, ``calls`` collects them, ``sampling`` are settings in the
    place of those of their LM, ``role`` says whose they are where a model has two, ``stopping``
    ends their waits, ``paying`` counts the attempts of the call under way, ``counted`` says that
    the listener counts how each ended, and ``stream`` is where DSPy's streamify wants its pieces.
    """

    ledger: Ledger | None = None
    calls: list[Call] | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    role: str | None = None
    stopping: Stopping | None = None
    paying: Paying | None = None
    counted: bool = False
    stream: Any = None


def call_context() -> CallContext:
    """The context of calls that are made now, in this thread."""
    return dspy.settings.get("cowest_call_context") or CallContext()


@contextmanager
def with_context(**changes: Any) -> Iterator[None]:
    """Replace these fields of the :class:`CallContext` for calls inside."""
    with dspy.context(cowest_call_context=replace(call_context(), **changes)):
        yield


@contextmanager
def keeping(ledger: Ledger | None) -> Iterator[None]:
    """Serve calls of bound LMs from ``ledger`` inside this context, and commit new ones to it."""
    with with_context(ledger=ledger):
        yield


@contextmanager
def listening(*, counted: bool = False) -> Iterator[list[Call]]:
    """Collect the calls that bound LMs answer inside this context, in order. ``counted``: the
    caller looks how each ended, so that no log has to say it."""
    calls: list[Call] = []
    changes = {"counted": True} if counted else {}
    with with_context(calls=calls, **changes):
        yield calls


def note(calls: Iterable[Call]) -> None:
    """Pass calls that were collected further inside on to the listener here."""
    listener = call_context().calls
    if listener is not None:
        listener.extend(calls)


@contextmanager
def sampling(**settings: Any) -> Iterator[None]:
    """Every call of a bound LM inside this context has these settings (``temperature``, ``top_p``,
    ``seed``, ...), whatever its module and its LM say. No copy of a program is needed for another
    draft of it."""
    with with_context(sampling=settings):
        yield


class Stopping:
    """A stretch of work whose waiting calls can all be stopped at once."""

    def __init__(self) -> None:
        self.stopped = False
        self._wakers: set[Any] = set()
        self._lock = threading.Lock()

    def stop(self) -> None:
        """End every wait inside the stretch now, with KeyboardInterrupt."""
        with self._lock:
            self.stopped = True
            for waker in self._wakers:
                waker.set()

    def set(self) -> None:
        """Stop, as a stretch inside another is stopped with it."""
        self.stop()

    @contextmanager
    def waking(self, waker: Any) -> Iterator[None]:
        """Set ``waker`` when the stretch is stopped, or has been."""
        with self._lock:
            self._wakers.add(waker)
            if self.stopped:
                waker.set()
        try:
            yield
        finally:
            with self._lock:
                self._wakers.discard(waker)

    def check(self) -> None:
        """Raise KeyboardInterrupt if the stretch was stopped."""
        if self.stopped:
            raise KeyboardInterrupt

    def check_before_sending(self) -> None:
        """Check as :meth:`check` does, before a call is sent: one that is stopped here is not
        counted."""
        if self.stopped:
            paying = call_context().paying
            if paying is not None:
                paying.withdraw()
            self.check()


@contextmanager
def stoppable() -> Iterator[None]:
    """Inside it, an exception (Ctrl-C above all) stops every waiting call of threads that run in
    this context.

    Without it a pool of threads is only left when the last of them has waited for its turn. One
    inside another is stopped with it.
    """
    stopping = Stopping()
    try:
        with current_stopping().waking(stopping), with_context(stopping=stopping):
            yield
    except BaseException:
        stopping.stop()
        raise


@contextmanager
def joining(stopping: Stopping) -> Iterator[None]:
    """Inside it, calls of this thread wait on ``stopping`` where no :func:`stoppable` is around
    them."""
    with with_context(stopping=call_context().stopping or stopping):
        yield


def current_stopping() -> Stopping:
    """The stretch of the innermost :func:`stoppable`; outside of one, a new one that is never
    stopped."""
    return call_context().stopping or Stopping()
