"""Service: a collaboration that is asked by many at once: turns, time limits, clients that go away,
what is logged and counted."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from cowest_dspy.serve import refusals
from cowest_dspy.serve.asking import Answer, Answering, Unanswered
from cowest_dspy.serve.config import ServeRules
from cowest_dspy.serve.metrics import Metrics
from cowest_dspy.serve.protocol import ChatRequest
from cowest_dspy.serve.reading import Asked, Task, read
from cowest_dspy.serve.sampling import LiveSamples
from cowest_dspy.serve.turns import Full, Turns, Workers
from cowest_dspy.store.rate_limit import Stopping

log = logging.getLogger(__name__)
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class Gone(Exception):
    """The client went away before its answer was there."""


class Service:
    """What stands behind the endpoint.

    Args:
        answering: the program with its router, fallbacks and breakers.
        rules: [serve].
        name: the model's, for clients.
        inputs: the program's, in order; by default those of its strong model alone.
        samples: where live traces go.

    Raises:
        ValueError: [serve] fields names what the answer does not have.
    """

    def __init__(
        self,
        answering: Answering,
        rules: ServeRules,
        name: str,
        *,
        inputs: tuple[str, ...] = (),
        metrics: Metrics | None = None,
        samples: LiveSamples | None = None,
    ) -> None:
        self.answering, self.rules, self.name = answering, rules, name
        self.task = Task.of(answering.program, inputs=inputs, fields=rules.fields)
        self.metrics, self.samples = metrics or Metrics(), samples
        self.created = int(time.time())
        self.turns = Turns(rules.limits)
        self._workers: Workers[Answer] = Workers(rules.limits.concurrency)
        self.metrics.watch(
            lambda: self.turns.active, lambda: self.turns.waiting, answering.breakers
        )

    def read(self, request: ChatRequest) -> Asked:
        """What a request asks. Raises Refused."""
        return read(request, self.task, self.rules, self.name)

    def shows_draft(self, request: ChatRequest) -> bool:
        """Whether the draft is given as reasoning_content."""
        asked = request.cowest is not None and request.cowest.draft
        return self.rules.show_draft == "always" or (self.rules.show_draft == "asked" and asked)

    async def answered(
        self,
        request_id: str,
        asked: Asked,
        receive: Receive,
        drafted: Callable[[str], None] | None = None,
    ) -> Answer:
        """The answer to a request, within its time; ``drafted`` is told the draft, on the event
        loop, as soon as it is there.

        When the client goes away, or the time is over, nothing more is asked for it: a model that
        is being asked is waited for, and keeps its turn until then.

        Raises:
            Refused: the queue is full (429), the time is over (504), a model failed (502, 503,
                504).
            Gone: the client went away.
        """
        loop, stopping = asyncio.get_running_loop(), Stopping()
        gone = asyncio.ensure_future(_disconnected(receive))

        def tell(draft: str) -> None:
            if drafted is not None:
                loop.call_soon_threadsafe(drafted, draft)

        try:
            async with asyncio.timeout(self.rules.limits.seconds):
                await self._turn(gone)
                began = loop.time()
                job = self._workers.run(
                    lambda: self.answering.answer(asked.inputs, drafted=tell, stopping=stopping)
                )
                job.add_done_callback(lambda _: self.turns.leave(loop.time() - began))
                await asyncio.wait({job, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not job.done():
                    raise Gone
                answer = job.result()
        except Full as full:
            raise refusals.full(full.retry_after) from None
        except TimeoutError:
            raise refusals.too_late(self.rules.limits.seconds) from None
        except Unanswered as error:
            self.metrics.failed(error.role, error.kind)
            raise refusals.refused(error) from None
        except Gone:
            self.metrics.gone()
            raise
        finally:
            stopping.stop()
            gone.cancel()
        self._note(request_id, asked, answer)
        return answer

    async def _turn(self, gone: asyncio.Future[None]) -> None:
        """Waits for a turn, as long as the client waits."""
        if self.turns.free:
            await self.turns.enter()
            return
        entering = asyncio.ensure_future(self.turns.enter())
        try:
            await asyncio.wait({entering, gone}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            if entering.done() and not entering.cancelled() and entering.exception() is None:
                self.turns.leave()
            entering.cancel()
            raise
        if not entering.done():
            entering.cancel()
            raise Gone
        entering.result()

    def _note(self, request_id: str, asked: Asked, answer: Answer) -> None:
        self.metrics.answered(answer)
        if self.samples is not None:
            self.samples.offer(request_id, asked.inputs, answer)
        if self.rules.log_text:
            log.info("%s inputs %s outputs %s", request_id, asked.inputs, answer.outputs)

    def close(self) -> None:
        """Lets the threads end."""
        self._workers.close()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
