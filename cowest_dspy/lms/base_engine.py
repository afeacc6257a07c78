"""The base of every engine of this package, and its counterpart for ``await lm.acall(...)``.

An engine is shared and never copied: a copy, a pickle or a saved program holds its settings, and
gives the process's one engine for them.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, Self

from dspy.lm15 import Request, Response, response_to_events


class BaseEngine(ABC):
    """An engine of ``dspy.LM``: ``complete(Request) -> Response``, ``concurrency`` calls at
    once."""

    supports_function_calling = False
    supports_reasoning = False
    supports_response_schema = False
    concurrency: int

    @abstractmethod
    def complete(self, request: Request) -> Response:
        """The answer to one request."""

    def stream(self, request: Request) -> Any:
        """The finished answer as events; its text comes in one piece."""
        return response_to_events(self.complete(request))

    @abstractmethod
    def dump_state(self) -> dict[str, Any]:
        """The state from which the engine can be made again, as JSON takes it; no secret."""

    @classmethod
    @abstractmethod
    def load_state(cls, state: dict[str, Any]) -> Any:
        """The engine for this state."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __copy__(self) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self).load_state, (self.dump_state(),))


class AsyncEngine:
    """The asynchronous counterpart of an engine of the class ``kind``: threads of its own wait."""

    kind: ClassVar[type[BaseEngine]]

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self._pool: ThreadPoolExecutor | None = None

    async def _in_thread(self, work: Any, *given: Any) -> Any:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.engine.concurrency, "cowest async")
        call = functools.partial(contextvars.copy_context().run, work, *given)
        return await asyncio.get_running_loop().run_in_executor(self._pool, call)

    async def complete(self, request: Request) -> Response:
        """Complete by the engine that is wrapped."""
        return await self._in_thread(self.engine.complete, request)

    async def stream(self, request: Request) -> AsyncIterator[Any]:
        """Stream by the engine that is wrapped."""
        events, last = iter(self.engine.stream(request)), object()
        while (event := await self._in_thread(next, events, last)) is not last:
            yield event

    async def aclose(self) -> None:
        """Close the engine, if it can be closed."""
        close = getattr(self.engine, "close", None)
        if close is not None:
            await asyncio.to_thread(close)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.engine,))

    def dump_state(self) -> dict[str, Any]:
        """The state of the engine."""
        return self.engine.dump_state()

    @classmethod
    def load_state(cls, state: dict[str, Any]) -> Self:
        """The counterpart of the engine for this state."""
        return cls(cls.kind.load_state(state))
