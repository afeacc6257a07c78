"""Ctrl-C and SIGTERM, in each stage and in real processes: exit code, what is kept, and a command
that goes on."""

from __future__ import annotations

import errno
import json
import os
import pty
import re
import select
import shlex
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from live_task import (
    SCRIPTED,
    TASK,
    answered,
    committed,
    cowest,
    environment,
    hearing_signals,
    started,
    until,
    written,
)
from local_server import CHAT, Said, completion, local_server

from cowest_dspy.store.progress import read_snapshot

SHOTS = """
[cycle]
strategy = "search"
[cycle.steps.search]
optimizer = "BootstrapFewShotWithRandomSearch"
settings = { num_candidate_programs = 2, max_bootstrapped_demos = 2, max_labeled_demos = 2 }
"""


def goes_on(said: str, folder: Path) -> None:
    """The command that a message gives, pasted into a shell."""
    command = said.strip().splitlines()[-1].strip()
    python, _, rest = command.partition(" ")
    assert python == Path(sys.executable).name and rest.startswith("-m cowest_dspy.cli.main "), said
    pasted = f"{shlex.quote(sys.executable)} {rest}"
    done = subprocess.run(
        pasted,
        shell=True,
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


CASES = [
    ("collect", signal.SIGINT, "collect", SCRIPTED, "Collecting drafts and their influence"),
    ("collect", signal.SIGTERM, "collect", SCRIPTED, "Collecting drafts and their influence"),
    (
        "evaluate --arm strong",
        signal.SIGTERM,
        "evaluate strong",
        SCRIPTED,
        "Evaluating strong alone",
    ),
    ("cycle", signal.SIGINT, "1 search", SCRIPTED + SHOTS, "Step 1: search"),
    ("cycle", signal.SIGTERM, "1 search", SCRIPTED + SHOTS, "Step 1: search"),
]


@pytest.mark.parametrize(
    ("verb", "number", "stage", "more", "title"),
    CASES,
    ids=[f"{case[0]}-{case[1].name}" for case in CASES],
)
def test_a_signal_stops_a_stage_and_keeps_what_was_paid_for(
    verb: str, number: signal.Signals, stage: str, more: str, title: str, tmp_path: Path
) -> None:
    folder = tmp_path / "a folder"
    written(folder, latency=0.3, more=more)

    def under_way() -> bool:
        now = read_snapshot(folder / "run")
        return bool(now and now.stage and now.stage.name == stage and len(answered(folder)) > 12)

    with started(folder, *verb.split(), "task.toml", "--run", "run") as process:
        until(under_way, process)
        process.send_signal(number)
        out, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number, out + said
    assert "Traceback" not in said and f'in "{title}"' in said, said
    assert f"Stopped by {'Ctrl-C' if number == signal.SIGINT else 'SIGTERM'}" in said
    before = answered(folder)
    assert committed(folder) == set(before) and len(before) == len(set(before)), (
        "everything that was answered is committed"
    )
    now = read_snapshot(folder / "run")
    assert now and (now.state, now.signal) == ("stopped", number) and now.calls == len(before)
    assert f"In this session: {len(before)} calls" in said
    (folder / "latency.txt").write_text("0.001")
    goes_on(said, folder)
    after = answered(folder)
    assert len(after) == len(set(after)) > len(before), "nothing that was committed is asked again"
    last = read_snapshot(folder / "run")
    assert last and last.state == "finished" and last.cached > 0


HOSTED = {
    "api": (
        'model = "openai/m"\napi_key_env = "COWEST_TEST_KEY"\nprice = { input = 0.0, output = '
        "10000.0 }"
    ),
    "server": 'model = "m"',
}


@pytest.mark.parametrize(
    ("kind", "number"),
    [("api", signal.SIGINT), ("api", signal.SIGTERM), ("server", signal.SIGTERM)],
)
def test_a_signal_keeps_and_books_every_answer_that_a_server_has_billed(
    kind: str, number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COWEST_TEST_KEY", "correct horse battery staple")
    billed: list[str] = []
    counting = threading.Lock()

    def answer(body: Any) -> Said:
        time.sleep(1.0)
        with counting:
            billed.append(json.dumps(body, sort_keys=True))
        return completion("yes")

    written(tmp_path, latency=0.01)
    with local_server({CHAT: answer}) as server:
        strong = (
            f'[strong]\nkind = "{kind}"\napi_base = "{server.url}/v1"\nconcurrency = '
            f"8\n{HOSTED[kind]}\n"
        )
        (tmp_path / "task.toml").write_text(
            TASK.partition("[strong]")[0] + strong + SCRIPTED, encoding="utf-8"
        )
        with started(tmp_path, "collect", "task.toml", "--run", "run") as process:
            until(lambda: len(billed) > 8 and len(server.asked) > len(billed), process)
            process.send_signal(number)
            out, said = process.communicate(timeout=60)
        assert process.returncode == 128 + number, out + said
        asked = len(server.asked)
        assert len(billed) == asked == len(set(billed)), "what was under way was waited for"
    with closing(sqlite3.connect(tmp_path / "run/run.sqlite")) as db:
        calls, usd = db.execute(
            "SELECT count(*), sum(usd) FROM calls WHERE model NOT LIKE 'scripted/%'"
        ).fetchone()
    assert calls == asked, "billed is kept"
    assert usd == pytest.approx(0.03 * asked if kind == "api" else 0.0), "billed is booked"
    assert "Stopped at once" not in said and "Traceback" not in said


TRAINING = """
[weak]
kind = "in_process"
model = "{model}"
max_tokens = 8
[sft]
drafts = "task.py:sft_rows"
[sft.settings]
max_steps = 100000
num_train_epochs = 100000
learning_rate = 1e-3
per_device_train_batch_size = 2
gradient_accumulation_steps = 1
"""


def test_a_signal_while_training_keeps_every_step(tiny_model: Path, tmp_path: Path) -> None:
    task = written(tmp_path, more=TRAINING.format(model=tiny_model))

    def steps() -> int:
        now = read_snapshot(tmp_path / "run")
        return now.stage.done if now and now.stage and now.stage.name == "drafts" else 0

    with started(tmp_path, "collect", "task.toml", "--run", "run") as process:
        until(lambda: steps() > 20, process)
        process.send_signal(signal.SIGTERM)
        out, said = process.communicate(timeout=60)
    assert process.returncode == 143, out + said
    assert 'in "SFT of the drafter"' in said and "Traceback" not in said
    now = read_snapshot(tmp_path / "run")
    assert now is not None
    reached = now.stages[-1].done
    assert reached > 20 and not now.stages[-1].whole
    pattern = ".*.checkpoints/checkpoint-*/trainer_state.json"
    (state,) = (tmp_path / "run/adapters").glob(pattern)
    assert json.loads(state.read_text())["global_step"] == reached
    assert task.is_file()


class Terminal:
    """A process in a terminal of its own, of this size; what it draws is in ``text``."""

    def __init__(
        self, folder: Path, *arguments: str, columns: int = 120, color: bool = False
    ) -> None:
        import fcntl
        import struct
        import termios

        self.text = ""
        self.pid, self._end = pty.fork()
        if not self.pid:
            os.chdir(folder)
            variables = {**environment(), "TERM": "xterm-256color"}
            variables.pop("COLUMNS")
            if color:
                variables.pop("NO_COLOR")
            hearing_signals()
            os.execve(
                sys.executable,
                [sys.executable, "-m", "cowest_dspy.cli.main", *arguments],
                variables,
            )
        fcntl.ioctl(self._end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))

    def read(self, seconds: float = 0.1) -> str:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if select.select([self._end], [], [], 0.02)[0]:
                try:
                    self.text += os.read(self._end, 65536).decode("utf-8", "replace")
                except OSError as error:
                    if error.errno != errno.EIO:
                        raise
                    break
        return self.text

    def until(self, text: str, seconds: float = 90) -> None:
        end = time.monotonic() + seconds
        while text not in self.read():
            assert time.monotonic() < end, self.text[-3000:]

    def press(self, key: bytes) -> None:
        os.write(self._end, key)

    def code(self, seconds: float = 60) -> int:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.read()
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                self.read(0.3)
                os.close(self._end)
                return os.waitstatus_to_exitcode(status)
        os.kill(self.pid, signal.SIGKILL)
        raise AssertionError("it did not end: " + self.text[-3000:])


def test_ctrl_c_in_a_terminal_stops_cleanly_and_leaves_the_cursor(tmp_path: Path) -> None:
    written(tmp_path, latency=2.0)  # Several drawings long, so that one of them shows the note.
    terminal = Terminal(tmp_path, "collect", "task.toml", "--run", "run")
    terminal.until("/40")
    terminal.until("calls/s")
    terminal.press(b"\x03")
    assert terminal.code() == 130, terminal.text
    assert "Stopping: what is under way is finished and kept" in terminal.text
    assert "Stopped by Ctrl-C" in terminal.text and "To go on from here" in terminal.text
    assert terminal.text.rfind("\x1b[?25h") > terminal.text.rfind("\x1b[?25l"), (
        "the cursor is shown again"
    )
    assert committed(tmp_path) == set(answered(tmp_path))


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    written(tmp_path, latency=60.0)
    terminal = Terminal(tmp_path, "collect", "task.toml", "--run", "run")
    terminal.until("Collecting")
    terminal.until("calls/s")
    terminal.press(b"\x03")
    terminal.until("Stopping: what is under way")
    time.sleep(0.6)
    began = time.monotonic()
    terminal.press(b"\x03")
    assert terminal.code() == 130
    assert time.monotonic() - began < 50, "a call of 60 seconds is not waited for"
    assert re.search(
        r"Stopped at once: \d+ calls that were under way abandoned, and perhaps paid for",
        terminal.text,
    )
    assert terminal.text.rfind("\x1b[?25h") > terminal.text.rfind("\x1b[?25l"), (
        "the cursor is shown again"
    )
    (tmp_path / "latency.txt").write_text("0.001")
    line = cowest(tmp_path, "runs", ".")
    assert (
        "run\tstopped\tslow_toy\tcollect 0/40" in line.replace("\tcollect\t", "\tcollect 0/40\t")
        and "gone without a word" in line
    )
    cowest(tmp_path, "collect", "task.toml", "--run", "run")


def test_a_bar_fits_a_narrow_terminal_and_says_what_a_wide_one_does(tmp_path: Path) -> None:
    written(tmp_path, latency=0.1)
    terminal = Terminal(tmp_path, "collect", "task.toml", "--run", "run", columns=50, color=True)
    assert terminal.code() == 0, terminal.text
    assert "40/40" in terminal.text or "/40" in terminal.text
    assert "done" in terminal.text and "parse 1" in terminal.text and "\x1b[32m" in terminal.text
