"""ServerProcess: a server that we start when it is first needed, and stop by its process id.

    server = ServerProcess(["llama-server", "--model", "x.gguf", "--port", "{port}"], startup=60)
    with server.running() as place:
        httpx.post(f"{place.url}/v1/chat/completions", ...)
    server.stop()

It listens on 127.0.0.1 only, on a port that was free; what it says goes into a log file. It ends
with us, also when we are killed (watched.py). Nothing that was not started here is ever touched.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cowest_dspy.errors import ModelError, masked

GRACE = 10.0
"""Seconds between the request to end and the end by force."""
TAIL = 15
"""Lines of the log that an error repeats."""
_logger = logging.getLogger(__name__)
WATCHED = Path(__file__).with_name("watched.py")
"""The script that runs a command in a process group of its own, and ends it when we are gone."""


@dataclass(frozen=True)
class Place:
    """Where a server answers, and which start of it this is: what was put into an earlier one is
    gone."""

    url: str
    start: int


class ServerProcess:
    """A command that serves HTTP, started at the first need, from any thread, once.

    Args:
        command: the program and its arguments; "{port}" becomes a free port and "{python}" this
            Python. Arguments that are known only later go where "{more}" stands, else to the end.
        startup: seconds until it must answer.
        log: the file that takes what it prints; by default one in the temporary directory.

    Raises:
        ModelError: a command without "{port}".
    """

    def __init__(
        self, command: Sequence[str], *, startup: float, log: str | Path | None = None
    ) -> None:
        if not any("{port}" in part for part in command):
            raise ModelError(
                f'The command {list(command)} has no "{{port}}": write it where the port belongs, '
                f'as in "--port", "{{port}}".'
            )
        self.command, self.startup = tuple(command), startup
        self.log = Path(log) if log else None
        self._changed = threading.Condition()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._more: tuple[str, ...] = ()
        self._users = self._starts = self._deaths = 0
        self._place = Place("", 0)
        self._failed: str | None = None

    @property
    def pid(self) -> int | None:
        """The process id of the group that runs; None when nothing does."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    @contextlib.contextmanager
    def running(self, more: Sequence[str] = ()) -> Iterator[Place]:
        """A context in which the server runs with the arguments ``more``; started, or started anew,
        when it does not.

        A start with other arguments waits until nobody uses the server as it is, and who comes
        later waits for the start.

        Raises:
            ModelError: it cannot be started, dies, or does not answer in time. It is not tried
                again before :meth:`stop`.
        """
        with self._changed:
            while not self._runs_with(tuple(more)):
                if self._users and self.pid is not None:
                    self._changed.wait()
                else:
                    self._start_anew(tuple(more))
            self._users += 1
            place = self._place
        try:
            yield place
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    def stop(self) -> None:
        """Ends the process group that was started here, by force after a grace period; the next
        need starts it again."""
        with self._changed:
            self._end()
            self._failed, self._deaths = None, 0
            self._changed.notify_all()

    def _runs_with(self, more: tuple[str, ...]) -> bool:
        if self._failed:
            raise ModelError(self._failed)
        return self.pid is not None and self._more == more

    def _start_anew(self, more: tuple[str, ...]) -> None:
        if (
            self._process is not None
            and self._process.poll() is not None
            and self._owner == os.getpid()
        ):
            self._deaths += 1
            # Once can be bad luck (memory that another program took); twice is a server that does
            # not work.
            if self._deaths > 1:
                self._fail(
                    f"died again while it was used, with exit code {self._process.returncode}"
                )
            _logger.warning(
                "The server died with exit code %s and is started again; log: %s",
                self._process.returncode,
                self.log,
            )
        self._end()
        try:
            self._start(more)
            self._wait_until_it_answers()
        except BaseException:
            # Interrupted, or dead: what was begun is not left running.
            self._end()
            raise

    def _start(self, more: tuple[str, ...]) -> None:
        port = free_port()
        command = [part for word in self.command for part in (more if word == "{more}" else [word])]
        command += [] if "{more}" in self.command else more
        command = [
            part.replace("{port}", str(port)).replace("{python}", sys.executable)
            for part in command
        ]
        if shutil.which(command[0]) is None:
            self._fail(
                f"cannot be started: there is no program {command[0]}; install it, or give its "
                "whole path"
            )
        if self.log is None:
            self.log = _new_log()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            log.write(f"\n$ {masked(' '.join(command))}\n".encode())
            log.flush()
            watched = [sys.executable, "-I", str(WATCHED), str(os.getpid()), *command]
            self._process = subprocess.Popen(
                watched,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        if self._starts == 0:
            atexit.register(self._end)
        self._starts += 1
        self._owner, self._more = os.getpid(), more
        self._place = Place(f"http://127.0.0.1:{port}", self._starts)

    def _wait_until_it_answers(self) -> None:
        import httpx

        process = self._process
        assert process is not None
        deadline = time.monotonic() + self.startup
        # No proxy: this machine's own address is meant.
        with httpx.Client(trust_env=False, timeout=5.0) as client:
            while time.monotonic() < deadline:
                if process.poll() is not None:
                    self._fail(f"ended with exit code {process.returncode} before it answered")
                if _answers(client, self._place.url):
                    return
                time.sleep(0.05)
        self._fail(f"did not answer within {self.startup:g} seconds (startup); it was stopped")

    def _fail(self, what: str) -> None:
        self._failed = f"The server `{masked(' '.join(self.command))}` {what}."
        if self.log is not None and self.log.is_file():
            lines = masked(self.log.read_text(encoding="utf-8", errors="replace")).splitlines()[
                -TAIL:
            ]
            self._failed += f" Its log is {self.log}:" + "".join(f"\n  {line}" for line in lines)
        raise ModelError(self._failed)

    def _end(self) -> None:
        # A fork has the same object, and must not end what belongs to the process that it came
        # from.
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        end_group(process)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a process that leads a group, and the group with it: asks, and after a grace period ends
    by force."""
    for number, seconds in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        if process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=seconds)


def _answers(client: object, url: str) -> bool:
    """Whether a server says that it is ready: by /health, or by its list of models where there is
    no /health."""
    import httpx

    assert isinstance(client, httpx.Client)
    try:
        health = client.get(f"{url}/health")
        return health.is_success or (
            health.status_code in (404, 405) and client.get(f"{url}/v1/models").is_success
        )
    except httpx.TransportError:
        return False


def _new_log() -> Path:
    descriptor, name = tempfile.mkstemp(prefix="cowest-server-", suffix=".log")
    os.close(descriptor)
    return Path(name)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
