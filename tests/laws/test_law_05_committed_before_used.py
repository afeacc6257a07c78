"""Law 5: every paid call is committed before it is used; killed anywhere and started again, nothing
committed is asked again."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import killed
import pytest
from scripted import match, questions, strong_that_reads, together, weak_that_varies
from scripted_weak import weak_by_seed
from toy_experiment import (  # noqa: F401 - a fixture
    CYCLE,
    OWN,
    cycle,
    rewrite,
    task,
)

from cowest_dspy import Store
from cowest_dspy.errors import StoreError
from cowest_dspy.influence.collection import collect
from cowest_dspy.influence.trace import Sampling, Trace
from cowest_dspy.store.store import Store
from cowest_dspy.testing import ScriptedEngine


def test_law_5_nothing_that_was_answered_is_asked_again(tmp_path: Path) -> None:
    answered = itertools.count()

    def strong(request: dict[str, Any]) -> str:
        if next(answered) == 7:
            raise KeyboardInterrupt
        return strong_that_reads().script(request)  # type: ignore[operator]

    def run(engine: ScriptedEngine) -> Sequence[Trace]:
        with Store(tmp_path) as store:
            return collect(
                together(weak_that_varies(["{n}", "x"]), engine),
                questions(4),
                match,
                Sampling(drafts=2),
                store=store,
                num_threads=1,
            )

    interrupted = ScriptedEngine(strong, model="scripted/strong")
    with pytest.raises(KeyboardInterrupt):
        run(interrupted)
    resumed = strong_that_reads()
    traces = run(resumed)
    in_all = [repr(request) for request in interrupted.asked + resumed.asked]
    assert len(in_all) == 4 * 3 + 1  # only the call that was interrupted is asked twice
    assert len(set(in_all)) == 4 * 3
    untouched = strong_that_reads()
    assert run(untouched) == traces
    assert untouched.asked == []


KILLS, SEED = 50, 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
def test_law_5_fifty_kills_at_random_moments_change_nothing(tmp_path: Path) -> None:
    script = [sys.executable, killed.__file__, str(tmp_path), str(KILLS), str(SEED)]
    done = subprocess.run(script, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    whole, *runs = json.loads(done.stdout.splitlines()[-1])
    assert whole["kills"] == 0 and sum(run["kills"] for run in runs) == KILLS
    for run in runs:
        assert run["repeated"] == 0, "a call that was committed was made again"
        assert run["invented"] == 0, "what the store has was answered, and stays"
        assert run["same"], "traces and pairs are those of a run that nobody has killed"
        assert run["committed"] == whole["answered"]
        # A call may be made again only if it was under way when its process was killed: one of each
        # thread, and of the weak pool.
        under_way = killed.THREADS * (1 + killed.DRAFTS)
        assert run["answered"] - whole["answered"] <= run["kills"] * under_way
    assert any(run["lives"] > 3 for run in runs), "the kills came while there was work to do"


SUPPORT = Path(__file__).parents[1] / "support"


def test_law_5_a_cycle_killed_in_each_of_its_stages_ends_with_the_same_adapter_and_report(
    cycle: list[Path], tmp_path: Path
) -> None:
    script = SUPPORT / "killed_cycle.py"
    (tmp_path / "lives").mkdir()
    command = [sys.executable, str(script), str(tmp_path / "lives"), "0", *map(str, cycle)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["killed"]) >= 10
    assert set(found["killed"]) <= set(found["stages"])
    assert found["differ"] == []


def test_an_answer_that_cannot_be_committed_is_not_used(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store._db.execute(
            "CREATE TRIGGER full BEFORE INSERT ON calls BEGIN SELECT RAISE(ABORT, 'disk full'); END"
        )
        with pytest.raises(StoreError, match=r"could not be written .*disk full"):
            collect(
                together(weak_by_seed(), strong_that_reads()),
                questions(5),
                match,
                Sampling(drafts=2),
                store=store,
            )
        assert store.calls() == 0 and store.usage.calls == 0
