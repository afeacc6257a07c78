"""The line to one worker: it makes the worker, gives it calls in batches, and hears what is
done."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from cowest_dspy.errors import ClusterError, masked
from cowest_dspy.scale import connection
from cowest_dspy.scale.job import Job, WorkerPlan
from cowest_dspy.scale.shipping import Failed
from cowest_dspy.scale.worker import Ready, Worker

LOOK = 1.0
"""Seconds between two looks at whether a worker that is still being made is wanted any more."""
GOODBYE = 5.0
"""Seconds that a worker has to put away what it has written."""
SLOTS = 4
"""Messages that a worker handles at once: one that gives, one that waits for what is done, and one
that closes."""


class Office(Protocol):
    """Where a line gets its calls from, and whom it tells of its worker. ``lock`` guards what all
    lines of a model share."""

    lock: threading.RLock

    @property
    def ready(self) -> int:
        """How many workers of the model are ready."""
        ...

    def taken(self, line: Line) -> list[Job]:
        """The waiting calls that this line is to have now; under ``lock``."""
        ...

    def is_ready(self, line: Line) -> None:
        """The line has its worker, and room."""
        ...

    def replace(self, line: Line, reason: str) -> None:
        """The line's worker has ended."""
        ...

    def give_up(self, line: Line, error: ClusterError) -> None:
        """The line's worker cannot be made."""
        ...


class Line:
    """One worker, from its making to its end. Two threads: one gives, the other makes the worker
    and then hears."""

    def __init__(self, office: Office, plan: WorkerPlan) -> None:
        self._office, self._plan = office, plan
        self.ready, self._over = False, False
        self._under_way: dict[int, Job] = {}
        self._has: set[str] = set()
        self._actor: Any = None
        self._may_give, self._may_hear = (
            threading.Condition(office.lock),
            threading.Condition(office.lock),
        )
        self._threads = [
            threading.Thread(
                target=self._guarded, args=(self._live,), name="cowest-worker-hears", daemon=True
            )
        ]
        self._threads[0].start()

    @property
    def room(self) -> int:
        """How many calls it would take now; under the office's lock."""
        return self._plan.at_once - len(self._under_way) if self.ready and not self._over else 0

    def wake(self) -> None:
        """Something waits that it could take; under the office's lock."""
        self._may_give.notify()

    def end(self) -> None:
        """Ends the worker, and returns when nothing of it goes on here. Calls that it still has are
        lost."""
        self._finish("it was closed", goodbye=self.ready)
        for thread in self._threads:
            thread.join(GOODBYE)

    def _live(self) -> None:
        try:
            self._make()
        except ClusterError as error:
            if self._finish(str(error)):
                self._office.give_up(self, error)
            return
        if self._over:
            self._kill(goodbye=False)
            return
        giving = threading.Thread(
            target=self._guarded, args=(self._give,), name="cowest-worker-gives", daemon=True
        )
        self._threads.append(giving)
        giving.start()
        self._office.is_ready(self)
        self._hear()

    def _make(self) -> None:
        """Waits for the cluster to make the worker, and for the worker to make its engine.

        Raises:
            ClusterError: there is no room for it, or it cannot have the engine.
        """
        import ray

        plan, started = self._plan, time.monotonic()
        made = ray.remote(Worker).options(
            num_cpus=plan.cpus,
            num_gpus=plan.gpus,
            max_concurrency=SLOTS,
            max_restarts=0,
            scheduling_strategy="SPREAD",
        )
        self._actor = made.remote(plan.order, plan.at_once)
        asked = self._actor.ready.remote()
        while not ray.wait([asked], timeout=LOOK)[0]:
            if self._over:
                return
            if time.monotonic() - started > plan.startup and not self._office.ready:
                raise ClusterError(_no_room(plan))
        found: Ready | Failed = ray.get(asked)
        if isinstance(found, Failed):
            raise ClusterError(f"A worker of {plan.name} could not be made: {found.error()}")
        if plan.model is not None and found.model != plan.model:
            raise ClusterError(
                f"On the node {found.node} the weights of {plan.name} are others: {found.model}, "
                f"and here {plan.model}."
            )

    def _give(self) -> None:
        import ray

        while True:
            with self._office.lock:
                jobs: list[Job] = []
                while not self._over and not (jobs := self._office.taken(self)):
                    self._may_give.wait()
                if self._over:
                    return
                self._under_way.update({job.call.number: job for job in jobs})
                self._may_hear.notify()
            adapters = {
                job.call.model: job.adapter
                for job in jobs
                if job.adapter is not None and job.call.model not in self._has
            }
            # Waiting until it has arrived is what makes batches: the next ones gather meanwhile.
            ray.get(
                self._actor.give.remote(
                    [job.call for job in jobs], list(adapters), *adapters.values()
                )
            )
            self._has |= adapters.keys()

    def _hear(self) -> None:
        import ray

        while True:
            with self._office.lock:
                while not self._over and not self._under_way:
                    self._may_hear.wait()
                if self._over:
                    return
            found = ray.get(self._actor.take.remote())
            with self._office.lock:
                jobs = [
                    (self._under_way.pop(done.number), done)
                    for done in found
                    if done.number in self._under_way
                ]
                self._may_give.notify()
            for job, done in jobs:
                job.finish(done)

    def _guarded(self, work: Callable[[], None]) -> None:
        """Any error here means that the worker, its node or the cluster is gone: the calls that it
        had are asked of others."""
        try:
            work()
        except Exception as error:
            reason = _in_short(error)
            if self._finish(reason):
                self._office.replace(self, reason)

    def _finish(self, reason: str, *, goodbye: bool = False) -> bool:
        """Ends the line once; gives whether it was this call that did."""
        with self._office.lock:
            if self._over:
                return False
            self._over = True
            jobs, self._under_way = list(self._under_way.values()), {}
            self._may_give.notify()
            self._may_hear.notify()
        self._kill(goodbye=goodbye)
        for job in jobs:
            job.lose(reason)
        return True

    def _kill(self, *, goodbye: bool) -> None:
        import ray

        actor = self._actor
        if actor is None:
            return
        try:
            if goodbye:
                ray.wait([actor.close.remote()], timeout=GOODBYE)
            ray.kill(actor)
        # The cluster is gone, and the worker with it. Ray has no narrower class for it: a call to
        # an actor of a cluster that ended raises a plain Exception, killing it
        # ActorHandleNotFoundError.
        except Exception:
            return


def _in_short(error: Exception) -> str:
    """What Ray says of the end of a worker. It is long, and the cause stands last."""
    text = masked(" ".join(str(error).split()))
    return (
        f"{type(error).__name__}: {text if len(text) <= 300 else f'{text[:80]} ... {text[-200:]}'}"
    )


def _no_room(plan: WorkerPlan) -> str:
    has = connection.resources()
    there = " and ".join(f"{has.get(name, 0):g} {name}" for name in ("CPU", "GPU"))
    return (
        f"No worker of {plan.name} was ready after {plan.startup:g} seconds ([ray] startup). Each "
        f"wants {plan.cpus:g} CPU and "
        f"{plan.gpus:g} GPU, and the whole cluster has {there}: lower cpus, gpus or workers, add "
        "nodes, or raise startup."
    )
