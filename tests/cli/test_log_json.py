"""`--log json`: one object a line, whatever happens, and nothing else."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from live_task import SCRIPTED, cowest, cowest_process, worked, written

from cowest_dspy.cli.progress import Progress

COMMON = {
    "schema_version",
    "event",
    "time",
    "run",
    "stage",
    "title",
    "done",
    "total",
    "calls",
    "cached",
    "tokens",
    "usd",
    "failures",
}
MORE = {
    "start": {"task", "verb", "command", "pid", "host"},
    "stage_begin": set(),
    "progress": {"seconds", "left", "calls_per_second", "budget", "best"},
    "stage_end": {"seconds", "tokens_in", "tokens_out", "whole"},
    "message": {"text"},
    "end": {"state", "exit_code", "error", "continue", "verdict", "results"},
}


def events(text: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in text.splitlines()]
    for one in found:
        assert set(one) == COMMON | MORE[one["event"]] and one["schema_version"] == 1
        assert one["time"].endswith("+00:00")
    return found


def test_json_lines_of_stages_say_what_the_view_says(tmp_path: Path) -> None:
    out = io.StringIO()
    with pytest.warns(UserWarning, match="beware"):
        worked(Progress("json", out=out), tmp_path)
    found = events(out.getvalue())
    assert [(one["event"], one["stage"]) for one in found] == [
        ("stage_begin", "outer"), ("stage_begin", "collect"), ("message", "collect"),
        ("stage_end", "collect"), ("stage_end", "outer"),
    ]  # fmt: skip
    assert (found[3]["done"], found[3]["total"], found[3]["failures"]) == (8, 8, {"parse": 1})


def test_log_json_prints_events_alone_and_ends_with_the_result(tmp_path: Path) -> None:
    written(tmp_path, latency=0.05, more=SCRIPTED + "[budget]\nstrong_calls = 5000\n")
    found = events(cowest(tmp_path, "collect", "task.toml", "--run", "run", "--log", "json"))
    assert [one["event"] for one in found if one["event"] != "progress"] == [
        "start",
        "stage_begin",
        "stage_end",
        "end",
    ]
    first, last = found[0], found[-1]
    assert (first["task"], first["verb"]) == ("slow_toy", "collect") and first["command"].endswith(
        "--run run --log json"
    )
    assert (last["state"], last["exit_code"], last["error"], last["continue"]) == (
        "finished",
        0,
        None,
        None,
    )
    assert (
        last["results"]["drafts"] == 120
        and last["results"]["failed"] == 2
        and last["failures"] == {"parse": 1}
    )
    during = [one for one in found if one["event"] == "progress"]
    assert during and during[-1]["total"] == 40 and during[-1]["calls"] <= last["calls"]
    assert [one["calls"] for one in during] == sorted(one["calls"] for one in during)
    strong = during[-1]["budget"][0]
    assert (
        strong["name"] == "strong calls"
        and strong["most"] == 5000
        and 0 < strong["spent"] <= last["calls"]
    )


def test_what_libraries_print_is_no_event(tmp_path: Path) -> None:
    written(tmp_path, latency=0.001, more=SCRIPTED)
    with (tmp_path / "task.py").open("a") as file:
        file.write("\nprint('loud when it is loaded')\n")
    found = events(
        cowest_process(tmp_path, "collect", "task.toml", "--run", "run", "--log", "json")
    )
    assert found[-1]["state"] == "finished"
    plain = cowest_process(tmp_path, "collect", "task.toml", "--run", "run", "--log", "plain")
    assert "loud when it is loaded" in plain and "done in" not in plain and "influence" in plain


def test_log_json_ends_with_the_error(tmp_path: Path) -> None:
    written(tmp_path, more=SCRIPTED + "[budget]\nstrong_calls = 9\n")
    found = events(
        cowest(tmp_path, "collect", "task.toml", "--run", "run", "--log", "json", code=1)
    )
    last = found[-1]
    assert (last["event"], last["state"], last["exit_code"], last["stage"]) == (
        "end",
        "stopped",
        1,
        "collect",
    )
    assert "strong_calls = 9 is reached" in last["error"] and last["continue"].endswith(
        "--log json"
    )
    text = (tmp_path / "task.toml").read_text()
    (tmp_path / "task.toml").write_text(text.replace("drafts = 3", "draft = 3"))
    (only,) = events(
        cowest(tmp_path, "collect", "task.toml", "--run", "other", "--log", "json", code=1)
    )
    assert (only["event"], only["state"], only["exit_code"]) == (
        "end",
        "failed",
        1,
    ) and 'Did you mean "drafts"' in only["error"]


def test_the_page_names_every_key_of_every_event() -> None:
    page = (Path(__file__).parents[2] / "docs/live.md").read_text(encoding="utf-8")
    common = page.partition("Every object has:")[2].partition("| `event` | when")[0]
    rows = {
        name: row for name in MORE for row in page.splitlines() if row.startswith(f"| `{name}` |")
    }
    assert all(f"`{key}`" in common for key in COMMON)
    for name, keys in MORE.items():
        assert all(f"`{key}`" in rows[name] for key in keys), name
