"""A task on scripted models that take their time and note what they have answered: to be seen at
work, and stopped."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import chdir, closing, contextmanager
from pathlib import Path

from command_line import run_here

from cowest_dspy import Store
from cowest_dspy.optimizers.run import NoProgress, RunContext

RECIPE = '''
import os
import time
from pathlib import Path

import dspy

from cowest_dspy import Collaboration
from cowest_dspy.store import serialize
from cowest_dspy.testing import ScriptedEngine

HERE = Path(__file__).parent
LOG = os.open(HERE / "answered.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)


class Slow(ScriptedEngine):
    """Takes its time, and notes each answer as it gives it."""

    def complete(self, request):
        time.sleep(float((HERE / "latency.txt").read_text()))
        response = super().complete(request)
        os.write(LOG, f"{serialize.request_key(request)}\\n".encode())
        return response


def match(example, prediction, trace=None):
    return float(prediction.answer == example.answer)

def rows(split, seed=0):
    count = {"train": 40, "dev": 12, "test": 30}[split]
    return [{"id": f"{split}{i}", "question": f"{split} {i}?", "answer": str(i)} for i in range(count)]

def sft_rows(seed=0):
    return [{"prompt": [{"role": "user", "content": f"Question: {i}?"}], "completion": [{"role": "assistant", "content": "a e i"}]}
            for i in range(8)]

def program():
    return Collaboration("question -> answer", draft="knowledge")

def weak():
    """The number, something else, or nothing, as the seed wants it."""
    def answer(request):
        number = request["messages"][-1]["content"].split()[-1].rstrip("?")
        return (number, f"not {number}", "nothing")[(request["config"].get("seed") or 0) % 3]
    return Slow(answer, model="scripted/weak")

def strong():
    def answer(request):
        text = request["messages"][-1]["content"]
        if "train 7?" in text and "nothing" in text:
            return ""
        return text.partition("Background: ")[2].split("\\n")[0] or "none"
    return Slow(answer, model="scripted/strong")
'''

TASK = """
name = "slow_toy"
program = "task.py:program"
metric = "task.py:match"
[data]
source = "task.py:rows"
inputs = ["question"]
[collect]
drafts = 3
max_errors = 1.0
[pairs]
least = 1
[strong]
kind = "engine"
engine = "task.py:strong"
model = "scripted/strong"
concurrency = 4
"""
SCRIPTED = """
[weak]
kind = "engine"
engine = "task.py:weak"
model = "scripted/weak"
"""


def written(folder: Path, *, latency: float = 0.05, more: str = SCRIPTED) -> Path:
    """The task's files in a folder; gives the TOML. ``more``: further tables, that of the weak
    model among them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "task.py").write_text(RECIPE, encoding="utf-8")
    (folder / "task.toml").write_text(TASK + more, encoding="utf-8")
    (folder / "latency.txt").write_text(str(latency))
    return folder / "task.toml"


def environment() -> dict[str, str]:
    """One thread, wide lines, no colours."""
    root = str(Path(__file__).parents[2])
    return {
        **os.environ,
        "COLUMNS": "200",
        "NO_COLOR": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": root,
    }


def hearing_signals() -> None:
    """In a child: as in a terminal, also where the tests were started by ``nohup`` or in the
    background, which ignore signals."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@contextmanager
def started(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """``cowest`` in the folder, as a process of its own, which is gone afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cowest_dspy.cli.main", *arguments],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hearing_signals,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def cowest(folder: Path, *arguments: str, code: int = 0) -> str:
    """What ``cowest`` prints in the folder, run in this process; it must end with this exit
    code."""
    with chdir(folder):
        ended, out, error = run_here(*arguments)
    assert ended == code, out + error
    assert "Traceback" not in error, error
    return out


def cowest_process(folder: Path, *arguments: str, code: int = 0) -> str:
    """The same in a process of its own."""
    with started(folder, *arguments) as process:
        out, error = process.communicate(timeout=300)
    assert process.returncode == code, out + error
    assert "Traceback" not in error, error
    return out


def answered(folder: Path) -> list[str]:
    """The keys of what the models have answered, in order."""
    return (
        (folder / "answered.log").read_text().split() if (folder / "answered.log").is_file() else []
    )


def committed(folder: Path, run: str = "run") -> set[str]:
    """The keys of what the store has; none of one that was killed before it had its tables."""
    path = folder / run / "run.sqlite"
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as db:
        if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'calls'").fetchone():
            return set()
        return {key for (key,) in db.execute("SELECT key FROM calls WHERE model LIKE 'scripted/%'")}


def until(
    true: Callable[[], bool], process: subprocess.Popen[str] | None = None, seconds: float = 120
) -> None:
    """Waits until it is so; fails when it takes too long, or when the process ends first."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it took too long"
        assert process is None or process.poll() is None, process and process.communicate()
        time.sleep(0.01)


def worked(progress: NoProgress, folder: Path) -> None:
    """Two stages, one in another, with a line, a warning and something printed in between."""
    with Store(folder) as store:
        stages = RunContext(store, progress)
        with stages.stage("outer", "Step 1: weights"):
            with stages.stage("collect", "Collecting") as at:
                for done in range(1, 9):
                    at(done, 8)
                store.count_unusable("parse")
                stages.say("a line [bold]as it is[/bold]")
                warnings.warn("beware", stacklevel=1)
            store.journal.scored("round 1", [1.0, None, 0.5])
