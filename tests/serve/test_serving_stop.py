"""`cowest serve` as a process: it starts where it may, finishes what is under way when it is
stopped."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_task import started, until, written
from served_process import running
from serving_parts import body, post, rules

from cowest_dspy import Store, load_config
from cowest_dspy.cli import main
from cowest_dspy.errors import ConfigError
from cowest_dspy.serve.config import api_key
from cowest_dspy.serve.server import bind

ROOT = Path(__file__).parents[2]
STRONG_ONLY = (
    '\n[weak]\nkind = "engine"\nengine = "task.py:weak"\nmodel = '
    '"scripted/weak"\n[serve]\nport = 0\n'
)


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, error = process.communicate(timeout=60)
    return process.returncode, out, error


def ask(address: str, number: int, pool: ThreadPoolExecutor) -> Any:
    return pool.submit(post, address, {**body(f"train {number}?"), "model": "slow_toy"})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_what_is_under_way_finish_and_takes_nothing_more(
    tmp_path: Path, number: signal.Signals
) -> None:
    written(tmp_path, latency=1.0, more=STRONG_ONLY)
    with (
        running(tmp_path, "task.toml") as (process, address, _),
        ThreadPoolExecutor(8) as pool,
        httpx.Client() as kept,
    ):
        health = address.replace("/v1", "/healthz")
        assert kept.get(health).json()["status"] == "ok"
        asked = [ask(address, number, pool) for number in range(6)]
        until(
            lambda: "cowest_active 6.0" in httpx.get(address.replace("/v1", "/metrics")).text,
            process,
        )
        process.send_signal(number)
        until(lambda: kept.get(health).status_code == 503, process)
        refused = post(address, {**body(), "model": "slow_toy"})
        assert (
            refused.status_code == 503
            and refused.json()["error"]["code"] == "stopping"
            and refused.headers["retry-after"]
        )
        assert [one.result().status_code for one in asked] == [200] * 6, (
            "nothing that was taken is lost"
        )
        code, out, error = ended(process)
    assert code == 0 and "stopped" in out and "Traceback" not in error, error


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    written(tmp_path, latency=30.0, more=STRONG_ONLY)
    with running(tmp_path, "task.toml") as (process, address, _), ThreadPoolExecutor(2) as pool:
        asked = ask(address, 1, pool)
        until(
            lambda: "cowest_active 1.0" in httpx.get(address.replace("/v1", "/metrics")).text,
            process,
        )
        process.send_signal(signal.SIGTERM)
        until(lambda: httpx.get(address.replace("/v1", "/healthz")).status_code == 503, process)
        time.sleep(0.6)  # Nearer than half a second is one signal, which a terminal sends twice.
        process.send_signal(signal.SIGTERM)
        code, _, _ = ended(process)
        assert code == 128 + signal.SIGTERM
        assert isinstance(asked.exception(), httpx.HTTPError)


def test_what_hangs_is_not_waited_for_longer_than_said(tmp_path: Path) -> None:
    written(tmp_path, latency=600.0, more=STRONG_ONLY + "[serve.limits]\ngrace = 0.1\n")
    with running(tmp_path, "task.toml") as (process, address, _), ThreadPoolExecutor(2) as pool:
        asked = ask(address, 1, pool)
        until(
            lambda: "cowest_active 1.0" in httpx.get(address.replace("/v1", "/metrics")).text,
            process,
        )
        process.send_signal(signal.SIGTERM)
        code, _, log = ended(process)
        assert code == 0 and "Traceback" not in log, log
        assert (
            asked.result().status_code == 503
            and asked.result().json()["error"]["code"] == "stopping"
        )


def test_the_log_has_a_line_for_each_request_and_no_text_of_it(tmp_path: Path) -> None:
    written(tmp_path, latency=0.0, more=STRONG_ONLY)
    secret = "my private question 4711"
    with running(tmp_path, "task.toml") as (process, address, _):
        assert post(address, {**body(secret), "model": "slow_toy"}).status_code == 200
        assert post(address, {**body(secret), "model": secret}).status_code == 404
        assert httpx.get(f"{address}/{secret}").status_code == 404
        process.terminate()
        _, out, error = ended(process)
    assert (
        len(re.findall(r"chatcmpl-\w+ /v1/chat/completions 200 .* route=collaborate", error)) == 1
    )
    assert error.count("chatcmpl-") == 3 and "4711" not in error + out
    (tmp_path / "task.toml").write_text((tmp_path / "task.toml").read_text() + "log_text = true\n")
    with running(tmp_path, "task.toml") as (process, address, _):
        assert post(address, {**body(secret), "model": "slow_toy"}).status_code == 200
        process.terminate()
        assert secret in ended(process)[2]


def test_another_address_needs_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("COWEST_API_KEY", "OTHER_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert api_key(rules()) is None
    for host in ("0.0.0.0", "::", "192.168.1.7", "example.org"):
        with pytest.raises(ConfigError, match="export COWEST_API_KEY"):
            api_key(rules(host=host))
    with pytest.raises(ConfigError, match="OTHER_KEY is not set"):
        api_key(rules(api_key_env="OTHER_KEY"))
    monkeypatch.setenv("COWEST_API_KEY", "short")
    with pytest.raises(ConfigError, match="8 or more"):
        api_key(rules())
    monkeypatch.setenv("COWEST_API_KEY", "long-enough")
    assert api_key(rules(host="0.0.0.0")) == "long-enough"
    monkeypatch.delenv("COWEST_API_KEY")
    written(tmp_path, more=STRONG_ONLY)
    with started(tmp_path, "serve", "task.toml", "--host", "0.0.0.0") as process:
        code, _, error = ended(process)
    assert code == 1 and "needs an API key" in error and "Traceback" not in error


def test_a_port_that_is_taken_is_told() -> None:
    with bind("127.0.0.1", 0) as taken, pytest.raises(ConfigError, match="give another --port"):
        bind("127.0.0.1", taken.getsockname()[1])


def test_an_answer_waits_for_no_receipt_of_its_head() -> None:
    """Two small writes, as a head and a body are, take 40 ms together where the second waits for
    the first to be acknowledged."""
    with bind("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_what_cannot_be_served_is_told_by_the_verb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path, more=STRONG_ONLY)
    (tmp_path / "fields.toml").write_text('[serve]\nport = 0\nfields = ["anser"]\n')
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    for arguments, why in (
        (["task.toml", "fields.toml"], 'no "anser". Did you mean "answer"?'),
        (["empty"], "empty is no bundle"),
    ):
        monkeypatch.setattr(sys, "argv", ["cowest", "serve", *arguments])
        with pytest.raises(SystemExit) as end:
            main.main()
        assert end.value.code == 1 and why in capfd.readouterr().err


@pytest.mark.parametrize(
    ("old", "why"),
    [
        ("[serve.breaker]\nfailures = 3\n", '"breaker" was removed: a proxy in front'),
        ("[serve.sample]\nshare = 0.5\n", '"sample" was removed: log_text'),
        ("[serve.limits]\nqueue = 10\n", '"queue" was removed: connections bounds what waits'),
    ],
)
def test_what_was_removed_is_named_with_what_to_use(tmp_path: Path, old: str, why: str) -> None:
    written(tmp_path, more=STRONG_ONLY + old)
    with pytest.raises(ConfigError, match=re.escape(why)):
        load_config([tmp_path / "task.toml"])


def test_a_run_that_is_served_is_free_for_other_verbs(tmp_path: Path) -> None:
    written(tmp_path, latency=0.0, more=STRONG_ONLY)
    with running(tmp_path, "task.toml", "--run", "run") as (process, _, _):
        with Store(tmp_path / "run"):
            pass
        process.terminate()
        assert ended(process)[0] == 0
    assert os.path.isfile(tmp_path / "run" / "config.toml")
