"""JSON that somebody else may have written: it is read as it is, or it is one clear ValueError."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowest_dspy import Store
from cowest_dspy.cli import main
from cowest_dspy.errors import CowestError, DataError, ReportError, RouterError
from cowest_dspy.optimizers.router import Router
from cowest_dspy.optimizers.run import NoProgress, RunContext
from cowest_dspy.report import read_report
from cowest_dspy.report.runs import look
from cowest_dspy.store.progress import Snapshot, iso, read_snapshot
from cowest_dspy.utils.reading import parse_json, read_json

HOSTILE = {
    "deep": "[" * 100_000,
    "deep and whole": "[" * 900 + "]" * 900,
    "deep objects": '{"a":' * 100_000,
    "5,000 digits": '{"a": ' + "1" * 5000 + "}",
    "1e999": '{"a": 1e999}',
    "NaN": '{"a": NaN}',
    "half a surrogate pair": '{"a": "\\ud800"}',
    "a key twice": '{"a": 1, "a": 2}',
    "cut": '{"a": ',
    "empty": "",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_document_is_one_error(name: str, tmp_path: Path) -> None:
    for file in ("report.json", "progress.json", "router.json"):
        (tmp_path / file).write_text(HOSTILE[name])
    with pytest.raises(ValueError, match=r"\w") as error:
        parse_json(HOSTILE[name])
    assert len(str(error.value)) < 200
    with pytest.raises(ReportError, match="is not JSON"):
        read_report(tmp_path)
    with pytest.raises(RouterError, match=r"is not JSON: .*fits one anew"):
        Router.load(tmp_path)
    assert read_snapshot(tmp_path) is None and look(tmp_path).state == "empty"


def test_bytes_that_are_no_text_are_one_error(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match="utf-8"):
        parse_json((tmp_path / "x.json").read_bytes())
    with pytest.raises(DataError, match=r"x\.json is not UTF-8 text"):
        read_json(tmp_path / "x.json")


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner)
    ),
    max_leaves=20,
)


@given(VALUES)
def test_what_json_writes_is_read_as_it_was(value: object) -> None:
    assert (
        parse_json(json.dumps(value))
        == value
        == parse_json(json.dumps(value, ensure_ascii=False).encode())
    )


@pytest.mark.parametrize(
    "hostile",
    [
        {"pid": -5},
        {"pid": 10**30},
        {"host": "elsewhere", "updated": "0001-01-01T00:00:00"},
        {"error": "\n", "state": "failed"},
    ],
)
def test_a_state_with_what_no_process_has_is_a_state(
    hostile: dict[str, object], tmp_path: Path
) -> None:
    state = Snapshot("running", iso(0.0), os.getpid(), socket.gethostname(), 1.0).to_dict()
    (tmp_path / "progress.json").write_text(json.dumps({**state, **hostile}))
    assert look(tmp_path).state == hostile.get("state", "stopped")


@pytest.mark.parametrize(
    "value",
    [
        "{}",
        "[]",
        "[" * 10_000,
        '{"seconds": "long", "calls": 1}',
        '{"seconds": ' + "1" * 5000 + "}",
    ],
)
def test_a_record_that_is_none_of_ours_is_damage(value: str, tmp_path: Path) -> None:
    with (
        Store(tmp_path) as store,
        RunContext(store, NoProgress()).stage("collect", "Collecting"),
    ):
        pass
    with closing(sqlite3.connect(tmp_path / "run.sqlite")) as db, db:
        assert (
            db.execute("UPDATE records SET value = ? WHERE kind = 'stage'", (value,)).rowcount == 1
        )
    assert look(tmp_path).state == "damaged"


@pytest.mark.parametrize(
    "question", ['{"a":' * 10_000, '{"a": ' + "1" * 5000 + "}", '{"a": 1, "a": 2}']
)
def test_a_question_that_is_no_json_is_one_error(question: str) -> None:
    with pytest.raises(CowestError, match="--question is not JSON"):
        main._inputs(question, ("a",))
