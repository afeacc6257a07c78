"""[tracking] of a whole cycle with a real tiny weak model, whose trainings report by themselves:
all in the runs of its rounds."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from mlflow_server import Seen, mlflow_server
from toy_experiment import rewrite, task  # noqa: F401 - a fixture
from tracked_runs import Said
from tracker_files import trackio_rows, wandb_history, wandb_records
from tuning_rows import LORA, pair_rows, quick

from cowest_dspy import Experiment, load_config
from cowest_dspy.tuning import DPO, train_adapter
from cowest_dspy.utils.processes import free_port

pytestmark = pytest.mark.slow


def test_a_whole_cycle_and_its_trainings_own_logs_are_in_all_three(
    task: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {
        "WANDB_DIR": tmp_path / "wandb",
        "WANDB_MODE": "offline",
    }.items():
        monkeypatch.setenv(name, str(value))
    pytest.importorskip("wandb", reason="pip install 'cowest_dspy[wandb]'")
    rewrite(task[0], "[dpo]", '[dpo]\nreport_to = ["mlflow", "trackio", "wandb"]')
    rewrite(task[0], 'controls = ["shuffled", "sft_on_chosen"]', "controls = []")
    before, said = dict(os.environ), Said()
    with mlflow_server(tmp_path / "server") as url:
        with task[0].open("a") as file:
            file.write(
                f'[tracking]\nto = ["mlflow", "trackio", "wandb"]\nuri = "{url}"\nwait = 200\n'
            )
        with Experiment(load_config(task), tmp_path / "run", progress=said) as experiment:
            report = experiment.cycle()
        seen = Seen(url, "toy")
        first = seen.named("toy, seed 0: round 1")
        loss = seen.points(first, "loss")
        assert len(seen.runs) == 4 and not any("Warning" in line for line in said.lines), said.lines
        assert seen.points(first, "training/loss") == loss and [step for step, _ in loss] == [
            1,
            2,
        ], "TRL's and ours, in one run"
        assert first.data.tags["mlflow.parentRunId"] == seen.named("toy, seed 0").info.run_id
        assert (
            first.data.params["gradient_accumulation_steps"] == "2"
            and "output_dir" not in first.data.params
        )
        arms = {arm.name: arm for arm in report.arms}
        metrics = seen.named("toy, seed 0").data.metrics
        assert {name for name in arms if f"test/{name}/n" in metrics} == set(arms)
    assert dict(os.environ) == before
    (rows,) = [
        rows
        for name, rows in trackio_rows("toy").items()
        if name.startswith("toy, seed 0: round 1")
    ]
    theirs = [row["train/loss"] for _, row in rows if "train/loss" in row]
    assert theirs[:2] == [row["training/loss"] for _, row in rows if "training/loss" in row]
    records = wandb_records(tmp_path / "wandb")
    (own,) = [
        kept
        for kept in records.values()
        if any(one.run.display_name == "toy, seed 0: round 1" for one in kept)
    ]
    assert wandb_history(own, "training/loss") == loss
    logged = [
        item
        for one in own
        for item in one.history.item
        if "train/loss" in (item.key, "/".join(item.nested_key))
    ]
    assert len(logged) >= 2, "TRL's, in the same run"


def test_a_training_survives_a_place_of_its_logs_that_is_not_there(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    settings = DPO(**quick(num_train_epochs=1), lora=LORA)
    with caplog.at_level(logging.ERROR):
        told = train_adapter(
            settings.model_copy(update={"report_to": ("mlflow",)}),
            pair_rows(),
            base=str(tiny_model),
            output=tmp_path / "a",
        )
    quiet = train_adapter(settings, pair_rows(), base=str(tiny_model), output=tmp_path / "b")
    assert told.adapter_hash == quiet.adapter_hash
    assert sum("training goes on without it" in record.message for record in caplog.records) == 1


def test_a_run_trains_without_its_own_logs_where_the_tracker_does_not_answer(
    task: list[Path], tmp_path: Path
) -> None:
    rewrite(task[0], "[sft.settings]", '[sft.settings]\nreport_to = ["mlflow"]')
    rewrite(task[0], "max_steps = 80", "max_steps = 2")
    with task[0].open("a") as file:
        file.write(f'[tracking]\nto = ["mlflow"]\nuri = "http://127.0.0.1:{free_port()}"\n')
    said = Said()
    with Experiment(load_config(task), tmp_path / "run", progress=said) as experiment:
        assert experiment.sft().model
    assert sum("Warning" in line for line in said.lines) == 1
