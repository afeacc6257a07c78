"""[tracking]: what a tracker is told, and what it never is; nothing of it needs a tracker."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some
from tracked_runs import KEY, SECRET_PLACE, Said, config, files, finished
from typer.testing import CliRunner

from cowest_dspy import Experiment, Store, load_config
from cowest_dspy.cli.main import app
from cowest_dspy.errors import ConfigError
from cowest_dspy.experiment.config_text import effective_toml
from cowest_dspy.experiment.doctor import examine
from cowest_dspy.experiment.summary import run_report
from cowest_dspy.experiment.trackers import TRACKERS, check_trackers
from cowest_dspy.experiment.tracking import Tracking
from cowest_dspy.experiment.tracking_facts import Part, gather, numbers, read_parts
from cowest_dspy.optimizers.rounds import Round


def parts_of(
    folder: Path, tracking: str = 'to = ["mlflow"]', more: str = "", **changes: int
) -> dict[str, Part]:
    settings = config(folder, tracking, more)
    finished(folder / "run", settings, **changes)  # pyright: ignore[reportArgumentType]
    with Store(folder / "run") as store:
        return {
            part.name: part for part in read_parts(settings, store, run_report(settings, store))
        }


# The table


def test_it_is_off_by_default_and_an_empty_table_turns_it_off(tmp_path: Path) -> None:
    assert load_config(files(tmp_path)).tracking is None
    (tmp_path / "off.toml").write_text("[tracking]\n")
    assert (
        load_config([*files(tmp_path, 'to = ["mlflow"]'), tmp_path / "off.toml"]).tracking is None
    )


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ('to = ["mlfow"]', "tracking.to"),
        ("to = []", "tracking.to"),
        ('to = ["mlflow"]\nprojct = "a"', 'Did you mean "project"'),
        ('to = ["mlflow"]\nuri = "https://me:secret1@mlflow.example"', "MLFLOW_TRACKING_USERNAME"),
    ],
)
def test_a_table_that_cannot_be_is_an_error_that_says_what_to_write(
    tmp_path: Path, table: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        config(tmp_path, table)
    assert "secret1" not in str(error.value).replace("me:secret1@", "") or "MLFLOW" in said


def test_a_database_is_found_from_where_the_file_stands(tmp_path: Path) -> None:
    made = config(tmp_path, 'to = ["mlflow", "mlflow"]\nuri = "sqlite:///here.db"').tracking
    assert (
        made is not None and made.uri == f"sqlite:///{tmp_path}/here.db" and made.to == ("mlflow",)
    )
    other = config(tmp_path, 'to = ["mlflow"]\nuri = "http://127.0.0.1:5000"').tracking
    assert other is not None and other.uri == "http://127.0.0.1:5000"


def test_a_package_that_is_missing_is_an_error_before_anything_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    settings = config(tmp_path, 'to = ["trackio"]')
    with pytest.raises(
        ConfigError,
        match=r"^\[tracking\] to trackio needs trackio: pip install 'cowest_dspy\[trackio\]'$",
    ):
        Experiment(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    diagnosis = examine(settings)
    (check,) = [check for check in diagnosis.checks if check.name == "trackio"]
    assert (
        (check.role, check.level) == ("run", "error")
        and "pip install" in check.text
        and not diagnosis.healthy
    )


@pytest.mark.slow
def test_the_doctor_looks_for_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ((_, level, text),) = check_trackers(
        config(tmp_path, 'to = ["mlflow"]\nuri = "http://127.0.0.1:9"')
    )
    assert level == "warning" and "cowest track" in text
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert [
        level for _, level, _ in check_trackers(config(tmp_path, 'to = ["mlflow", "trackio"]'))
    ] == [
        "ok",
        "ok",
    ]


@pytest.mark.slow
def test_where_a_run_is_tracked_changes_nothing_that_it_has(tmp_path: Path) -> None:
    plain, tracked = (load_config(files(tmp_path, table)) for table in ("", 'to = ["trackio"]'))
    with Experiment(plain, tmp_path / "a") as one, Experiment(tracked, tmp_path / "b") as other:
        assert one.meaning == other.meaning


# What is told


def test_a_run_is_told_with_its_rounds_arms_and_costs(tmp_path: Path) -> None:
    parts = parts_of(tmp_path)
    assert list(parts) == ["", "drafts", "round 1", "round 2"]
    whole = parts[""]
    assert whole.metrics["test/strong/score"] == 0.5 and whole.metrics["test/strong/n"] == 2
    assert whole.metrics["test/strong/failed"] == 1, "law 3: a failure is no score"
    assert whole.metrics["test/collaboration/low"] < whole.metrics["test/collaboration/score"] == 1
    assert (
        whole.metrics["total/calls"] == 8 * 12
        and whole.metrics["total/usd"] == 2
        and whole.metrics["total/seconds"] == 20
    )
    first, second = parts["round 1"], parts["round 2"]
    assert (
        first.tags["decision"] == "accepted"
        and second.tags["decision"] == "rolled back"
        and "gain" in second.tags["reason"]
    )
    assert (
        first.metrics["gain/mean"] == 0.75
        and first.metrics["gain/low"] < 0.75 < first.metrics["gain/high"]
    )
    assert (
        first.metrics["pairs/kept"] == 8
        and first.metrics["pairs/dropped"] == 5
        and first.metrics["cost/collect/usd"] == 0.25
    )
    assert list(first.rows) == [1, 2, 3, 4, 5]
    assert second.rows[2] == {
        "training/loss": 1.0,
        "training/rewards/margins": 0.2,
        "training/rewards/accuracies": 1.0,
    }
    assert (
        first.params["beta"] == "0.1"
        and whole.params["collect.drafts"] == "2"
        and "tracking.to" not in whole.params
    )
    assert whole.tags["model.tuned"] == first.tags["model.tuned"] and whole.tags["version.dspy"]
    assert "reliably" in whole.tags["verdict"]
    assert [row["rounds/accepted"] for row in whole.rows.values()] == [1.0, 0.0]


def test_a_run_that_has_just_begun_has_facts_too(tmp_path: Path) -> None:
    with Store(tmp_path / "run") as store:
        (whole,) = read_parts(config(tmp_path), store)
    assert whole.metrics == {} and whole.params["name"] == "toy"


@given(some.dictionaries(some.text(max_size=9), some.one_of(some.none(), some.floats())))
def test_only_finite_numbers_are_told(values: dict[str, float | None]) -> None:
    told = numbers("", values)
    assert json.loads(json.dumps(told, allow_nan=False)) == told


# What is never told


SECRET_TABLES = f"""
[judge]
kind = "api"
model = "openai/{KEY}"
api_base = "{SECRET_PLACE}"
api_key_env = "OPENAI_API_KEY"
[cycle]
strategy = "a"
[cycle.steps.a]
optimizer = "LabeledFewShot"
settings = {{ api_key = "hidden-value", k = 1, note = "{KEY}" }}
"""


def test_law_10_nothing_secret_is_told_or_uploaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-from-the-environment-123456")
    parts = parts_of(tmp_path, 'to = ["mlflow"]', SECRET_TABLES)
    told = json.dumps([asdict(part) for part in parts.values()])
    settings = config(tmp_path, 'to = ["mlflow"]', SECRET_TABLES)
    with Store(tmp_path / "run") as store:
        names = gather(settings, tmp_path / "run", run_report(settings, store), tmp_path / "files")
    assert {"config.toml", "pairs.jsonl", "report.html", "report.json"} <= set(names)
    uploaded = "".join((tmp_path / "files" / name).read_text(encoding="utf-8") for name in names)
    for secret in (KEY, "hunter2secret", "sk-from-the-environment"):
        assert secret not in told and secret not in uploaded
    assert "hidden-value" not in told
    assert parts[""].params["judge.api_key_env"] == "OPENAI_API_KEY", (
        "the name of a variable is no secret"
    )


def test_hidden_inputs_are_not_uploaded(tmp_path: Path) -> None:
    settings = config(tmp_path, 'to = ["mlflow"]', '[report]\nhide = ["question"]\n')
    finished(tmp_path / "run", settings)
    (tmp_path / "run" / "drafts.jsonl").write_text('{"prompt": "A ladder?"}\n')
    (tmp_path / "run" / "comparison").mkdir()
    (tmp_path / "run" / "comparison" / "comparison.json").write_text('{"question": "A ladder?"}')
    (tmp_path / "run" / "comparison" / "comparison.csv").write_text("arm,score\n")
    (tmp_path / "run" / "bundle").mkdir()
    (tmp_path / "run" / "bundle" / "cowest.json").write_text('{"pairs": "A ladder?"}')
    with Store(tmp_path / "run") as store:
        report = run_report(settings, store)
        names = gather(settings, tmp_path / "run", report, tmp_path / "hidden")
        shown = gather(config(tmp_path), tmp_path / "run", report, tmp_path / "shown")
    assert names == ["comparison/comparison.csv", "config.toml", "report.html", "report.json"]
    texts = [(tmp_path / "hidden" / name).read_text(encoding="utf-8") for name in names]
    assert (
        not any("ladder" in text for text in texts)
        and "(hidden: 14 characters)" in texts[2] + texts[3]
    )
    assert {
        "bundle/cowest.json",
        "comparison/comparison.json",
        "drafts.jsonl",
        "pairs.jsonl",
    } <= set(shown)


# A tracker that fails


@pytest.mark.slow
def test_a_tracker_that_is_down_costs_one_line_and_no_run(tmp_path: Path) -> None:
    uri = "http://127.0.0.1:9"
    settings = config(tmp_path, f'to = ["mlflow"]\nuri = "{uri}"', "[pairs]\nleast = 1\n")
    said = Said()
    with Experiment(settings, tmp_path / "run", progress=said) as experiment:
        traces = experiment.collect()
        experiment.evaluate(["strong"])
    assert len(traces) == 8
    warnings = [line for line in said.lines if "Warning" in line]
    assert (
        len(warnings) == 1
        and f"cowest track {tmp_path / 'run'}" in warnings[0]
        and "mlflow" in warnings[0]
    )
    assert not (tmp_path / "run" / "tracking").exists(), "nothing of it is left"


@pytest.mark.slow
def test_a_tracker_that_hangs_is_waited_for_once_as_long_as_it_says(tmp_path: Path) -> None:
    import socket
    import time

    with socket.create_server(("127.0.0.1", 0)) as deaf:
        settings = config(
            tmp_path,
            f'to = ["mlflow"]\nuri = "http://127.0.0.1:{deaf.getsockname()[1]}"\nwait = 2.0',
        )
        finished(tmp_path / "run", settings)
        with Store(tmp_path / "run") as store:
            said = Said()
            tracking = Tracking(settings, store, said.say)
            began = time.monotonic()
            tracking.update()
            first = time.monotonic() - began
            for _ in range(20):
                tracking.update()
            assert not tracking.finish(run_report(settings, store))
            assert 1 < first < 60 and time.monotonic() - began - first < 20
    (line,) = said.lines
    assert "mlflow was not told" in line and f"cowest track {tmp_path / 'run'}" in line


@pytest.mark.slow  # the package is imported before it breaks
def test_whatever_a_tracker_raises_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RecursionError(f"my key is {KEY}")

    monkeypatch.setitem(TRACKERS, "mlflow", broken)
    settings = config(tmp_path)
    finished(tmp_path / "run", settings)
    before = dict(os.environ)
    with Store(tmp_path / "run") as store:
        said = Said()
        tracking = Tracking(settings, store, said.say)
        tracking.update()
        tracking.update()
        tracking.close(lambda: run_report(settings, store))
    (line,) = said.lines
    assert "RecursionError" in line and KEY not in line and dict(os.environ) == before


def test_a_run_without_the_table_says_nothing(tmp_path: Path) -> None:
    with Store(tmp_path / "run") as store:
        said = Said()
        tracking = Tracking(config(tmp_path, ""), store, said.say)
        tracking.update()
        tracking.close(lambda: pytest.fail("no report is needed"))
        assert tracking.finish() and said.lines == [] and not store.records("tracking")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "progress.json",
        "run.lock",
        "run.sqlite",
    ]


# The verb


def test_the_verb_says_what_to_type(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match="no run's folder"):
        CliRunner().invoke(app, ["track", str(tmp_path / "none")], catch_exceptions=False)
    (tmp_path / "none" / "config.toml").write_text(effective_toml(config(tmp_path, "")))
    with pytest.raises(ConfigError, match="say where to, for instance --to mlflow"):
        CliRunner().invoke(app, ["track", str(tmp_path / "none")], catch_exceptions=False)
    with pytest.raises(ConfigError, match=r"tracking\.to"):
        CliRunner().invoke(
            app, ["track", str(tmp_path / "none"), "--to", "mlfow"], catch_exceptions=False
        )


def test_a_skipped_round_is_told_as_skipped_with_the_pairs_that_were_too_few(
    tmp_path: Path,
) -> None:
    settings = config(tmp_path)
    finished(tmp_path / "run", settings)
    with Store(tmp_path / "run") as store:
        store.keep(
            "round",
            "3",
            asdict(Round(3, "local/tiny@0123+sft", None, 7, 0, "skipped", "7 pairs, 8 needed")),
        )
        *_, third = read_parts(settings, store)
    assert (
        third.name == "round 3"
        and third.metrics["pairs/kept"] == 7
        and third.metrics["accepted"] == 0
    )
    assert (third.tags["decision"], third.tags["reason"]) == ("skipped", "7 pairs, 8 needed")
    assert third.tags["mlflow.note.content"] == "skipped: 7 pairs, 8 needed"
