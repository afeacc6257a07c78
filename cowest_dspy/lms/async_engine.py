"""An engine for ``await lm.acall(...)``: threads of its own wait for the answers, as many as calls may
be under way at once."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, Self

from dspy.lm15 import Request, Response


class AsyncEngine:
    """The asynchronous counterpart of an engine whose class is ``kind``; the engine's
    ``concurrency`` is how many calls may wait at once."""

    kind: ClassVar[Any]

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self._pool: ThreadPoolExecutor | None = None

    async def _in_thread(self, work: Any, *given: Any) -> Any:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.engine.concurrency, "cowest async")
        run = contextvars.copy_context().run
        return await asyncio.get_running_loop().run_in_executor(self._pool, run, work, *given)

    async def complete(self, request: Request) -> Response:
        """As the engine's own ``complete``."""
        return await self._in_thread(self.engine.complete, request)

    async def stream(self, request: Request) -> AsyncIterator[Any]:
        """As the engine's own ``stream``."""
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
