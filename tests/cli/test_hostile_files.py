"""Files and folders that cannot be read or written, typed as a user types them: one message, exit
code 1, and no traceback."""

from __future__ import annotations

import json
import os
import resource
import signal
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import report_runs
import toy
from forked import child

from cowest_dspy import Store
from cowest_dspy.cli.main import app, report_errors
from cowest_dspy.errors import RouterError
from cowest_dspy.optimizers.router import Router
from cowest_dspy.report import write_report
from cowest_dspy.store import repair as repairing

LONG = "x" * 5000
DEEP = "[" * 100_000 + "]" * 100_000
DEEPER = "[" * 201 + "]" * 201
RECIPE = (
    toy.RECIPE
    + """
number = 3

def rows(split, seed=0):
    return [{"question": f"{split} {i}?", "answer": "yes"} for i in range(2)]

def latin(split, seed=0):
    return open(__file__.replace("toy.py", "latin.csv"), encoding="utf-8").read().split()

def nothing(split, seed=0):
    return None

def halves(split, seed=0):
    return [{"id": 1, "question": "\\ud83d?", "answer": "yes"}]

def ragged(split, seed=0):
    return [{"question": split, "answer": "yes", None: ["x"]}]

def program():
    return Collaboration("question -> answer", draft="knowledge")

def model():
    return ScriptedEngine(lambda request: "yes")

weak = strong = model
"""
)


@pytest.fixture
def typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """A command in a folder with a task, toy.toml; gives its one message."""
    (tmp_path / "toy.py").write_text(RECIPE)
    (tmp_path / "toy.toml").write_text(
        "\n".join([toy.TASK, toy.engine("weak"), toy.engine("strong")])
    )
    (tmp_path / "latin.csv").write_bytes("caf\xe9".encode("latin-1"))
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["cowest", *arguments])
        with pytest.raises(SystemExit) as end:
            report_errors(app)
        said = capsys.readouterr().err
        assert end.value.code == 1, said
        assert "Traceback" not in said and "\n  File " not in said
        assert len(said.strip().splitlines()) <= 3, said
        return said

    return command


# Run folders


@pytest.mark.parametrize("verb", ["collect", "cycle", "report", "ask", "quote"])
@pytest.mark.parametrize(
    ("folder", "says"),
    [
        ("toy.toml/run", "Not a directory"),
        ("toy.toml", "File exists"),
        ("/proc/run", "No such file"),
        (LONG, "File name too long"),
    ],
    ids=["below a file", "a file", "below /proc", "5,000 characters"],
)
def test_a_run_folder_that_cannot_be_is_one_message(
    typed: Callable[..., str], verb: str, folder: str, says: str
) -> None:
    said = typed(verb, "toy.toml", "--run", folder, *(["-q", "why?"] if verb == "ask" else []))
    assert says in said


def test_a_store_that_is_a_folder_is_one_message(typed: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "run/run.sqlite").mkdir(parents=True)
    assert "StoreError: run/run.sqlite" in typed("collect", "toy.toml", "--run", "run")


@pytest.mark.parametrize(
    "arguments",
    [
        ("report", LONG),
        ("bundle", LONG),
        ("verify", LONG),
        ("track", LONG),
        ("route", LONG),
        ("runs", LONG),
        ("watch", LONG, "--once"),
        ("serve", LONG),
        ("doctor", "--repair", LONG),
        ("doctor", LONG),
        ("collect", f"{LONG}.toml"),
        ("report", "one", LONG),
        ("new", "loans", "--folder", LONG),
        ("config", "schema", "--out", LONG),
        ("config", "schema", "--out", "toy.toml/schema.json"),
        ("new", "loans", "--folder", "toy.toml/loans"),
    ],
    ids=lambda value: " ".join(value).replace(LONG, "LONG"),
)
def test_every_verb_says_in_one_message_that_a_path_cannot_be(
    typed: Callable[..., str], arguments: tuple[str, ...]
) -> None:
    typed(*arguments)


# A full disk


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may become larger than 20 kB, as on a disk with no more room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_report_on_a_full_disk_leaves_the_old_one(
    typed: Callable[..., str], tmp_path: Path, request: Any
) -> None:
    written = write_report(report_runs.full_run(), tmp_path / "run")
    before = written.html.read_bytes()
    request.getfixturevalue("small_files")
    said = typed("report", "run")
    assert "ReportError: run: File too large" in said
    assert written.html.read_bytes() == before and sorted(
        path.name for path in (tmp_path / "run").iterdir()
    ) == [
        "report.html",
        "report.json",
    ]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_device_without_room_says_what_to_do(typed: Callable[..., str]) -> None:
    assert "No space left on device. The disk is full" in typed(
        "config", "schema", "--out", "/dev/full"
    )


# JSON Lines

ROW = '{"question": "why?", "answer": "yes"}\n'
LINES = [
    (DEEP, "line 2 is not JSON: recursion limit exceeded"),
    (f'{{"question": {DEEPER}}}', "line 2 is not JSON: recursion limit exceeded"),
    (f'{{"question": {"9" * 5000}}}', "line 2 is not JSON: number out of range"),
    ('{"question": 1e999}', "line 2 is not JSON: the number 1e999"),
    ('{"question": NaN}', "line 2 is not JSON: expected value"),
    ('{"question": "\\ud83d"}', "line 2 is not JSON: unexpected end of hex escape"),
    ('{"question": "why?"', "line 2 is not JSON: "),
    ("[1]", "line 2: an object was expected, not list"),
]
IDS = ["deep", "a little too deep", "5,000 digits", "1e999", "NaN", "a surrogate", "cut", "a list"]


@pytest.mark.parametrize(("line", "says"), LINES, ids=IDS)
def test_a_line_that_is_no_row_names_file_and_line(
    typed: Callable[..., str], tmp_path: Path, line: str, says: str
) -> None:
    (tmp_path / "rows.jsonl").write_text(ROW + line + "\n")
    toml = (tmp_path / "toy.toml").read_text()
    (tmp_path / "toy.toml").write_text(toml.replace("toy.py:rows", "rows.jsonl"))
    assert f"rows.jsonl, {says}" in typed("collect", "toy.toml")
    (tmp_path / "pairs.toml").write_text('[pairs]\nsource = "rows.jsonl"\n')
    (tmp_path / "toy.toml").write_text(toml)
    assert f"rows.jsonl, {says}" in typed("pairs", "toy.toml", "pairs.toml")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("latin", "reads a file that cannot be read. UnicodeDecodeError"),
        ("nothing", "gave a NoneType; rows are expected"),
        ("halves", "row 1 holds \\ud83d, half of a surrogate pair"),
        ("ragged", "row 1: a field is called None"),
    ],
)
def test_rows_of_a_recipe_that_are_none_say_so(
    typed: Callable[..., str], tmp_path: Path, name: str, says: str
) -> None:
    toml = tmp_path / "toy.toml"
    toml.write_text(toml.read_text().replace("toy.py:rows", f"toy.py:{name}"))
    said = typed("collect", "toy.toml")
    assert said.startswith("DataError: toy.py (train)") and says in said


# Files of a run

DOCUMENTS = [
    (DEEP, "recursion limit exceeded"),
    (f'{{"config": {DEEPER}}}', "recursion limit exceeded"),
    ("9" * 5000, "number out of range"),
    ('{"seed": 1e999}', "1e999"),
    ('{"title": "\\udc00"}', "hex escape"),
    ("[]", "list"),
    ("\x00", "is not JSON"),
]


@pytest.mark.parametrize(
    ("text", "says"),
    DOCUMENTS,
    ids=["deep", "deeper", "digits", "1e999", "surrogate", "list", "zero"],
)
def test_a_damaged_report_is_one_message_and_a_line_in_the_list(
    typed: Callable[..., str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    text: str,
    says: str,
) -> None:
    run = tmp_path / "runs/one"
    run.mkdir(parents=True)
    for name in ("report.json", "progress.json", "config.toml"):
        (run / name).write_text(text)
    sqlite3.connect(run / "run.sqlite").close()
    said = typed("report", str(run / "report.json"))
    assert said.startswith("ReportError: ") and says in said
    typed("watch", str(run), "--once")
    with pytest.raises(SystemExit) as end:
        app(["runs", str(tmp_path / "runs")])
    assert end.value.code == 0 and "one" in capsys.readouterr().out
    (run / "router.json").write_text(text)
    with pytest.raises(RouterError, match=r"router\.json"):
        Router.load(run)


# Configurations


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('name = "toy"', f"name = {DEEP}", "is not TOML: more than 100 lists"),
        ('name = "toy"', f"seed = {'9' * 5000}", "is not TOML: Exceeds the limit"),
        ("toy.py:match", "toy.py:number", 'toy.py:number" is a int, and a function is expected'),
        ("toy.py:match", f"{LONG}.py:match", "File name too long. Name a shorter path."),
        ("toy.py:rows", f"{LONG}.jsonl", "File name too long. Name a shorter path."),
        ("toy.py:rows", "a\\u0000b.jsonl", "A path cannot hold a zero byte"),
        ("toy.py:rows", "~nobody-of-that-name/rows.jsonl", "There is no file"),
    ],
    ids=["deep", "digits", "metric", "long recipe", "long rows", "zero", "nobody's rows"],
)
def test_a_configuration_that_cannot_be_is_one_message(
    typed: Callable[..., str], tmp_path: Path, old: str, new: str, says: str
) -> None:
    toml = tmp_path / "toy.toml"
    toml.write_text(toml.read_text().replace(old, new))
    assert says in typed("collect", "toy.toml")


def test_a_configuration_that_is_no_text_is_one_message(
    typed: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "toy.toml").write_bytes(b"\xff\xfe")
    assert "ConfigError: toy.toml is not UTF-8 text" in typed("collect", "toy.toml")
    (tmp_path / "folder.toml").mkdir()
    assert "Is a directory" in typed("collect", "folder.toml")


def test_a_question_that_is_no_json_is_one_message(typed: Callable[..., str]) -> None:
    assert "--question is not JSON" in typed("ask", "toy.toml", "-q", '{"question": ' + DEEP + "}")


# A run without drafts


@pytest.mark.parametrize("verb", ["tune", "pairs"])
def test_a_run_without_drafts_says_which_command_collects_them(
    typed: Callable[..., str], tmp_path: Path, verb: str
) -> None:
    (tmp_path / "new").mkdir()
    said = typed(verb, "toy.toml", "--run", "new", "--seed", "3", "--set", "draft=direct")
    assert said == (
        "PairsError: There are no pairs yet: no drafts were collected in new. Collect them first: "
        "cowest collect toy.toml --run new --seed 3 --set draft=direct\n"
    )
    with sqlite3.connect(tmp_path / "new/run.sqlite") as db:
        assert db.execute("SELECT count(*) FROM calls").fetchone() == (0,)
    db.close()


def test_pairs_from_elsewhere_need_no_drafts(
    typed: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.jsonl").write_text(
        json.dumps({"prompt": "why?", "chosen": "a", "rejected": "b"}) + "\n"
    )
    (tmp_path / "import.toml").write_text('[pairs]\nsource = "mine.jsonl"\n')
    with pytest.raises(SystemExit) as end:
        app(["pairs", "toy.toml", "import.toml", "--run", "new"])
    assert end.value.code == 0 and "1 pairs in" in capsys.readouterr().out


# A repair that was killed


def test_what_a_killed_repair_has_begun_is_deleted_by_the_next(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.keep("trace", "1/a/0", {"draft": "x"})

    def killed() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(repairing, "_sound", lambda db: os.kill(os.getpid(), signal.SIGKILL))
            repairing.repair(tmp_path)

    os.waitpid(child(killed), 0)
    assert len(list(tmp_path.glob(".repair-*"))) == 1
    assert repairing.repair(tmp_path).records == 1
    assert list(tmp_path.glob(".repair-*")) == []
