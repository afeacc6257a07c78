"""`cowest serve` as a process of its own."""

from __future__ import annotations

import re
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from live_task import started


@contextmanager
def running(
    folder: Path, *arguments: str, files: int | None = None
) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """``cowest serve`` of the slow task in a process: the process, its address, and what it has
    said so far. ``files``: how many it may have open (on Linux)."""
    with started(folder, "serve", *arguments) as process:
        if files is not None:
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (files, files))
        assert process.stdout is not None
        said: list[str] = []
        for line in process.stdout:
            said.append(line)
            found = re.search(r"http://\S+/v1", line)
            if found:
                yield process, found.group(), said
                return
        pytest.fail(f"it ended: {said} {process.stderr.read() if process.stderr else ''}")
