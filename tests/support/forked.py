"""A job in a process of its own, forked from one that has imported everything: for tests that
kill."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable

import psutil


def child(job: Callable[[], None]) -> int:
    """Starts the job; gives its process id. It ends with exit code 1 when the job raises."""
    process = os.fork()
    if process:
        return process
    try:
        job()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def is_gone(pid: int, seconds: float = 10) -> bool:
    """Whether no process of the group ``pid`` is left, within some seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not members(pid):
            return True
        time.sleep(0.05)
    return False


def members(group: int) -> list[psutil.Process]:
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found
