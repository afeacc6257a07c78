"""A job in a process of its own, forked from one that has imported everything: for tests that kill."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable


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
