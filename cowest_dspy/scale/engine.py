"""Engines whose models answer on a cluster: what DSPy, the store and tuning see is that of one
machine.

A model's ids, its adapters and what it can do are those of the engine that this machine would use;
only its calls go elsewhere. So answers are kept under the same keys, and a run may go on here or
there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dspy.lm15 import InvalidRequestError, Request, Response, response_to_events

from cowest_dspy.errors import ModelError
from cowest_dspy.lms.api import ApiEngine
from cowest_dspy.lms.local.likelihood import Likelihood
from cowest_dspy.scale.pool import Pool


class ClusterEngine:
    """An engine whose calls are answered by the workers of a pool.

    Args:
        here: the engine of this machine; its weights are never loaded.
        pool: the workers, each with an engine like it.
    """

    base_folder: str
    """As of the engine of this machine, where it has one: then the model can be tuned here, and its
    adapters are sent."""

    def __init__(self, here: Any, pool: Pool) -> None:
        self.here, self._pool = here, pool
        self.supports_function_calling = getattr(here, "supports_function_calling", False)
        self.supports_reasoning = getattr(here, "supports_reasoning", False)
        self.supports_response_schema = getattr(here, "supports_response_schema", False)
        self.supported_params = getattr(here, "supported_params", None)
        if hasattr(here, "base_folder"):
            self.base_folder = here.base_folder
        if hasattr(here, "score"):
            self.score = self._score

    def complete(self, request: Request) -> Response:
        """The answer of a worker; blocks.

        Raises:
            Exception: the engine's own; and as :meth:`Pool.ask`.
        """
        return self._pool.ask("complete", request, model=request.model)

    def stream(self, request: Request) -> Any:
        """The finished answer as events."""
        return response_to_events(self.complete(request))

    def _score(
        self, asked: Sequence[tuple[list[dict[str, str]], str]], model: str | None = None
    ) -> list[Likelihood]:
        """As of the engine of this machine."""
        wanted = model or self.here.model_id
        return self._pool.ask("score", list(asked), wanted, model=wanted)

    def load_adapter(self, folder: Path) -> str:
        """Makes an adapter known, and gives its model id; a worker gets its files with the first
        call that names it.

        Raises:
            ModelError: the folder holds none, or the model takes none.
        """
        if not hasattr(self.here, "load_adapter"):
            raise ModelError(f"{type(self.here).__name__} takes no adapters.")
        return self.here.load_adapter(folder)

    def adapter_folder(self, model: str) -> Path | None:
        """The folder of a model id's adapter on this machine; None for the base. Raises ModelError
        for an id that is not known."""
        return self.here.adapter_folder(model)

    def close(self) -> None:
        """Ends the workers; the next call makes new ones."""
        self._pool.close()

    # Programs are copied deeply and pickled; a cluster is not. What travels is the engine of this
    # machine.
    def __deepcopy__(self, memo: dict[int, Any]) -> ClusterEngine:
        return self

    def __copy__(self) -> ClusterEngine:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return (_itself, (self.here,))


class AsyncClusterEngine:
    """The same engine for ``lm.acall``: a thread waits for each answer."""

    def __init__(self, engine: ClusterEngine) -> None:
        self.engine = engine

    async def complete(self, request: Request) -> Response:
        """As :meth:`ClusterEngine.complete`."""
        return await asyncio.to_thread(self.engine.complete, request)

    def __deepcopy__(self, memo: dict[int, Any]) -> AsyncClusterEngine:
        return self


def folder_of(here: Any) -> Any:
    """What tells a pool where the adapter of a model id is, for an engine of this machine."""
    find = getattr(here, "adapter_folder", None)
    if find is None:
        return lambda model: None

    def found(model: str) -> Path | None:
        try:
            return find(model)
        except ModelError as error:
            raise InvalidRequestError(str(error)) from error

    return found


def api_on(pool: Pool, engine: ApiEngine) -> ApiEngine:
    """An API whose single attempts are made by workers. What counts and waits stays here: rate
    limits, retries, the budget; so each of them is one for the whole cluster."""

    @contextmanager
    def admitted(request: Request) -> Any:
        admission = engine.limits.enter(engine.estimated_tokens(request))
        try:
            yield
        finally:
            engine.limits.leave(admission)

    def attempt(request: Request) -> Response:
        return pool.ask("attempt", request, model=request.model, again=lambda: admitted(request))

    return ApiEngine(engine.settings, limits=engine.limits, attempt=attempt)


def _itself(engine: Any) -> Any:
    return engine
