"""A worker on the cluster: one process with one engine, which answers batches of calls. It keeps
nothing and decides nothing.

The run's process gives it calls (:meth:`Worker.give`) and fetches what is done
(:meth:`Worker.take`), several in one message where several are there. Each call runs in a thread of
its own, so that an engine that computes batches has its batch.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cowest_dspy.errors import ModelError
from cowest_dspy.scale.shipping import Failed, Order, unpacked

LONGEST_WAIT = 10.0
"""Seconds that one message waits for something to be done."""


@dataclass(frozen=True)
class Call:
    """One call to the engine: its method, and what that is given. ``model`` is the id that has to
    be there for it."""

    number: int
    method: str
    arguments: tuple[Any, ...]
    model: str


@dataclass(frozen=True)
class Done:
    """What became of a call: an answer, or why there is none."""

    number: int
    answer: Any = None
    failed: Failed | None = None


@dataclass(frozen=True)
class Ready:
    """A worker that has its engine: where, and the id of its model without any adapter (None where
    the engine names none)."""

    node: str
    model: str | None


class Worker:
    """The body of a Ray actor.

    Args:
        order: what the engine is made of.
        at_once: calls that it works on together, at most.
    """

    def __init__(self, order: Order, at_once: int) -> None:
        self._order, self._engine = order, None
        self._threads = ThreadPoolExecutor(at_once, "cowest-worker")
        self._changed = threading.Condition()
        self._done: list[Done] = []
        self._folder: Path | None = None

    def ready(self) -> Ready | Failed:
        """Makes the engine; weights are loaded with the first call, as everywhere."""
        try:
            from cowest_dspy.lms.build import build_lm

            self._engine = build_lm(self._order.table()).engine
        except Exception as error:
            return Failed.of(error)
        return Ready(_node(), getattr(self._engine, "model_id", None))

    def give(
        self, calls: Sequence[Call], names: Sequence[str], *adapters: Mapping[str, bytes]
    ) -> None:
        """Takes calls, and before them the adapters that they need and that are not here yet; does
        not wait for answers."""
        missing = {
            name: failed
            for name, files in zip(names, adapters, strict=True)
            if (failed := self._adapt(name, files))
        }
        for call in calls:
            if call.model in missing:
                self._finish(Done(call.number, failed=missing[call.model]))
            else:
                self._threads.submit(self._work, call)

    def take(self) -> list[Done]:
        """What is done since it was last asked for; waits a while for something."""
        with self._changed:
            self._changed.wait_for(lambda: self._done, LONGEST_WAIT)
            done, self._done = self._done, []
        return done

    def _work(self, call: Call) -> None:
        try:
            made = Done(call.number, answer=getattr(self._engine, call.method)(*call.arguments))
        except BaseException as error:
            made = Done(call.number, failed=Failed.of(error))
        self._finish(made)

    def _finish(self, made: Done) -> None:
        with self._changed:
            self._done.append(made)
            self._changed.notify_all()

    def _adapt(self, name: str, files: Mapping[str, bytes]) -> Failed | None:
        try:
            engine: Any = self._engine
            self._folder = self._folder or Path(tempfile.mkdtemp(prefix="cowest-adapters-"))
            found = engine.load_adapter(
                unpacked(dict(files), self._folder / name.rpartition("+")[2])
            )
            if found != name:
                raise ModelError(
                    f"On {_node()} the adapter of {name} is {found}: the weights there are others."
                )
        except Exception as error:
            return Failed.of(error)
        return None

    def close(self) -> None:
        """Removes what was written on this node, and stops a server that was started for it."""
        getattr(self._engine, "close", lambda: None)()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _node() -> str:
    import ray.util

    return ray.util.get_node_ip_address()
