"""`cowest runs` and `cowest watch`: what has become of runs, seen from outside, without disturbing
anybody."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from forked import child
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live_task import SCRIPTED, cowest, started, until, written
from rich.console import Console
from typer.testing import CliRunner

from cowest_dspy import Store
from cowest_dspy.cli import main
from cowest_dspy.cli.progress import Progress, describe_end, follow
from cowest_dspy.errors import BudgetError
from cowest_dspy.optimizers.run import NoProgress, RunContext
from cowest_dspy.report.runs import RunLine, describe_run, is_run, run_folders
from cowest_dspy.store import serialize
from cowest_dspy.store.progress import FILE, Snapshot, is_alive, iso, process_started, read_snapshot
from cowest_dspy.utils.interrupts import Interrupted


def answer(store: Store, text: str = "x") -> None:
    request = serialize.request_from_messages(
        "scripted/strong", [{"role": "user", "content": text}], seed=0
    )
    store.answer(request, lambda: serialize.make_response("scripted/strong", "yes", "stop", 3, 1))


def worked(folder: Path, error: BaseException | None = None, calls: int = 1) -> Path:
    """A run of one stage, which ends so."""
    with (
        suppress(*([type(error)] if error else [])),
        Store(folder) as store,
        RunContext(store, NoProgress()).stage("collect", "Collecting") as progress,
    ):
        for number in range(calls):
            answer(store, str(number))
        progress(calls, 9)
        if error is not None:
            raise error
    return folder


def test_a_run_that_has_ended_says_how(tmp_path: Path) -> None:
    finished = describe_run(worked(tmp_path / "a"))
    assert (finished.state, finished.stage, finished.calls, finished.pid) == (
        "finished",
        "collect",
        1,
        None,
    )
    for name, error, state in (
        ("b", KeyboardInterrupt(), "stopped"),
        ("c", BudgetError("[budget] is reached"), "stopped"),
        ("d", RuntimeError("sk-abcdefghijklmnop123456 was refused"), "failed"),
    ):
        line = describe_run(worked(tmp_path / name, error))
        assert (line.state, line.stage) == (state, "collect") and type(
            error
        ).__name__ in line.detail
        assert "sk-abc" not in (tmp_path / name / FILE).read_text(), "law 10"


def test_a_run_at_work_is_running_with_its_process_and_a_killed_one_is_stopped(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"

    def work() -> None:
        with (
            Store(folder) as store,
            RunContext(store, NoProgress()).stage("collect", "Collecting") as progress,
        ):
            answer(store)
            progress(1, 9)
            store.journal.write()
            time.sleep(60)

    process = child(work)
    try:
        until(
            lambda: (
                (now := read_snapshot(folder)) is not None and bool(now.stage and now.stage.done)
            )
        )
        line = describe_run(folder)
        assert (line.state, line.pid, line.host, line.stage) == (
            "running",
            process,
            socket.gethostname(),
            "collect",
        )
        assert (line.done, line.total) == (1, 9)
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    gone = describe_run(folder)
    assert (gone.state, gone.pid, gone.stage, gone.done) == (
        "stopped",
        None,
        "collect",
        1,
    ) and "without a word" in gone.detail
    with Store(folder):
        pass  # who only looks does not make a finished run of it
    assert describe_run(folder).state == "stopped" and "killed" in describe_run(folder).detail
    worked(folder)
    assert describe_run(folder).state == "finished"


def test_a_process_id_that_was_given_out_again_is_not_the_run(tmp_path: Path) -> None:
    worked(tmp_path)
    snapshot = read_snapshot(tmp_path)
    assert snapshot
    now = replace(snapshot, state="running", pid=os.getpid(), process_started=process_started())
    assert is_alive(now) and not is_alive(replace(now, process_started=now.process_started - 100))
    far = replace(now, host="elsewhere", updated=iso(time.time()))
    assert (
        is_alive(far)
        and not is_alive(replace(far, updated=iso(time.time() - 3600)))
        and not is_alive(replace(far, updated="?"))
    )


def test_runs_are_found_below_a_folder_and_their_parts_are_not(tmp_path: Path) -> None:
    for name in ("b", "a", "group/c", "too/deep/down/d"):
        worked(tmp_path / name)
    with Store(tmp_path / "a") as store:
        store.within("seed-1").close()
    (tmp_path / "notes").mkdir()
    assert [str(one.relative_to(tmp_path)) for one in run_folders(tmp_path)] == [
        "a",
        "b",
        "group/c",
    ]
    assert (
        list(run_folders(tmp_path / "a")) == [tmp_path / "a"]
        and list(run_folders(tmp_path / "none")) == []
    )


def test_a_run_of_an_earlier_version_and_one_that_was_not_begun(tmp_path: Path) -> None:
    (worked(tmp_path / "old") / FILE).unlink()
    line = describe_run(tmp_path / "old")
    assert (line.state, line.calls, line.usd, line.stage) == ("unknown", 1, None, "collect")
    with Store(tmp_path / "new"):
        pass
    assert describe_run(tmp_path / "new").state == "empty"
    (tmp_path / "nothing").mkdir()
    assert not is_run(tmp_path / "nothing")


def test_a_damaged_store_is_said_to_be_damaged_with_what_to_type(tmp_path: Path) -> None:
    path = worked(tmp_path / "run") / "run.sqlite"
    path.write_bytes(b"no database at all" * 500)
    line = describe_run(tmp_path / "run")
    assert line.state == "damaged" and f"cowest doctor --repair {tmp_path / 'run'}" in line.detail
    said = CliRunner().invoke(main.app, ["runs", str(tmp_path)])
    assert said.exit_code == 0 and "damaged" in said.output


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = worked(tmp_path_factory.mktemp("runs") / "run", calls=30)
    (folder / "config.toml").write_text('name = "toy"\n')
    (folder / "report.json").write_text("{}")
    return folder


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["run.sqlite", FILE, "config.toml", "report.json", "run.sqlite-wal"]),
    place=st.floats(0, 1),
    noise=st.binary(max_size=3000),
    cut=st.booleans(),
)
def test_no_damage_is_an_exception(
    whole: Path, name: str, place: float, noise: bytes, cut: bool
) -> None:
    file = whole / name
    before = file.read_bytes() if file.exists() else None
    content = bytearray(before or b"")
    at = int(place * len(content))
    content[at : at + len(noise)] = noise
    file.write_bytes(bytes(content[: at + len(noise)] if cut else content))
    try:
        line = describe_run(whole)
        assert isinstance(line, RunLine) and line.state in (
            "finished",
            "damaged",
            "empty",
            "unknown",
        )
        json.dumps(line.__dict__)
    finally:
        if before is None:
            file.unlink()
        else:
            file.write_bytes(before)
        for more in ("run.sqlite-wal", "run.sqlite-shm"):
            (whole / more).unlink(missing_ok=True)


NAMES = st.sampled_from(["state", "now", "best", "stages", "pid", "usd", "verdict"])


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner),
        max_leaves=6,
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_json_in_the_place_of_the_state_is_read_or_passed_over(
    tmp_path: Path, values: object
) -> None:
    worked(tmp_path) if not (tmp_path / "run.sqlite").exists() else None
    known = {"updated": "", "host": "", "process_started": 0.0, "pid": 1, "state": "finished"}
    text = json.dumps({**known, **values} if isinstance(values, dict) else values)
    (tmp_path / FILE).write_text(text)
    assert describe_run(tmp_path).state in ("running", "finished", "stopped", "failed", "unknown")


def test_looking_writes_nothing_and_does_not_hold_up_who_writes(tmp_path: Path) -> None:
    folder = worked(tmp_path / "run", calls=50)
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    describe_run(folder)
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    stop, looks, wrong = threading.Event(), [0], list[RunLine]()

    def keep_looking() -> None:
        while not stop.is_set():
            line = describe_run(folder)
            looks[0] += 1
            if line.state != "running":
                wrong.append(line)

    with Store(folder) as store:
        watcher = threading.Thread(target=keep_looking)
        watcher.start()
        for number in range(400):
            answer(store, f"again {number}")
        stop.set()
        watcher.join()
        assert store.calls() == 450
    assert looks[0] > 3 and not wrong


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="there are no such pipes")
def test_a_run_that_nobody_reads_on_is_stopped_and_none_that_was_done_before_has_failed(
    tmp_path: Path,
) -> None:
    written(tmp_path, latency=0.2)
    with started(tmp_path, "collect", "task.toml", "--run", "run") as process:
        assert process.stdout is not None and process.stdout.readline()
        process.stdout.close()
        error = process.stderr.read() if process.stderr else ""
        assert process.wait(timeout=60) == 128 + signal.SIGPIPE, error
    assert (
        "nobody read what it printed" in error
        and "To go on from here:" in error
        and "Traceback" not in error
    )
    assert describe_run(tmp_path / "run").state == "stopped"
    assert "finished collect" not in cowest(tmp_path, "collect", "task.toml", "--run", "run")
    assert describe_run(tmp_path / "run").state == "finished"
    for results, state in (({}, "stopped"), ({"drafts": 3}, "finished")):
        with suppress(Interrupted), Store(worked(tmp_path / state)) as store:
            store.journal.result(**results)
            raise Interrupted(signal.SIGPIPE)
        assert describe_run(tmp_path / state).state == state


def test_the_list_says_state_and_verdict_also_as_json(tmp_path: Path) -> None:
    with Store(worked(tmp_path / "one")) as store:
        store.journal.about(verdict="The collaboration beats the strong model alone.", task="toy")
    worked(tmp_path / "two", RuntimeError("no room"))
    rows = json.loads(CliRunner().invoke(main.app, ["runs", str(tmp_path), "--json"]).output)
    assert [(row["state"], row["task"], row["verdict"]) for row in rows] == [
        ("finished", "toy", "The collaboration beats the strong model alone."),
        ("failed", None, None),
    ]
    text = CliRunner().invoke(main.app, ["runs", str(tmp_path)]).output
    assert (
        "one\tfinished\ttoy\tcollect\t1\t" in text
        and "RuntimeError: no room" in text
        and "beats the strong" in text
    )
    none = CliRunner().invoke(main.app, ["runs", str(tmp_path / "nowhere")])
    assert none.exit_code == 0 and "no such folder" in none.output and "cowest cycle" in none.output


# Following one


def followed(folder: Path, *, width: int = 120) -> tuple[Snapshot, str]:
    out = io.StringIO()
    screen = Console(file=out, width=width, highlight=False)
    last = follow(folder, Progress(screen=screen), sleep=lambda seconds: time.sleep(0.02))
    return last, "\n".join([out.getvalue(), *describe_end(last)])


def test_a_run_is_followed_from_before_its_beginning_to_its_end(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def work() -> None:
        time.sleep(0.5)
        with Store(folder) as store:
            store.journal.about(verb="collect", verdict="It pays.")
            stages = RunContext(store, NoProgress())
            with stages.stage("collect", "Collecting") as progress:
                for number in range(8):
                    answer(store, str(number))
                    progress(number + 1, 8)
                    time.sleep(0.1)
                stages.say("a line")

    process = child(work)
    last, said = followed(folder)
    os.waitpid(process, 0)
    assert last.state == "finished" and "waiting for it" in said
    assert (
        "a line" in said
        and "Collecting: done in" in said
        and "finished collect" in said
        and "It pays." in said
    )
    assert said.count("Collecting: done in") == 1


def test_a_run_that_is_killed_while_it_is_followed_is_said_to_be(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def work() -> None:
        with (
            Store(folder) as store,
            RunContext(store, NoProgress()).stage("collect", "Collecting"),
        ):
            store.journal.about(command="cowest collect x.toml")
            store.journal.write()
            time.sleep(60)

    process = child(work)
    until(
        lambda: (
            (now := read_snapshot(folder)) is not None
            and bool(now.stage)
            and now.command is not None
        )
    )
    killer = threading.Timer(
        0.5, lambda: (os.kill(process, signal.SIGKILL), os.waitpid(process, 0))
    )
    killer.start()
    _, said = followed(folder)
    killer.join()
    assert (
        'stopped in "Collecting"' in said
        and "gone without a word" in said
        and "cowest collect x.toml" in said
    )


def test_watch_of_a_real_run_in_another_process(tmp_path: Path) -> None:
    written(tmp_path, latency=0.1, more=SCRIPTED)
    with started(tmp_path, "watch", "run") as watching:
        assert watching.stdout is not None and "waiting for it" in watching.stdout.readline()
        assert "finished collect" not in cowest(tmp_path, "collect", "task.toml", "--run", "run")
        out, error = watching.communicate(timeout=30)
    assert watching.returncode == 0, out + error
    assert "Collecting drafts and their influence" in out and out.rstrip().endswith(
        "finished collect"
    )
    assert "finished collect" in cowest(tmp_path, "watch", "run", "--once")
    with started(tmp_path, "watch", "rum") as alone:
        assert alone.stdout is not None
        assert (
            alone.stdout.readline()
            .rstrip()
            .endswith('waiting for it; Ctrl-C ends the waiting. Did you mean "run"?')
        )
        alone.send_signal(signal.SIGINT)
        out, error = alone.communicate(timeout=30)
    assert (
        alone.returncode == 130
        and "The run itself is as it was" in error
        and "Traceback" not in error
    )


def test_a_run_that_a_verb_begins_is_said_to_be_new(tmp_path: Path) -> None:
    written(tmp_path, more=SCRIPTED)
    assert "run: a new run.\n" in cowest(tmp_path, "collect", "task.toml", "--run", "run")
    assert "a new run" not in cowest(tmp_path, "collect", "task.toml", "--run", "run")
    assert 'rum: a new run. Did you mean "run"?\n' in cowest(
        tmp_path, "pairs", "task.toml", "--run", "rum", code=1
    )


def test_once_of_no_run_says_what_to_type(tmp_path: Path) -> None:
    done = CliRunner().invoke(main.app, ["watch", str(tmp_path / "none"), "--once"])
    assert done.exit_code == 1 and "cowest runs" in str(done.exception)
    worked(tmp_path / "handbook")
    done = CliRunner().invoke(main.app, ["watch", str(tmp_path / "handbok"), "--once"])
    assert f'Did you mean "{tmp_path / "handbook"}"?' in str(done.exception)
    (worked(tmp_path / "old") / FILE).unlink()
    done = CliRunner().invoke(main.app, ["watch", str(tmp_path / "old")])
    assert done.exit_code == 1 and "of an earlier version" in done.output
