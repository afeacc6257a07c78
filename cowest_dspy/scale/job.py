"""A call that somebody waits for, and what a worker is made of."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

from cowest_dspy.scale.shipping import Failed, Order
from cowest_dspy.scale.worker import Call, Done


@dataclass(eq=False)
class Job:
    """A call on its way. ``adapter`` refers to the files of its model's adapter in the cluster's
    object store, None for a base model; ``lost`` says why the worker that had it is gone."""

    call: Call
    adapter: Any = None
    settled: threading.Event = field(default_factory=threading.Event)
    done: Done | None = None
    lost: str | None = None

    def finish(self, done: Done) -> None:
        """It has an answer, or a failure."""
        self.done = done
        self.settled.set()

    def fail(self, error: Exception) -> None:
        """It has no answer, and will have none."""
        self.finish(Done(self.call.number, failed=Failed.of(error)))

    def lose(self, reason: str) -> None:
        """Its worker is gone."""
        self.lost = reason
        self.settled.set()

    @property
    def is_settled(self) -> bool:
        """Whether nothing more happens to it."""
        return self.done is not None or self.lost is not None


@dataclass(frozen=True)
class WorkerPlan:
    """What every worker of a model is made of, and what it takes of the cluster.

    ``at_once``: calls that it works on together. ``model``: the id that the model without any
        adapter must have there. ``startup``: seconds until the first one must be ready.
    """

    name: str
    order: Order
    at_once: int
    cpus: float
    gpus: float
    startup: float
    model: str | None = None
