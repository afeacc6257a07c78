"""What a kill leaves: calls that were under way count as spent, and what stages cost is what the
store says."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import killed_calls
import pytest
from dspy.lm15 import Response, ServerError
from killed_calls import LIMIT, STRONG, THREADS, WEAK, answer, limits, question

from cowest_dspy.errors import BudgetError
from cowest_dspy.store.schema import KILLED, UNDER_WAY
from cowest_dspy.store.store import Store

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
SENTENCE = "3 calls were under way when a process was killed; they count as spent"


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("killed")
    script = [sys.executable, killed_calls.__file__, str(folder)]
    done = subprocess.run(script, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def blocked(lives: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    """A run of its own for each test."""
    return Path(shutil.copytree(lives[0] / "blocked", tmp_path / "run"))


def failures(folder: Path) -> list[str]:
    with closing(sqlite3.connect(folder / "run.sqlite")) as db:
        return [error for (error,) in db.execute("SELECT error FROM failures")]


def test_strong_calls_are_never_exceeded_over_kills(lives: tuple[Path, dict[str, Any]]) -> None:
    folder, found = lives
    assert found["code"] == 0 and found["kills"] == killed_calls.KILLS
    assert found["asked"] <= LIMIT, "requests that left, of all processes"
    assert found["asked"] > LIMIT - THREADS * found["kills"] - THREADS, (
        "and nearly all of the budget is used"
    )
    with Store(folder / "limited") as store:
        assert store.bill(STRONG).strong_calls == LIMIT


def test_calls_under_way_at_a_kill_count_as_spent(blocked: Path) -> None:
    with Store(blocked, budget=limits(strong_calls=8, usd=100), strong=STRONG) as store:
        bill = store.bill(STRONG)
        assert bill.strong_calls == 4 + 3, (
            "four answers, one call under way, and one at its second attempt"
        )
        assert (bill.killed, dict(bill.unpriced)) == (3, {WEAK: 1})
        assert bill.usd == 0.25 * (1 + 2 + 3 + 4) + 2 * 0.25 * 4, (
            "at the most that a call of the model has cost"
        )
        assert bill.tokens == 4 * 10 + (1 + 2 + 3 + 4) + 2 * 14
        assert (
            store.guard is not None
            and f"{SENTENCE}; the price of 1 of them is unknown" in store.guard.spent()
        )
        assert not store.answer(question(5), lambda: answer(5))[1]
        with pytest.raises(
            BudgetError, match=rf"strong_calls = 8 is reached.*strong calls 8 of 8.*{SENTENCE}"
        ):
            store.answer(question(6), lambda: answer(6))


def test_a_call_without_a_price_gets_that_of_the_next_of_its_model(blocked: Path) -> None:
    with Store(blocked, budget=limits(usd=100), strong=STRONG) as store:
        before = store.bill().usd or 0.0
        store.answer(question(8, WEAK), lambda: answer(8, WEAK))
        assert (
            store.guard is not None and store.guard.bill.usd == before + 2 * 2.0 == store.bill().usd
        )
        assert store.guard.spent().endswith(SENTENCE)


def test_what_a_kill_left_is_noted_once_and_stays_when_the_call_is_answered(blocked: Path) -> None:
    assert failures(blocked) == [UNDER_WAY] * 3
    for _ in range(2):
        with Store(blocked, strong=STRONG) as store:
            store.answer(question(5), lambda: answer(5))
            assert store.bill(STRONG).killed == 3
    assert failures(blocked) == [KILLED] * 3


def test_an_answer_takes_its_intent_away_and_a_failure_takes_its_place(tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def looking() -> Response:
        seen.append(failures(tmp_path))
        return answer(1)

    def down() -> Response:
        raise ServerError("down")

    with Store(tmp_path) as store:
        store.answer(question(1), looking)
        assert failures(tmp_path) == []
        with pytest.raises(ServerError):
            store.answer(question(2), down)
    assert seen == [[UNDER_WAY]], "committed before the request leaves, for whoever reads the file"
    assert failures(tmp_path) == ["ServerError: down"]


def test_costs_of_a_stage_are_those_of_all_processes(blocked: Path) -> None:
    with Store(blocked) as store:
        left = store.costs()["collect"]
        assert (left["calls"], left["tokens_in"], left["tokens_out"], left["usd"]) == (
            4,
            40,
            10,
            2.5,
        )
        assert left["note"] == "3 under way at a kill" and 0.1 < left["seconds"] < 60, (
            "as of the last answer"
        )
        with store.spending("collect") as counter:
            store.answer(question(5), lambda: answer(5))
        assert counter.usage.calls == 1 and counter.usage.seconds > left["seconds"]
        whole = store.costs()["collect"]
        assert (whole["calls"], whole["usd"], whole["seconds"]) == (5, 3.75, counter.usage.seconds)
