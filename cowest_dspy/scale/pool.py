"""The workers of one model, as this process sees them: calls wait in one queue, and go where there
is room.

    pool = Pool(plan, workers=4, address=None)
    pool.ask("complete", request, model=request.model)      # blocks; the answer, or the engine's
        own error

A worker is asked in batches: what has come while the last message to it was under way travels
together, and so do answers. When a worker or its node ends, what it had under way is asked of
another one, and counts as another attempt; a new worker takes its place where the cluster has room.
What was answered is never asked again, since the answer is here.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from dspy.utils.exceptions import LMUnexpectedError

from cowest_dspy.errors import ClusterError
from cowest_dspy.scale import connection
from cowest_dspy.scale.job import Job, WorkerPlan
from cowest_dspy.scale.line import Line
from cowest_dspy.scale.shipping import packed
from cowest_dspy.scale.worker import Call
from cowest_dspy.store.budget import another_attempt
from cowest_dspy.store.rate_limit import current_stopping

MOST_LOST = 3
"""Workers that may end with one and the same call under way, before that call is given up: it may
be what ends them. And so many times the number of workers may end in a row before they are ready,
until no more are made."""
log = logging.getLogger("cowest_dspy")


class Pool:
    """Workers for one model. They are made at the first call, and again at the first one after
    :meth:`close`.

    Args:
        plan: what a worker is made of.
        workers: how many there are.
        address: of the cluster; None is one that is started on this machine.
        folder_of: where the adapter of a model id is; None for the base.
    """

    def __init__(
        self,
        plan: WorkerPlan,
        workers: int,
        address: str | None,
        folder_of: Callable[[str], Path | None] = lambda model: None,
    ) -> None:
        self.lock = threading.RLock()
        self._plan, self._workers, self._address, self._folder_of = (
            plan,
            workers,
            address,
            folder_of,
        )
        self._waiting: deque[Job] = deque()
        self._lines: list[Line] = []
        self._adapters: dict[str, Any] = {}
        self._numbers = itertools.count()
        self._open, self._ended, self._broken = False, 0, None

    def ask(
        self,
        method: str,
        *arguments: Any,
        model: str,
        again: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Any:
        """What the engine of some worker gives; blocks. ``again`` is the context in which a call
        whose worker has ended is asked once more, for whoever counts calls.

        Raises:
            Exception: the engine's own.
            LMUnexpectedError: several workers have ended with this call under way.
            BudgetError: a worker has ended, and there is no room for another attempt.
            ClusterError: there is no cluster, no room on it, or no worker that has the model.
            KeyboardInterrupt: the work was stopped while the call waited; what a worker has under
                way is waited for.
        """
        job = self._settled(Call(next(self._numbers), method, arguments, model))
        for _ in range(MOST_LOST - 1):
            if job.lost is None:
                break
            another_attempt()
            with again():
                job = self._settled(Call(next(self._numbers), method, arguments, model))
        if job.done is None:
            # Of a kind that nobody tries again.
            raise LMUnexpectedError(
                f"{MOST_LOST} workers ended while this was under way; the last: {job.lost}",
                model=model,
            )
        if job.done.failed is not None:
            raise job.done.failed.error()
        return job.done.answer

    def close(self) -> None:
        """Ends the workers, and gives back what they had of the cluster."""
        with self.lock:
            was_open, self._open = self._open, False
            lines, self._lines = self._lines, []
            waiting, self._waiting = list(self._waiting), deque()
            self._adapters.clear()
        for job in waiting:
            job.lose("the workers were closed while it waited")
        for line in lines:
            line.end()
        if was_open:
            connection.leave()

    @property
    def ready(self) -> int:
        """How many workers are ready now."""
        return sum(line.ready for line in self._lines)

    # What lines say

    def taken(self, line: Line) -> list[Job]:
        """The line's part of what waits, so that the others have theirs; under ``lock``."""
        free = sum(1 for other in self._lines if other.room > 0) or 1
        count = min(line.room, -(-len(self._waiting) // free))
        jobs = [self._waiting.popleft() for _ in range(count)]
        if jobs and self._waiting:
            self._nudge(but=line)
        return jobs

    def is_ready(self, line: Line) -> None:
        """A worker is there: it is given its part."""
        with self.lock:
            line.ready, self._ended = True, 0
            line.wake()

    def replace(self, line: Line, reason: str) -> None:
        """Puts a new worker in the place of one that has ended."""
        with self.lock:
            if not self._open or line not in self._lines:
                return
            self._ended += not line.ready
            if self._ended <= MOST_LOST * self._workers:
                log.warning(
                    "A worker of %s has ended (%s): another one takes its place.",
                    self._plan.name,
                    reason,
                )
                self._lines[self._lines.index(line)] = Line(self, self._plan)
                return
        hint = "Has every node this Python, and cowest_dspy of this version?"
        self.give_up(
            line,
            ClusterError(
                f"Workers of {self._plan.name} end before they are ready: {reason} {hint}"
            ),
        )

    def give_up(self, line: Line, error: ClusterError) -> None:
        """A worker cannot be made. The others go on; if there are none, whoever waits is told."""
        with self.lock:
            if not self._open or line not in self._lines:
                return
            self._lines.remove(line)
            if self._lines:
                log.warning(
                    "A worker of %s could not be made, and the others go on without it: %s",
                    self._plan.name,
                    error,
                )
                return
            self._broken = error
            waiting, self._waiting = list(self._waiting), deque()
        for job in waiting:
            job.fail(error)

    # How a call waits

    def _settled(self, call: Call) -> Job:
        """The call when it has an answer, a failure, or no worker any more."""
        job, stopping = Job(call), current_stopping()
        with stopping.waking(job.settled):
            stopping.check_before_sending()
            self._queue(job)
            while True:
                job.settled.wait()
                if job.is_settled:
                    return job
                # Woken by a stop. What waits is let go; what is under way may be paid for already,
                # and is waited for.
                with self.lock:
                    if job in self._waiting:
                        self._waiting.remove(job)
                        stopping.check_before_sending()
                job.settled.clear()
                if job.is_settled:
                    return job

    def _queue(self, job: Job) -> None:
        with self.lock:
            if not self._open:
                connection.join(self._address)
                self._open, self._broken, self._ended = True, None, 0
                self._lines = [Line(self, self._plan) for _ in range(self._workers)]
            if self._broken is not None:
                raise ClusterError(str(self._broken))
            job.adapter = self._adapter(job.call.model)
            self._waiting.append(job)
            self._nudge()

    def _adapter(self, model: str) -> Any:
        """A reference to the files of a model's adapter, in the cluster's object store: no disk
        need be shared."""
        folder = self._folder_of(model)
        if folder is None:
            return None
        if model not in self._adapters:
            import ray

            self._adapters[model] = ray.put(packed(folder))
        return self._adapters[model]

    def _nudge(self, but: Line | None = None) -> None:
        """Wakes the line with the most room. What it does not take, it passes on."""
        line = max(
            (one for one in self._lines if one is not but), key=lambda one: one.room, default=None
        )
        if line is not None and line.room > 0:
            line.wake()
