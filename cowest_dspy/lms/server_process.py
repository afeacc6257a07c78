"""The server that a ``command`` of a ``[weak]`` or ``[strong]`` table starts: at the first request,
on a free port of 127.0.0.1, until this process ends.

What it prints goes into a log file. Nothing that was not started here is ever touched.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import httpx

from cowest_dspy.errors import ModelError, masked
from cowest_dspy.utils.processes import TAIL, end_group, free_port, start

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where a server answers, and which start of it this is: adapters that were put into an earlier
    one are gone."""

    url: str
    start: int = 0


class ServerProcess:
    """A command that serves HTTP, started at the first need, from any thread, once.

    Args:
        command: the program and its arguments; "{port}" becomes a free port, "{python}" this
            Python.
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
                'as in "--port", "{port}".'
            )
        self.command, self.startup = tuple(command), startup
        self.log = Path(log) if log else None
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._more: tuple[str, ...] = ()
        self._place, self._owner, self._deaths = Place(""), 0, 0
        self._failed: str | None = None

    @property
    def pid(self) -> int | None:
        """The process id of the group that runs; None when nothing does."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def running(self, more: Sequence[str] = ()) -> Place:
        """Where the server runs with the arguments ``more``; started, or started anew, when it does
        not. Calls that are under way when it is started anew fail, and may be tried again.

        Raises:
            ModelError: it cannot be started, does not answer in time, or has died a second time. It
                is not tried again before :meth:`stop`.
        """
        with self._lock:
            if self._failed:
                raise ModelError(self._failed)
            if self.pid is None or not set(more) <= set(self._more):
                self._note_death()
                try:
                    self._start(tuple(more))
                    self._wait_until_it_answers()
                except BaseException:  # Interrupted, or dead: nothing is left running.
                    self._end()
                    raise
            return self._place

    def stop(self) -> None:
        """End the process group that was started here; the next need starts it again."""
        with self._lock:
            self._end()
            self._failed, self._deaths = None, 0

    def _note_death(self) -> None:
        process = self._process
        if process is not None and process.poll() is not None and self._owner == os.getpid():
            self._deaths += 1
            # Once can be bad luck (memory that another program took); twice is a broken server.
            if self._deaths > 1:
                self._fail(f"died again while it was used, with exit code {process.returncode}")
            _logger.warning("The server died (%s), starting it again", process.returncode)
        self._end()

    def _start(self, more: tuple[str, ...]) -> None:
        port = free_port()
        command = [
            part.replace("{port}", str(port)).replace("{python}", sys.executable)
            for part in (*self.command, *more)
        ]
        if shutil.which(command[0]) is None:
            self._fail(
                f"cannot be started: there is no program {command[0]}; install it, or give its "
                "whole path"
            )
        if self.log is None:
            self.log = Path(tempfile.mkstemp(prefix="cowest-server-", suffix=".log")[1])
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            log.write(f"\n$ {masked(' '.join(command))}\n".encode())
            log.flush()
            self._process = start(command, log)
        if self._place.start == 0:
            atexit.register(self._end)
        self._owner, self._more = os.getpid(), more
        self._place = Place(f"http://127.0.0.1:{port}/v1", self._place.start + 1)

    def _wait_until_it_answers(self) -> None:
        process, deadline = self._process, time.monotonic() + self.startup
        assert process is not None
        # No proxy: this machine's own address is meant.
        with httpx.Client(trust_env=False, timeout=5.0) as client:
            while time.monotonic() < deadline:
                if process.poll() is not None:
                    self._fail(f"ended with exit code {process.returncode} before it answered")
                if _answers(client, self._place.url):
                    return
                time.sleep(0.05)
        self._fail(f"did not answer within {self.startup:g} seconds (startup); it was stopped")

    def _fail(self, what: str) -> NoReturn:
        self._failed = f"The server `{masked(' '.join(self.command))}` {what}."
        if self.log is not None and self.log.is_file():
            text = masked(self.log.read_text(encoding="utf-8", errors="replace"))
            lines = "".join(f"\n  {line}" for line in text.splitlines()[-TAIL:])
            self._failed += f" Its log is {self.log}:{lines}"
        raise ModelError(self._failed)

    def _end(self) -> None:
        # A fork has the same object, and must not end what its parent has started.
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            end_group(process)


def _answers(client: httpx.Client, url: str) -> bool:
    """Whether a server is ready: by /health, or by its list of models where there is no /health
    (llama.cpp's server lists its model while it still loads it)."""
    try:
        health = client.get(f"{url.removesuffix('/v1')}/health")
        return health.is_success or (
            health.status_code in (404, 405) and client.get(f"{url}/models").is_success
        )
    except httpx.TransportError:
        return False
