"""CoWest as a DSPy user calls it: rows of any kind, settings as dictionaries, bars while it
works."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from round_parts import examples, match, quick_cowest, student, taught  # noqa: F401 - fixtures

from cowest_dspy import DPO, Collaboration, CoWest, Cycle, Sampling, Store
from cowest_dspy.errors import ConfigError, TooFewPairs
from cowest_dspy.optimizers.config import RoundRules
from cowest_dspy.optimizers.run import NoProgress
from cowest_dspy.pairs.config import PairRules


def collected(folder: Path, student: Collaboration, train: Any, valset: Any = None) -> set[str]:
    """The ids of the examples that a run collected, which then had too few pairs."""
    with pytest.raises(TooFewPairs):
        quick_cowest(folder, least=1000).compile(student, trainset=train, valset=valset)
    with Store(folder) as store:
        return {record["example_id"] for record in store.records("trace").values()}


def test_compile_takes_dictionaries_and_datasets(student: Collaboration, tmp_path: Path) -> None:
    from datasets import Dataset

    train, held = ([one.toDict() for one in examples(name, 2)] for name in ("train", "dev"))
    wanted = collected(tmp_path / "e", student, examples("train", 2), examples("dev", 2))
    assert len(wanted) == 2
    assert collected(tmp_path / "d", student, train, held) == wanted
    assert collected(tmp_path / "s", student, Dataset.from_list(train), iter(held)) == wanted


def test_what_decides_is_not_trained_on_where_a_row_is_there_twice(
    student: Collaboration, tmp_path: Path
) -> None:
    """The last fifth decides; the row that stands in it and among the others is of it alone."""
    rows = [one.toDict() for one in examples("train", 9)]
    found = collected(tmp_path / "run", student, [*rows, rows[0]])
    assert len(found) == 7, "of ten, two decide (8 and 0 once more), and 0 is left out"


# Settings as dictionaries


def test_settings_may_be_dictionaries() -> None:
    made = CoWest(
        match,
        {"beta": 0.2, "lora": {"r": 32}},
        drafts=8,
        rounds={"count": 2, "replay": True},
        sampling={"temperature": 0.7},
        pairs={"margin": 0.25},
        seed=3,
    )
    assert made.tuner == DPO.model_validate({"beta": 0.2, "lora": {"r": 32}})
    assert made.sampling == Sampling(8, 0.7, seed=3)
    assert made.rules == RoundRules.model_validate({"count": 2, "replay": True})
    assert made.pairs == PairRules.model_validate({"margin": 0.25})
    assert CoWest(match, rounds=3).rules.count == 3 and CoWest(match).tuner == DPO()
    assert CoWest(match, sampling={"drafts": 2}).sampling == Sampling(2)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"tuner": {"betta": 0.2}}, 'tuner, fields of DPO: betta: .*Did you mean "beta"'),
        ({"tuner": {"beta": "strong"}}, "tuner, fields of DPO: beta: .*valid number"),
        ({"sampling": {"heat": 1}}, 'sampling, fields of Sampling: there is no "heat"'),
        ({"pairs": {"margni": 1}}, 'pairs, .*there is no "margni". Did you mean "margin"'),
        ({"pairs": {"margin": 0}}, "pairs, fields of PairRules: margin: .*greater than 0"),
        ({"rounds": {"rounds": 2}}, 'rounds, fields of RoundRules: there is no "rounds"'),
        ({"rounds": 0}, "rounds, fields of RoundRules: count: .*greater than or equal to 1"),
        ({"rounds": "two"}, r"rounds is a str; expected RoundRules\(...\) or a dict"),
        ({"tuner": DPO}, r"tuner is a ModelMetaclass; expected DPO\(...\)"),
    ],
)
def test_settings_that_cannot_be_name_the_argument(given: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        CoWest(match, **given)


# Bars


def compiled(
    monkeypatch: pytest.MonkeyPatch, student: Collaboration, optimizer: CoWest | Cycle
) -> str:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    optimizer.compile(student, trainset=examples("train", 10), valset=examples("dev", 4))
    # DSPy warns of drafts that were cut off.
    return re.sub(r"[^\r\n]*WARNING[^\n]*\n", "", stream.getvalue())


def test_compile_shows_its_stages_as_bars(
    student: Collaboration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cowest = quick_cowest(tmp_path / "run", least_gain=-1.0)
    cowest.display_progress = True
    text = compiled(monkeypatch, student, cowest)
    for stage, count in (
        ("Collecting drafts and their influence", "10/10"),
        ("Preference tuning", "2/2"),
        ("Evaluating on the dev split", "4/4"),
    ):
        assert re.search(rf"{stage}: 100%[^\r\n]*{count}", text), text
    assert "gain " in text, "what became of the round"


def test_no_bar_is_shown_where_nobody_looks_or_who_calls_shows_it(
    student: Collaboration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compiled(monkeypatch, student, quick_cowest(tmp_path / "run", least_gain=-1.0)) == ""
    loud = quick_cowest(tmp_path / "loud", least_gain=-1.0)
    loud.display_progress = True
    loud.progress = NoProgress()
    assert compiled(monkeypatch, student, loud) == ""


def test_inside_of_a_cycle_the_cycle_alone_shows_it(
    student: Collaboration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = quick_cowest(least_gain=-1.0)
    inner.display_progress = True
    quiet = Cycle(match, "w", {"w": inner}, log_dir=tmp_path / "quiet", progress=NoProgress())
    assert compiled(monkeypatch, student, quiet) == ""
    cycle = Cycle(match, "w", {"w": inner}, log_dir=tmp_path / "run", display_progress=True)
    text = compiled(monkeypatch, student, cycle)
    assert "Step 1: w" in text
    assert len(re.findall(r"Preference tuning: 100%[^\r\n]*2/2[^\r\n]*\n", text)) == 1, text
