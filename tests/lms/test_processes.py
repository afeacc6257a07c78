"""Servers that we start: small scripts that serve, die, hang or will not end, and what becomes of
them."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from forked import is_gone, members

from cowest_dspy.errors import ModelError
from cowest_dspy.lms.server_process import ServerProcess
from cowest_dspy.utils import processes

# It answers /v1/models with its arguments and has no /health, as servers of other makers.
SCRIPT = """
import http.server, json, signal, sys
port, how = int(sys.argv[1]), sys.argv[2:]
if "deaf" in how:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "dies" in how:
    print("first line"); print("no memory for the model", flush=True); sys.exit(3)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        known = self.path == "/v1/models" and "never" not in how
        self.send_response(200 if known else 503 if "never" in how else 404)
        self.end_headers()
        self.wfile.write(json.dumps(how).encode())
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def command(*how: str) -> list[str]:
    return ["{python}", "-I", "-c", SCRIPT, "{port}", *how]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "server.log"


@pytest.fixture
def server(log: Path) -> Iterator[ServerProcess]:
    made = ServerProcess(command(), startup=30, log=log)
    yield made
    made.stop()


def test_a_server_starts_at_the_first_need_and_stop_leaves_nothing(server: ServerProcess) -> None:
    assert server.pid is None
    place = server.running()
    assert httpx.get(f"{place.url}/models").json() == []
    assert place.url.startswith("http://127.0.0.1:")
    pid = server.pid
    assert pid is not None and len(members(pid)) == 2
    server.stop()
    assert is_gone(pid) and server.pid is None


def test_many_threads_start_one(server: ServerProcess) -> None:
    def use(_: int) -> tuple[str, int | None]:
        return server.running().url, server.pid

    with ThreadPoolExecutor(16) as pool:
        assert len(set(pool.map(use, range(32)))) == 1


def test_a_server_that_dies_at_once_is_told_with_its_last_words_and_not_tried_again(
    log: Path,
) -> None:
    server = ServerProcess(command("dies"), startup=120, log=log)
    started = time.monotonic()
    for _ in range(2):
        with pytest.raises(
            ModelError, match=r"(?s)exit code 3 .*server\.log.*no memory for the model"
        ):
            server.running()
    assert time.monotonic() - started < 100 and log.read_text().count("first line\n") == 1


def test_a_server_that_never_answers_is_stopped_at_the_deadline(log: Path) -> None:
    server = ServerProcess(command("never"), startup=5, log=log)
    with pytest.raises(ModelError, match=r"did not answer within 5 seconds"):
        server.running()
    assert server.pid is None and "GET /health" in log.read_text()
    assert not [
        process
        for process in psutil.Process().children(recursive=True)
        if "never" in " ".join(process.cmdline())
    ]


def test_a_server_that_will_not_end_is_ended(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE", 0.3)
    server = ServerProcess(command("deaf"), startup=30, log=log)
    server.running()
    pid = server.pid
    server.stop()
    assert pid is not None and is_gone(pid)


def test_a_server_that_died_is_started_again_once(server: ServerProcess) -> None:
    for start in (1, 2):
        assert server.running().start == start
        pid = server.pid
        assert pid is not None
        for process in members(pid):
            process.kill()
        assert is_gone(pid)
    with pytest.raises(ModelError, match="died again while it was used"):
        server.running()
    server.stop()
    assert server.running().start == 3


def test_other_arguments_start_the_server_anew_and_fewer_do_not(server: ServerProcess) -> None:
    server.running()
    pid = server.pid
    place = server.running(("--lora", "x"))
    assert httpx.get(f"{place.url}/models").json() == ["--lora", "x"]
    assert pid is not None and is_gone(pid)
    assert server.running() == place


STARTER = """
import sys, time
from cowest_dspy.lms.server_process import ServerProcess
server = ServerProcess(sys.argv[2:], startup=30)
server.running()
print(server.pid, server.log, flush=True)
if sys.argv[1] == "stays":
    time.sleep(60)
"""


@pytest.mark.parametrize("end", ["stays", "ends"])
def test_a_server_ends_with_us_however_we_end(end: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STARTER, end, *command()], stdout=subprocess.PIPE, text=True
    ) as ours:
        assert ours.stdout is not None
        pid, log = ours.stdout.readline().split()
        if end == "stays":
            assert len(members(int(pid))) == 2
            ours.send_signal(signal.SIGKILL)
        ours.wait(timeout=30)
        assert is_gone(int(pid))
    Path(log).unlink()


def test_a_command_that_cannot_be_says_so(log: Path) -> None:
    with pytest.raises(ModelError, match=r'has no "\{port\}"'):
        ServerProcess(["llama-server"], startup=1)
    missing = ServerProcess(["no-such-server-here", "{port}"], startup=1, log=log)
    with pytest.raises(ModelError, match="there is no program no-such-server-here"):
        missing.running()
