"""Files appear whole or not at all, are as readable as the umask says, and what a killed writer
left goes with the next writer."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from report_runs import full_run

from cowest_dspy.report import write_report
from cowest_dspy.utils.files import write_whole
from cowest_dspy.utils.jsonl import write_jsonl


@pytest.fixture
def private() -> Iterator[None]:
    """A umask that lets nobody else read."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.usefixtures("private")
def test_what_is_written_under_a_private_umask_is_private(tmp_path: Path) -> None:
    written = write_report(full_run(), tmp_path)
    write_jsonl(tmp_path / "pairs.jsonl", [{"a": 1}])
    assert {mode(path) for path in (written.json, written.html, tmp_path / "pairs.jsonl")} == {
        0o600
    }
    os.umask(0o022)
    write_whole({tmp_path / "pairs.jsonl": "{}\n"})
    assert mode(tmp_path / "pairs.jsonl") == 0o644


def test_a_failure_while_writing_leaves_the_old_files_and_nothing_else(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    write_whole({one: "old", two: "old"})
    with pytest.raises(UnicodeEncodeError):
        write_whole({one: "new", two: "half of a character: \ud800"})
    assert (one.read_text(), two.read_text()) == ("old", "old")
    assert sorted(tmp_path.iterdir()) == [one, two]


KILLED = """
import os, pathlib, signal, sys
from cowest_dspy.utils.files import write_whole

pathlib.Path.replace = lambda part, target: os.kill(os.getpid(), signal.SIGKILL)
write_whole({pathlib.Path(sys.argv[1]): "never there"})
"""


def test_what_a_killed_writer_left_is_taken_away_by_the_next(tmp_path: Path) -> None:
    target = tmp_path / "config.toml"
    ended = subprocess.run([sys.executable, "-c", KILLED, str(target)], check=False)
    assert ended.returncode == -signal.SIGKILL and not target.exists()
    (left,) = tmp_path.iterdir()
    another = tmp_path / f".config.toml.{os.getpid()}.0a.part"  # of a process that still writes
    another.touch()
    write_whole({target: "whole"})
    assert target.read_text() == "whole" and not left.exists() and another.exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with a name")
def test_a_pipe_or_a_device_is_written_to_and_no_file_takes_its_place(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(pipe.read_text)
        write_whole({pipe: "all of it"})
        assert read.result(30) == "all of it"
    assert pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]
