"""The run's store: older files, damaged files, and what a repair saves of them."""

from __future__ import annotations

import json
import random
import shutil
import sqlite3
import threading
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from dspy.lm15 import Request, Response
from typer.testing import CliRunner

from cowest_dspy.cli import main
from cowest_dspy.errors import CowestError, StoreError
from cowest_dspy.report.runs import describe_run
from cowest_dspy.store import serialize
from cowest_dspy.store.repair import repair
from cowest_dspy.store.schema import SCHEMA_VERSION
from cowest_dspy.store.store import Store

# As version 0.1.0 wrote it.
SCHEMA_1 = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE calls (key TEXT PRIMARY KEY, stage TEXT NOT NULL, model TEXT NOT NULL, request TEXT NOT NULL,
                    response TEXT NOT NULL, seconds REAL NOT NULL, created REAL NOT NULL);
CREATE TABLE failures (key TEXT NOT NULL, stage TEXT NOT NULL, model TEXT NOT NULL, error TEXT NOT NULL, created REAL NOT NULL);
CREATE TABLE records (kind TEXT NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (kind, key));
PRAGMA user_version=1;
"""
PAGE = 4096


def question(number: int) -> Request:
    return serialize.request_from_messages(
        "m", [{"role": "user", "content": f"Question {number}? {'x' * 300}"}], seed=number
    )


def answer_to(number: int) -> Response:
    return serialize.make_response(
        "m", f"Answer {number}: é {'y' * 300}", "stop", 10, number, usd=0.5
    )


def never() -> Response:
    raise AssertionError("it was asked")


def filled(folder: Path, calls: int = 200) -> Path:
    with Store(folder) as store:
        for number in range(calls):
            store.answer(question(number), lambda number=number: answer_to(number))
        store.keep_all(
            "trace",
            {f"t{number}": {"text": f"trace {number} {'z' * 200}"} for number in range(calls)},
        )
        store.keep("done", "collect", {"identity": "abc"})
    return folder / "run.sqlite"


def older(folder: Path) -> Path:
    """A file of schema 1, with three calls, one of them without a price, a failure and two
    records."""
    folder.mkdir(exist_ok=True)
    with sqlite3.connect(folder / "run.sqlite") as db:
        db.executescript(SCHEMA_1)
        for number in range(3):
            request, said = question(number), serialize.response_to_dict(answer_to(number))
            if number == 2:
                del said["usd"]
            texts = [
                json.dumps(part, ensure_ascii=False, sort_keys=True)
                for part in (serialize.request_to_dict(request), said)
            ]
            db.execute(
                "INSERT INTO calls VALUES (?, 'collect', 'm', ?, ?, 1.5, 2.5)",
                (serialize.request_key(request), *texts),
            )
        db.execute("INSERT INTO failures VALUES ('k', 'collect', 'm', 'timeout', 1.0)")
        db.executemany(
            "INSERT INTO records VALUES (?, ?, ?)",
            [("trace", "a", '{"n": 1}'), ("trace", "b", '{"n": 2}')],
        )
    db.close()
    return folder / "run.sqlite"


# Versions


def test_an_older_file_is_brought_to_this_version_with_everything_kept(tmp_path: Path) -> None:
    older(tmp_path)
    for _ in range(2):
        with Store(tmp_path) as store:
            for number in range(3):
                response, cached = store.answer(question(number), never)
                assert cached and serialize.response_text(response) == serialize.response_text(
                    answer_to(number)
                )
            assert store.records("trace") == {"a": {"n": 1}, "b": {"n": 2}}
            bill = store.bill("m")
            assert (bill.tokens, bill.strong_calls) == (33, 4), "three answers and a failure"
            assert bill.usd is None, "of one answer the price is not known"
    with sqlite3.connect(tmp_path / "run.sqlite") as db:
        assert db.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
        assert db.execute("SELECT stage, seconds, created, usd FROM calls ORDER BY rowid").fetchall() == [
            ("collect", 1.5, 2.5, 0.5), ("collect", 1.5, 2.5, 0.5), ("collect", 1.5, 2.5, None),
        ]  # fmt: skip
        assert db.execute("SELECT error, attempts FROM failures").fetchall() == [("timeout", 1)]
    db.close()


def test_a_migration_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = older(tmp_path)
    with sqlite3.connect(path) as db:
        db.execute("UPDATE calls SET response = 'no JSON' WHERE rowid = 2")
    db.close()
    with pytest.raises(StoreError, match="--repair"):
        Store(tmp_path)
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (1,)
        assert len(db.execute("SELECT * FROM calls").fetchall()[0]) == 7
    db.close()


def test_a_newer_file_is_refused(tmp_path: Path) -> None:
    filled(tmp_path, 1)
    with sqlite3.connect(tmp_path / "run.sqlite") as db:
        db.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
    db.close()
    for open_it in (Store, repair):
        with pytest.raises(StoreError, match="newer"):
            open_it(tmp_path)


def test_answers_are_taken_over_from_an_older_run_and_cost_nothing_here(tmp_path: Path) -> None:
    older(tmp_path / "old")
    with Store(tmp_path / "new", reuse=[tmp_path / "old"]) as store:
        assert store.answer(question(1), never)[1]
        assert (store.bill("m").tokens, store.bill("m").strong_calls, store.bill("m").usd) == (
            0,
            0,
            0.0,
        )
        store.answer(question(7), lambda: answer_to(7))
        assert (store.bill("m").tokens, store.bill("m").strong_calls, store.bill("m").usd) == (
            17,
            1,
            0.5,
        )


@pytest.mark.parametrize("version", [-1, -(2**31)])
def test_a_version_that_is_none_is_one_clear_error_and_is_repaired(
    tmp_path: Path, version: int
) -> None:
    with closing(sqlite3.connect(filled(tmp_path, 5))) as db:
        db.execute(f"PRAGMA user_version={version}")
    with pytest.raises(
        StoreError,
        match=rf"is damaged \(schema {version} is none of ours\).*`cowest doctor --repair",
    ):
        Store(tmp_path)
    done = repair(tmp_path)
    assert (done.calls, done.calls_lost, done.damaged) == (5, 0, tmp_path / "run.sqlite.damaged")
    assert saved_calls(tmp_path, 5) == 5


# Damage


def saved_calls(folder: Path, calls: int = 200) -> int:
    """How many of the calls the store still answers, and each as it was answered; the others are
    asked again."""
    kept = 0
    with Store(folder) as store:
        for number in range(calls):
            response, cached = store.answer(
                question(number), lambda number=number: answer_to(number)
            )
            assert serialize.response_text(response) == serialize.response_text(answer_to(number))
            kept += cached
        assert store.calls() == calls, (
            "no row was made up, and what was lost could be written again"
        )
        for key, record in store.records("trace").items():
            assert record == {"text": f"trace {key[1:]} {'z' * 200}"}
    return kept


def noise(path: Path, seed: int, pages: list[int]) -> None:
    data, generator = bytearray(path.read_bytes()), random.Random(seed)
    for page in pages:
        data[page * PAGE : (page + 1) * PAGE] = generator.randbytes(PAGE)
    path.write_bytes(bytes(data))


def test_a_truncated_file_is_a_clear_error_and_a_repair_saves_what_is_left(tmp_path: Path) -> None:
    path = filled(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2 // PAGE * PAGE])
    with pytest.raises(StoreError, match=r"is damaged .*`cowest doctor --repair"):
        Store(tmp_path)
    damaged = path.read_bytes()
    done = repair(tmp_path)
    assert done.damaged == tmp_path / "run.sqlite.damaged"
    assert (tmp_path / "run.sqlite.damaged").read_bytes() == damaged
    assert 0 < done.calls < 200 and done.calls_lost > 0
    with Store(tmp_path) as store:
        assert store.record("done", "collect") is None, "its stage is gone through again"
    assert saved_calls(tmp_path) == done.calls


@pytest.mark.parametrize("seed", range(12))
def test_pages_of_noise_cost_what_stood_on_them_and_no_more(tmp_path: Path, seed: int) -> None:
    path = filled(tmp_path)
    pages = path.stat().st_size // PAGE
    hit = sorted(random.Random(seed).sample(range(10, pages), 3))
    noise(path, seed, hit)
    done = repair(tmp_path)
    assert done.damaged is not None
    with Store(tmp_path) as store:
        assert store.record("done", "collect") is None, "its stage is gone through again"
    assert saved_calls(tmp_path) == done.calls >= 150
    assert repair(tmp_path).damaged is None, "what was repaired is sound"


def test_noise_in_the_first_page_loses_nothing(tmp_path: Path) -> None:
    noise(filled(tmp_path), 0, [0])
    with pytest.raises(StoreError, match="damaged"):
        Store(tmp_path)
    assert repair(tmp_path).calls == saved_calls(tmp_path) == 200


def zeroed(path: Path, pages: Iterable[int]) -> None:
    data = bytearray(path.read_bytes())
    for page in pages:
        data[page * PAGE : (page + 1) * PAGE] = bytes(PAGE)
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("pages", [range(4), range(1, 5), range(3, 8), [3, 4], [4, 7, 0]], ids=str)
def test_zeroed_pages_at_the_roots_of_the_tables_lose_no_call(
    tmp_path: Path, pages: Iterable[int]
) -> None:
    zeroed(filled(tmp_path), pages)
    with pytest.raises(StoreError, match="damaged"):
        Store(tmp_path)
    done = repair(tmp_path)
    assert (done.calls, done.calls_lost) == (200, 0)
    assert "200 calls saved, 0 lost" in str(done) or "how many are lost is not known" in str(done)
    assert repair(tmp_path).damaged is None
    assert saved_calls(tmp_path) == 200


@pytest.mark.parametrize("seed", range(6))
def test_what_a_repair_says_is_lost_is_no_more_than_was_and_what_it_cannot_know_it_does_not_say(
    tmp_path: Path, seed: int
) -> None:
    path = filled(tmp_path)
    (tmp_path / "progress.json").unlink()
    pages = path.stat().st_size // PAGE
    zeroed(path, [0, 3, 4, *random.Random(seed).sample(range(8, pages), pages // 3)])
    done = repair(tmp_path)
    assert 0 < done.calls < 200 and done.calls + done.calls_lost <= 200
    assert (
        done.calls_lost > 0
        and f"{done.calls} calls saved, at least {done.calls_lost} lost" in str(done)
    )
    assert saved_calls(tmp_path) == done.calls


def test_of_calls_that_left_no_trace_in_the_file_the_progress_of_the_run_knows(
    tmp_path: Path,
) -> None:
    path = filled(tmp_path)
    zeroed(path, range(path.stat().st_size // PAGE))
    done = repair(tmp_path)
    assert (
        "0 calls saved, at least 200 lost; 0 records saved, how many are lost is not known"
        in str(done)
    )
    assert "the budget counts less than was spent" in str(done)


def test_a_second_repair_does_not_count_again_what_the_first_has_lost(tmp_path: Path) -> None:
    path = filled(tmp_path)
    noise(path, 0, list(range(20, 30)))
    first = repair(tmp_path)
    assert first.calls_lost
    (tmp_path / "progress.json").unlink()
    zeroed(path, [3, 4])
    assert repair(tmp_path).calls_lost == 0


def test_answers_in_the_log_alone_are_saved_when_the_file_is_empty(tmp_path: Path) -> None:
    """A kill leaves what was written last in a log, which SQLite deletes when its file is empty."""
    run, left = tmp_path / "run", tmp_path / "left"
    with Store(run) as store:
        for number in range(20):
            store.answer(question(number), lambda number=number: answer_to(number))
        shutil.copytree(run, left)
    for empty in (lambda path: path.write_bytes(b""), lambda path: path.unlink()):
        again = tmp_path / "again"
        shutil.copytree(left, again)
        empty(again / "run.sqlite")
        with pytest.raises(StoreError, match="holds nothing, although its run has worked"):
            Store(again)
        assert repair(again).calls == 20 == saved_calls(again, 20)
        shutil.rmtree(again)


# An empty file


@pytest.mark.parametrize("beside", ["progress.json", "config.toml", "report.json", "adapters/1"])
def test_an_empty_file_beside_what_a_run_has_made_is_damage_and_no_new_run(
    tmp_path: Path, beside: str
) -> None:
    (tmp_path / beside).parent.mkdir(exist_ok=True)
    (tmp_path / beside).write_text("")
    (tmp_path / "run.sqlite").touch()
    assert describe_run(tmp_path).state == "damaged"
    for _ in range(2):
        with pytest.raises(
            StoreError, match=r"holds nothing, although its run has worked.*`cowest doctor --repair"
        ):
            Store(tmp_path)
    assert (tmp_path / "run.sqlite").stat().st_size == 0, "nothing was changed"
    assert "how many are lost is not known" in str(repair(tmp_path))
    Store(tmp_path).close()


def test_a_file_without_tables_beside_what_a_run_has_made_is_damage(tmp_path: Path) -> None:
    path = filled(tmp_path, 3)
    path.unlink()
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA journal_mode=WAL")
    with pytest.raises(StoreError, match="holds nothing, although its run has worked"):
        Store(tmp_path)
    assert "0 calls saved, at least 3 lost" in str(repair(tmp_path))


@pytest.mark.parametrize("beside", [None, "answered.log", "run.lock"])
def test_an_empty_file_where_no_run_has_worked_is_a_new_run(
    tmp_path: Path, beside: str | None
) -> None:
    """A kill while the file was made leaves one."""
    (tmp_path / "run.sqlite").touch()
    if beside:
        (tmp_path / beside).touch()
    filled(tmp_path, 1)


def test_a_new_run_may_begin_beside_what_others_have_put_into_its_folder(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("")
    filled(tmp_path, 1)


def test_a_changed_letter_is_noticed_and_is_no_answer(tmp_path: Path) -> None:
    path = filled(tmp_path)
    data = path.read_bytes()
    assert data.count(b"Answer 77:") == 1
    path.write_bytes(data.replace(b"Answer 77:", b"Answer 78:"))
    with Store(tmp_path) as store, pytest.raises(StoreError, match="not what was written"):
        store.answer(question(77), never)
    done = repair(tmp_path)
    assert (done.calls, done.calls_lost) == (199, 1)
    assert saved_calls(tmp_path) == 199


def test_without_its_log_a_file_is_what_it_was_before_and_goes_on(tmp_path: Path) -> None:
    """SIGKILL leaves a log beside the file; whoever copies a run without it has an older state, and
    no invented one."""
    copied = tmp_path / "copied"
    copied.mkdir()
    with Store(tmp_path / "run") as store:
        for number in range(100):
            store.answer(question(number), lambda number=number: answer_to(number))
        assert (tmp_path / "run/run.sqlite-wal").stat().st_size > 0
        (copied / "run.sqlite").write_bytes((tmp_path / "run/run.sqlite").read_bytes())
    assert 0 <= saved_calls(copied, 100) <= 100


def test_a_sound_file_is_left_as_it_is(tmp_path: Path) -> None:
    path = filled(tmp_path, 5)
    before = path.read_bytes()
    done = repair(tmp_path)
    assert (done.calls, done.calls_lost, done.damaged) == (
        5,
        0,
        None,
    ) and "Nothing is damaged" in str(done)
    assert path.read_bytes() == before and sorted(file.name for file in tmp_path.glob("run*")) == [
        "run.lock",
        "run.sqlite",
    ]


def test_an_older_damaged_file_is_repaired_into_this_version(tmp_path: Path) -> None:
    path = older(tmp_path)
    with sqlite3.connect(path) as db:
        db.execute("UPDATE calls SET response = 'no JSON' WHERE rowid = 2")
    db.close()
    done = repair(tmp_path)
    assert (done.calls, done.calls_lost, done.records) == (2, 1, 2)
    with Store(tmp_path) as store:
        assert store.answer(question(0), never)[1] and store.answer(question(2), never)[1]


def test_an_answer_under_another_question_is_not_saved(tmp_path: Path) -> None:
    """Of version 1 there are no checksums: the key is the hash of the request."""
    path = older(tmp_path)
    with sqlite3.connect(path) as db:
        db.execute(
            "UPDATE calls SET request = (SELECT request FROM calls WHERE rowid = 1) WHERE rowid = 3"
        )
    db.close()
    done = repair(tmp_path)
    assert (done.calls, done.calls_lost) == (2, 1) and done.damaged is not None


def test_what_a_second_repair_keeps_does_not_overwrite_the_first(tmp_path: Path) -> None:
    path = filled(tmp_path)
    for name in ("run.sqlite.damaged", "run.sqlite.damaged-2"):
        noise(path, 1, [path.stat().st_size // PAGE - 3])
        assert repair(tmp_path).damaged == tmp_path / name


def test_a_folder_in_use_or_without_a_run_is_not_repaired(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="There is no run"):
        repair(tmp_path / "nowhere")
    with Store(tmp_path), pytest.raises(StoreError, match="in use"):
        repair(tmp_path)


def run(*arguments: Any) -> tuple[int, str, BaseException | None]:
    done = CliRunner().invoke(main.app, ["doctor", *map(str, arguments)])
    return done.exit_code, done.output, done.exception


def test_the_doctor_repairs_from_the_command_line(tmp_path: Path) -> None:
    noise(filled(tmp_path), 3, [20])
    code, said, _ = run("--repair", tmp_path)
    assert code == 0 and "calls saved" in said and "run.sqlite.damaged" in said
    assert "Nothing is damaged" in run("--repair", tmp_path)[1]
    for wrong in (("--repair", tmp_path, "task.toml"), ()):
        assert isinstance(run(*wrong)[2], CowestError)


def test_a_full_disk_is_no_failure_of_a_model(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store._db.execute("PRAGMA max_page_count=30")
        with pytest.raises(StoreError, match="is the disk full"):
            any(
                store.answer(question(number), lambda number=number: answer_to(number))[1]
                for number in range(200)
            )
        assert 0 < store.calls() < 200


def test_a_closed_store_says_so_and_a_thread_that_was_left_behind_ends_silently(
    tmp_path: Path,
) -> None:
    filled(tmp_path, 3)
    store = Store(tmp_path)
    asking, finish, ended = threading.Event(), threading.Event(), list[BaseException | None]()

    def slow() -> Response:
        asking.set()
        assert finish.wait(20)
        return answer_to(7)

    def left_behind() -> None:
        store.answer(question(7), slow)
        try:
            store.answer(question(1), never)
            ended.append(None)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=left_behind)
    thread.start()
    assert asking.wait(20)
    threading.Timer(0.3, finish.set).start()
    store.close()
    thread.join()
    assert isinstance(ended[0], KeyboardInterrupt), (
        "no error of a damaged file, which DSPy would print"
    )
    with pytest.raises(StoreError, match="This store is closed"):
        store.answer(question(1), never)
    with Store(tmp_path) as again:
        assert again.answer(question(7), never)[1], "what was under way when it was closed is kept"
