"""Ctrl-C, SIGTERM and SIGHUP: the first ends the work cleanly, the second at once.

    with handled():                       # of a command: from now on a signal raises Interrupted in
        the main thread
        with uninterrupted():             # but not here: what is being paid for is kept first
            ...

The first signal lets nothing more be asked, has what is under way finished and committed, and then
ends the command with exit code 128 + its number. The second ends it at once, and says how many
calls were under way. Outside of ``handled`` nothing here changes anything: Ctrl-C is Python's own
then.
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
from typing import Any, Protocol

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


def signal_of(stop: BaseException) -> int:
    """The number of the signal behind an interruption; that of Ctrl-C where Python itself raised
    it."""
    return getattr(stop, "signal", int(signal.SIGINT))


def unread(error: BaseException | None) -> bool:
    """Whether the work ended because nobody read on what it printed, as after ``| head``."""
    return isinstance(error, Interrupted) and error.signal == getattr(signal, "SIGPIPE", None)


class Counting(Protocol):
    """What knows how many calls are under way."""

    @property
    def asking(self) -> int:
        """Calls to models that have not ended yet."""
        ...


@dataclass
class _Main:
    """What the main thread knows of signals: the process has one set of handlers, and so one of
    these."""

    shields: int = 0
    first: int | None = None
    when: float = 0.0
    pending: bool = False
    tell: list[Callable[[str], None]] = field(default_factory=list)
    last_words: list[Callable[[], None]] = field(default_factory=list)
    counting: weakref.WeakSet[Counting] = field(default_factory=weakref.WeakSet)


_main = _Main()


def _mine() -> bool:
    return threading.current_thread() is threading.main_thread()


def stopped_by() -> int | None:
    """The number of the first signal that has come."""
    return _main.first


def asked_to_stop() -> bool:
    """Whether a signal has come."""
    return _main.first is not None


@contextmanager
def handled() -> Iterator[None]:
    """Handles the signals while a command runs, in the main thread; a signal that is ignored stays
    so (``nohup``)."""
    if not _mine():
        yield
        return
    before: dict[int, Any] = {}
    _main.first, _main.pending, _main.shields = None, False, 0
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, _on_signal)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _main.first, _main.pending = None, False


@contextmanager
def telling(
    tell: Callable[[str], None], last_words: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Has ``tell`` say that the work is being stopped, and ``last_words`` called before the process
    ends at once."""
    _main.tell.append(tell)
    _main.last_words.append(last_words)
    try:
        yield
    finally:
        _main.tell.remove(tell)
        _main.last_words.remove(last_words)


def count_calls(counting: Counting) -> None:
    """Count the calls of this object, too, among those that a second signal abandons, as long as
    the object lives."""
    _main.counting.add(counting)


def _on_signal(number: int, frame: Any) -> None:
    now = time.monotonic()
    if _main.first is None:
        _main.first, _main.when = number, now
        _say(STOPPING)
        if _main.shields:
            _main.pending = True
            return
        raise Interrupted(number)
    if now - _main.when < SAME:
        return
    for say in _main.last_words:
        with suppress(Exception):
            say()
    _write(f"Stopped at once{_abandoned()}. The same command goes on from here.")
    # What was committed is on the disk, and servers of ours end with us (lms/watched.py).
    os._exit(128 + number)


def _abandoned() -> str:
    calls = sum(one.asking for one in _main.counting)
    if not calls:
        return ""
    return (
        f": {'1 call that was' if calls == 1 else f'{calls} calls that were'} under way "
        "abandoned, and perhaps paid for"
    )


def _say(text: str) -> None:
    if not _main.tell:
        _write(text)
    for tell in _main.tell:
        with suppress(Exception):
            tell(text)


def _write(text: str) -> None:
    """Not through ``sys.stderr``: the signal may have come while that was being written to."""
    with suppress(OSError):
        os.write(2, f"\n{text}\n".encode())


@contextmanager
def uninterrupted() -> Iterator[None]:
    """A signal that comes inside, in the main thread, raises Interrupted at the end of it."""
    if not _mine():
        yield
        return
    _raise_pending()
    with until_kept():
        _main.shields += 1
        yield


@contextmanager
def until_kept() -> Iterator[None]:
    """A stretch in which :func:`postpone` may be called: what it postponed is raised at its end."""
    if not _mine():
        yield
        return
    before = _main.shields
    try:
        yield
    finally:
        _main.shields = before
        _raise_pending()


def postpone() -> None:
    """From here on, in the main thread, a signal waits: for :func:`check`, or for the end of
    :func:`until_kept`."""
    if _mine() and not _main.shields:
        _main.shields = 1


def check() -> None:
    """Raises Interrupted when a signal was postponed."""
    if _mine() and _main.pending:
        _main.shields = 0
        _raise_pending()


def _raise_pending() -> None:
    if _main.pending and not _main.shields:
        _main.pending = False
        raise Interrupted(_main.first or signal.SIGINT)
