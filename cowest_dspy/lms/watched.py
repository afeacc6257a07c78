"""Runs a command, and ends it when the process that wanted it is gone: ``python -I watched.py
PARENT COMMAND...``

A server that we start must not outlive us, however we end: after a SIGKILL nobody is left to stop
it. So it runs under this script, in one process group with it; the script looks whether its parent
is still the process PARENT. It stands alone, since importing the package would take longer than
many a server needs to start.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

GRACE = 5.0
"""Seconds between the request to end and the end by force."""


def main(parent: int, command: list[str]) -> int:
    """The exit code of ``command``; 128 and the signal's number when a signal ended it, as shells
    have it."""
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
            end(child)


def end(child: subprocess.Popen[bytes]) -> None:
    """Asks the group to end; after the grace period the group is killed, this script with it."""
    os.killpg(os.getpgrp(), signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
