"""Ctrl-C, SIGTERM and SIGHUP: the first ends the work cleanly, the second at once.

    with handle_signals():       # a signal raises Interrupted in the main thread
        with uninterrupted():    # but not here: what is being paid for is kept first
            ...

The first signal lets nothing more be asked, has what is under way finished and committed, and then
ends the command with exit code 128 + its number. The second ends it at once, and says how many
calls were under way. Outside of ``handle_signals`` nothing here changes anything: Ctrl-C is then
Python's own.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
SAME = 0.5
"""Seconds in which a second signal is the first one once more: a terminal sends it to every process
of a command, and some of them pass it on."""
STOPPING = "Stopping: what is under way is finished and kept. Once more stops at once."


class Interrupted(KeyboardInterrupt):
    """The command was asked to end; ``signal`` is the number of the signal, 2 for Ctrl-C."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = int(number)


@dataclass
class _State:
    """The state of the process, which has one set of signal handlers; changed by the main thread
    only."""

    shields: int = 0
    first: int | None = None
    when: float = 0.0
    pending: bool = False
    tell: list[Callable[[str], None]] = field(default_factory=list)
    counting: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)


_state = _State()


def signal_of(stop: BaseException) -> int:
    """The number of the signal behind an interruption; that of Ctrl-C where Python raised it."""
    return getattr(stop, "signal", int(signal.SIGINT))


def is_broken_pipe(error: BaseException | None) -> bool:
    """Whether the work ended because the reader of its output was gone, as after ``| head``."""
    return isinstance(error, Interrupted) and error.signal == getattr(signal, "SIGPIPE", None)


def first_signal() -> int | None:
    """The number of the first signal that has come."""
    return _state.first


def stop_requested() -> bool:
    """Whether a signal has come."""
    return _state.first is not None


def count_calls(counting: Any) -> None:
    """Count the calls that this object has under way, its ``asking``, among those that a second
    signal abandons, as long as the object lives."""
    _state.counting.add(counting)


@contextmanager
def handle_signals() -> Iterator[None]:
    """Handle the signals while a command runs, in the main thread; a signal that is ignored stays
    so (``nohup``)."""
    if not _in_main_thread():
        yield
        return
    _state.first, _state.pending, _state.shields = None, False, 0
    before = {
        number: signal.signal(number, _on_signal)
        for number in SIGNALS
        if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _state.first, _state.pending = None, False


@contextmanager
def announcing(tell: Callable[[str], None]) -> Iterator[None]:
    """A context in which ``tell`` shows that the work is being stopped."""
    _state.tell.append(tell)
    try:
        yield
    finally:
        _state.tell.remove(tell)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """A signal that comes inside, in the main thread, raises Interrupted at the end of it."""
    check_now = _in_main_thread()
    if check_now:
        _raise_pending()
    with postponing():
        if check_now:
            _state.shields += 1
        yield


@contextmanager
def postponing() -> Iterator[None]:
    """A stretch in which :func:`postpone` may be called: what it postponed is raised at its end."""
    if not _in_main_thread():
        yield
        return
    before = _state.shields
    try:
        yield
    finally:
        _state.shields = before
        _raise_pending()


def postpone() -> None:
    """From here on, in the main thread, a signal waits: for :func:`check`, or for the end of
    :func:`postponing`."""
    if _in_main_thread() and not _state.shields:
        _state.shields = 1


def check() -> None:
    """Raise Interrupted when a signal was postponed."""
    if _in_main_thread() and _state.pending:
        _state.shields = 0
        _raise_pending()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _raise_pending() -> None:
    if _state.pending and not _state.shields:
        _state.pending = False
        raise Interrupted(_state.first or signal.SIGINT)


def _on_signal(number: int, frame: Any) -> None:
    now = time.monotonic()
    if _state.first is None:
        _state.first, _state.when = number, now
        for tell in _state.tell or [_write]:
            with suppress(Exception):
                tell(STOPPING)
        if not _state.shields:
            raise Interrupted(number)
        _state.pending = True
    elif now - _state.when >= SAME:
        if os.isatty(1):
            os.write(1, b"\x1b[?25h")  # The cursor, which a drawing hides.
        calls = sum(one.asking for one in _state.counting)
        were = "1 call that was" if calls == 1 else f"{calls} calls that were"
        lost = f": {were} under way abandoned, and perhaps paid for" if calls else ""
        _write(f"Stopped at once{lost}. The same command goes on from here.")
        # What was committed is on the disk, and servers of ours end with us (lms/watched.py).
        os._exit(128 + number)


def _write(text: str) -> None:
    """Not through ``sys.stderr``: the signal may have come while that was being written to."""
    with suppress(OSError):
        os.write(2, f"\n{text}\n".encode())
