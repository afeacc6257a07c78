"""[tracking] with trackio in a folder and W&B offline: nothing goes over a network, and nothing is
there twice."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from tracked_runs import KEY, Said, config, finished
from tracker_files import (
    trackio_artifacts,
    trackio_configs,
    trackio_rows,
    wandb_history,
    wandb_records,
    wandb_summary,
)

from cowest_dspy import Store
from cowest_dspy.experiment.config import Config
from cowest_dspy.experiment.summary import run_report
from cowest_dspy.experiment.tracking import Tracking

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "wandb"))
    monkeypatch.setenv("WANDB_MODE", "offline")


def track(settings: Config, run: Path, said: Said) -> bool:
    with Store(run) as store:
        return Tracking(settings, store, said.say).finish(run_report(settings, store))


def test_trackio_has_a_run_for_the_whole_and_one_for_each_round(tmp_path: Path) -> None:
    settings, said = config(tmp_path, 'to = ["trackio"]'), Said()
    finished(tmp_path / "run", settings)
    assert track(settings, tmp_path / "run", said) and said.lines == [
        'tracked: trackio show --project "toy"'
    ]
    rows = trackio_rows(tmp_path / "trackio", "toy")
    names = {name.partition(" [")[0]: name for name in rows}
    assert list(names) == [
        "toy, seed 0",
        "toy, seed 0: drafts",
        "toy, seed 0: round 1",
        "toy, seed 0: round 2",
    ]
    first = rows[names["toy, seed 0: round 1"]]
    assert [(step, row["training/loss"]) for step, row in first if "training/loss" in row][:2] == [
        (1, 1.0),
        (2, 0.5),
    ]
    assert first[-1][1]["gain/mean"] == 0.75 and first[-1][1]["accepted"] == 1
    whole = rows[names["toy, seed 0"]]
    assert whole[-1][1]["test/strong/score"] == 0.5 and [
        row["rounds/accepted"] for _, row in whole[:2]
    ] == [1, 0]
    configs = trackio_configs(tmp_path / "trackio", "toy")
    assert configs[names["toy, seed 0"]]["collect.drafts"] == "2"
    assert configs[names["toy, seed 0: round 2"]]["decision"] == "rolled back"
    (files,) = trackio_artifacts(tmp_path / "trackio", "toy")
    assert all(
        name in files for name in ("report.html", "report.json", "config.toml", "pairs.jsonl")
    )


def test_a_run_that_is_logged_again_or_goes_on_is_not_there_twice(tmp_path: Path) -> None:
    settings, said = config(tmp_path, 'to = ["trackio"]'), Said()
    finished(tmp_path / "run", settings, rounds=1)
    assert track(settings, tmp_path / "run", said)
    once = trackio_rows(tmp_path / "trackio", "toy")
    assert track(settings, tmp_path / "run", said)
    assert trackio_rows(tmp_path / "trackio", "toy") == once
    finished(tmp_path / "run", settings, rounds=2)
    assert track(settings, tmp_path / "run", said)
    more = trackio_rows(tmp_path / "trackio", "toy")
    assert len(more) == len(once) + 1
    assert all(more[name][: len(rows)] == rows for name, rows in once.items())
    finished(tmp_path / "other", settings, rounds=1)
    assert track(settings, tmp_path / "other", said)
    assert len(trackio_rows(tmp_path / "trackio", "toy")) == 2 * len(once) + 1, (
        "another run of the same name is another run"
    )


@pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None,
    reason="wandb is not installed: pip install 'cowest_dspy[wandb]'",
)
def test_wandb_offline_has_the_same_and_nothing_that_it_looks_up_by_itself(tmp_path: Path) -> None:
    settings, said = config(tmp_path, 'to = ["wandb"]'), Said()
    finished(tmp_path / "run", settings)
    assert track(settings, tmp_path / "run", said) and "wandb sync" in said.lines[0]
    records = wandb_records(tmp_path / "wandb")
    runs = {
        one.run.display_name: name
        for name, kept in records.items()
        for one in kept
        if one.WhichOneof("record_type") == "run"
    }
    assert set(runs) == {
        "toy, seed 0",
        "toy, seed 0: drafts",
        "toy, seed 0: round 1",
        "toy, seed 0: round 2",
    }
    assert wandb_history(records[runs["toy, seed 0: round 1"]], "training/loss")[:2] == [
        (1, 1.0),
        (2, 0.5),
    ]
    assert wandb_history(records[runs["toy, seed 0"]], "rounds/accepted") == [(1, 1), (2, 0)]
    assert wandb_summary(records[runs["toy, seed 0"]])["test/strong/score"] == 0.5
    assert wandb_summary(records[runs["toy, seed 0: round 1"]])["gain/mean"] == 0.75
    assert track(settings, tmp_path / "run", said)
    again = wandb_records(tmp_path / "wandb")
    assert {name: len(kept) for name, kept in again.items()} == {
        name: len(kept) for name, kept in records.items()
    }
    assert not list((tmp_path / "wandb").rglob("wandb-metadata.json")) and not list(
        (tmp_path / "wandb").rglob("requirements.txt")
    )
    assert not any(
        KEY.encode() in file.read_bytes() for file in (tmp_path / "wandb").rglob("*.wandb")
    )
