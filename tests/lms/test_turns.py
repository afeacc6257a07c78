"""The one thread that computes: a process may end while it is in the midst of something."""

from __future__ import annotations

import subprocess
import sys

ENDS = """
import threading, time, torch
from cowest_dspy.lms.local.scheduler import COMPUTE

begun = threading.Event()

def work():
    matrix, end = torch.randn(400, 400), time.monotonic() + 0.5
    begun.set()
    while time.monotonic() < end:
        matrix = (matrix @ matrix).clamp(-1, 1)

threading.Thread(target=COMPUTE.run, args=(work,), daemon=True).start()
begun.wait()
"""


def test_a_process_that_ends_during_a_computation_is_not_aborted() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENDS], capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
