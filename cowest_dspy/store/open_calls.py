"""Calls that are being made, in whatever thread: what is paid for is waited for."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from cowest_dspy.errors import StoreError
from cowest_dspy.store.call_context import Stopping, joining
from cowest_dspy.utils.interrupts import count_calls, stop_requested, uninterrupted


class OpenCalls:
    """The calls that are being made, in any thread. At the end nothing new is let in, and what is
    under way is waited for."""

    def __init__(self) -> None:
        self._changed, self._count, self._ended = threading.Condition(), 0, False
        self._owner, self._stopping = os.getpid(), Stopping()
        self.asking = 0
        count_calls(self)

    @contextmanager
    def call(self) -> Iterator[None]:
        """A context around a call.

        Raises:
            KeyboardInterrupt: the work is being stopped, or has ended; whoever asks now is a thread
                that nobody waits for.
            StoreError: the work has ended, and the main thread asks.
        """
        with uninterrupted():
            with self._changed:
                if (
                    self._ended
                    and not stop_requested()
                    and threading.current_thread() is threading.main_thread()
                ):
                    raise StoreError(
                        "This store is closed: open it anew, Store(folder), to ask more."
                    )
                if self._ended or stop_requested():
                    raise KeyboardInterrupt
                self._count += 1
                stopping = self._stopping
            try:
                with joining(stopping):
                    yield
            finally:
                with self._changed:
                    self._count -= 1
                    self._changed.notify_all()

    @contextmanager
    def model_call(self) -> Iterator[None]:
        """A context in which a model is asked, inside of :meth:`call`: what is only read, or waits
        for an equal call, is not."""
        with self._changed:
            self.asking += 1
        try:
            yield
        finally:
            with self._changed:
                self.asking -= 1

    def settle(self, *, now: bool, for_good: bool = False) -> None:
        """Wait until none is under way. ``now``: those that only wait for their turn, or for a
        retry, are let go. ``for_good``: no other is let in."""
        with self._changed:
            self._ended = self._ended or for_good
            stopping, self._stopping = self._stopping, Stopping()
            if now:
                stopping.stop()
            if (
                self._owner == os.getpid()
            ):  # The threads of the process that this one was forked from are not here.
                self._changed.wait_for(lambda: not self._count)
