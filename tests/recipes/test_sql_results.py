"""SQL of anybody's: what runs, what is refused, and when two results are the same."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import dspy
import pytest
from domain_rows import islands
from hypothesis import given
from hypothesis import strategies as st

from cowest_dspy.errors import DataError
from cowest_dspy.utils import importing
from cowest_dspy.utils.sql import QueryResult, run_query

ROOT = Path(__file__).parents[2]
match = importing.load(f"{ROOT}/metrics/sql_results.py:execution_match")
ENDLESS = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT MAX(x) FROM n"


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return islands(tmp_path_factory.mktemp("islands")) / "geography.sqlite"


def test_a_query_gives_its_rows_and_their_columns(database: Path) -> None:
    asked = "SELECT people, bread FROM island WHERE island_name = 'bost'"
    result = run_query(database, asked)
    assert result == QueryResult(((40, "oat"),), ("people", "bread"))
    for written in (f"{asked};", f"```sql\n{asked}\n```", f"So:\n```\n{asked};\n```\nThat is it."):
        assert run_query(database, written) == result


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO island VALUES ('x', 1, 'y')",
        "UPDATE island SET people = 0",
        "DELETE FROM ferry",
        "DROP TABLE island",
        "CREATE TABLE other (a)",
        "CREATE TEMP TABLE other (a)",
        "ATTACH DATABASE 'other.sqlite' AS other",
        "PRAGMA user_version = 9",
        "VACUUM INTO 'copy.sqlite'",
        "SELECT 1; DELETE FROM ferry",
        "SELECT load_extension('other')",
        "SELECT zeroblob(1000000000)",
        "SELECT",
        "",
        "-- nothing",
        "I cannot say.",
        "SELECT '\x00'",
        "SELECT '\ud800'",
    ],
)
def test_what_is_no_single_select_is_an_error_and_nothing_is_written(
    sql: str, database: Path
) -> None:
    before, beside = database.read_bytes(), sorted(database.parent.iterdir())
    result = run_query(database, sql)
    assert result.error and not result.rows
    assert database.read_bytes() == before and sorted(database.parent.iterdir()) == beside


@given(st.text(max_size=40), st.sampled_from(["", "SELECT ", "DELETE FROM ", "PRAGMA "]))
def test_no_text_writes_or_raises(database: Path, text: str, start: str) -> None:
    before = database.read_bytes()
    run_query(database, start + text)
    assert database.read_bytes() == before


def test_what_does_not_end_is_broken_off(database: Path) -> None:
    began = time.monotonic()
    assert run_query(database, ENDLESS, seconds=0.1).error == "longer than 0.1 s"
    assert time.monotonic() - began < 2
    many = "SELECT 1 FROM island, island AS b, island AS c, island AS d, island AS e"
    assert run_query(database, many).error == "more than 10000 rows"


def test_a_database_that_is_not_there_is_an_error_and_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no database"):
        run_query(tmp_path / "none.sqlite", "SELECT 1")
    assert not list(tmp_path.iterdir())


VALUES = st.none() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()


@given(st.lists(st.tuples(VALUES, VALUES)), st.randoms())
def test_the_order_of_rows_never_matters(rows: list[tuple[Any, Any]], draw: random.Random) -> None:
    one, other = QueryResult(tuple(rows)), QueryResult(tuple(draw.sample(rows, len(rows))))
    assert one.matches(other) and other.matches(one)
    assert not one.matches(QueryResult(error="no such table: a"))
    assert not QueryResult(error="a").matches(QueryResult(error="a"))


def test_results_match_to_four_digits_and_without_case() -> None:
    one = QueryResult(((1.00001, "Rye"),))
    assert one.matches(QueryResult(((1, "RYE"), (1.0, "rye"))))
    for other in ((1.001, "rye"), (1, "oat"), ("rye", 1), (1,), (1, None)):
        assert not one.matches(QueryResult((other,)))


def gold(database: Path, sql: str) -> dspy.Example:
    return dspy.Example(sql=sql, database=str(database))


@pytest.mark.parametrize(
    ("sql", "score"),
    [
        ("SELECT island_name FROM island WHERE bread = 'oat' ORDER BY people DESC", 1.0),
        ("SELECT UPPER(island_name) FROM island WHERE bread LIKE 'OAT'", 1.0),
        ("SELECT island_name FROM island", 0.0),
        ("SELECT island_name FROM islands", 0.0),
        ("", 0.0),
        (None, 0.0),
        (ENDLESS, 0.0),
    ],
)
def test_an_answer_is_right_when_it_gives_the_same_rows(
    database: Path, sql: str | None, score: float
) -> None:
    example = gold(database, "SELECT island_name FROM island WHERE bread = 'oat'")
    assert match(example, dspy.Prediction(sql=sql)) == score
    assert match(example, dspy.Prediction(answer=sql)) == 0.0


def test_a_gold_query_that_fails_is_an_error_of_the_data(database: Path) -> None:
    with pytest.raises(DataError, match=r"gold query fails \(no such table: x\)"):
        match(gold(database, "SELECT a FROM x"), dspy.Prediction(sql="SELECT 1"))
    with pytest.raises(DataError, match="no database"):
        match(dspy.Example(answer="1"), dspy.Prediction(sql="SELECT 1"))
