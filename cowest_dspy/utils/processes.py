"""Commands in process groups of their own, which end when the process that started them ends.

    process = start(["llama-server", "--port", "8080"], log)
    end_group(process)

A server or a training must not outlive us, however we end: after a SIGKILL nobody is left to stop
it. So the command runs under this file as a script (``python -I processes.py PARENT COMMAND...``),
which looks whether its parent is still the process PARENT. As a script it imports nothing of the
package, which would take longer than many a server needs to start.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

GRACE = 10.0
"""Seconds between the request to end and the end by force."""
TAIL = 15
"""Lines of a log that an error repeats."""
WATCHED = Path(__file__)
"""The script that runs a command and ends it when its parent is gone."""


def start(command: Sequence[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start a command that ends with this process, in a group of its own; it prints to ``log``."""
    watched = [sys.executable, "-I", str(WATCHED), str(os.getpid()), *command]
    return subprocess.Popen(
        watched,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a group, and the group with it, by force after ``GRACE``."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE)


def free_port() -> int:
    """A port of 127.0.0.1 that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _watch(parent: int, command: list[str]) -> int:
    """Run a command; its exit code, or 128 and the signal's number, as shells have it."""
    # SIGTERM goes to the whole group. This script stays until the command has ended, to tell how.
    signal.signal(signal.SIGTERM, lambda *_: None)
    child = subprocess.Popen(command)
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = child.wait(timeout=0.2)
            # What the command itself had started, and left.
            os.killpg(os.getpgrp(), signal.SIGTERM)
            return code if code >= 0 else 128 - code
        if os.getppid() != parent:
            os.killpg(os.getpgrp(), signal.SIGTERM)
            deadline = time.monotonic() + GRACE / 2
            while child.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(_watch(int(sys.argv[1]), sys.argv[2:]))
