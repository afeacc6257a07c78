"""[tracking] and a real MLflow server on 127.0.0.1 with SQLite: nested runs, each point once,
files, and what is lost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow_server import Seen, mlflow_server
from tracked_runs import Said, config, files, finished
from typer.testing import CliRunner

from cowest_dspy import Experiment, Store, load_config
from cowest_dspy.cli.main import app
from cowest_dspy.experiment.config import Config
from cowest_dspy.experiment.summary import run_report
from cowest_dspy.experiment.trackers import check_trackers
from cowest_dspy.experiment.tracking import Tracking
from cowest_dspy.utils.processes import free_port

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as url:
        yield url


@pytest.fixture
def tracked(server: str, tmp_path: Path) -> Config:
    """The toy task, tracked in an experiment of its own."""
    return config(tmp_path, f'to = ["mlflow"]\nuri = "{server}"\nproject = "{tmp_path.name}"')


def track(settings: Config, run: Path, said: Said | None = None) -> bool:
    with Store(run) as store:
        return Tracking(settings, store, (said or Said()).say).finish(run_report(settings, store))


def test_a_run_is_one_run_with_its_rounds_nested(
    tracked: Config, server: str, tmp_path: Path
) -> None:
    finished(tmp_path / "run", tracked)
    said = Said()
    assert track(tracked, tmp_path / "run", said)
    seen = Seen(server, tmp_path.name)
    whole, first, second = (
        seen.named(name) for name in ("toy, seed 0", "toy, seed 0: round 1", "toy, seed 0: round 2")
    )
    assert [run.data.tags.get("mlflow.parentRunId") for run in seen.runs] == [
        None,
        *[whole.info.run_id] * 3,
    ]
    assert {run.info.status for run in seen.runs} == {"FINISHED"}
    assert (
        whole.data.metrics["test/strong/score"] == 0.5
        and whole.data.params["collect.drafts"] == "2"
    )
    assert seen.points(first, "training/loss") == [
        (1, 1.0),
        (2, 0.5),
        (3, pytest.approx(1 / 3)),
        (4, 0.25),
        (5, 0.2),
    ]
    assert seen.points(whole, "rounds/gain/mean") == [(1, 0.75), (2, 0.0)]
    assert second.data.tags["decision"] == "rolled back" and second.data.metrics["accepted"] == 0
    assert (
        first.data.metrics["gain/low"]
        < first.data.metrics["gain/mean"]
        < first.data.metrics["gain/high"]
    )
    assert said.lines == [
        f"tracked: {server}/#/experiments/{whole.info.experiment_id}/runs/{whole.info.run_id}"
    ]
    assert check_trackers(tracked)[0][:2] == ("mlflow", "ok")


def test_files_are_there_as_they_are_here(tracked: Config, server: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    finished(run, tracked)
    (run / "bundle" / "adapter").mkdir(parents=True)
    (run / "bundle" / "cowest.json").write_text("{}")
    (run / "bundle" / "adapter" / "adapter_config.json").write_text('{"r": 4}')
    assert track(tracked, run)
    seen = Seen(server, tmp_path.name)
    whole = seen.named("toy, seed 0").info.run_id
    got = Path(seen.client.download_artifacts(whole, "", str(tmp_path)))
    assert (got / "config.toml").read_text() == (run / "config.toml").read_text()
    assert json.loads((got / "report.json").read_text())["rounds"][1]["outcome"] == "rolled back"
    assert "<html" in (got / "report.html").read_text()[:500] and (got / "pairs.jsonl").is_file()
    assert (got / "bundle" / "adapter" / "adapter_config.json").read_text() == '{"r": 4}'
    assert tracked.tracking
    plain = tracked.model_copy(
        update={"tracking": tracked.tracking.model_copy(update={"artifacts": False})}
    )
    finished(tmp_path / "other", plain)
    assert track(plain, tmp_path / "other")
    other = [
        run
        for run in Seen(server, tmp_path.name).runs
        if run.data.tags.get("cowest.run", "").endswith("other")
    ]
    assert seen.client.list_artifacts(other[0].info.run_id) == []


def test_a_run_that_is_logged_again_is_not_there_twice(
    tracked: Config, server: str, tmp_path: Path
) -> None:
    finished(tmp_path / "run", tracked)
    assert track(tracked, tmp_path / "run")
    first = Seen(server, tmp_path.name)
    points = first.every_point()
    assert track(tracked, tmp_path / "run")
    with Store(
        tmp_path / "run"
    ) as store:  # Killed before what the server had answered was kept: only the key is left.
        store.forget("tracking", start="mlflow")
    assert track(tracked, tmp_path / "run")
    again = Seen(server, tmp_path.name)
    assert [run.info.run_id for run in again.runs] == [run.info.run_id for run in first.runs]
    assert again.every_point() == points and len(points) > 50


def test_a_run_that_goes_on_is_the_same_run_there(
    tracked: Config, server: str, tmp_path: Path
) -> None:
    finished(tmp_path / "run", tracked, rounds=1)
    with Store(tmp_path / "run") as store:
        tracking = Tracking(tracked, store, Said().say)
        tracking.update()
        tracking.close(lambda: run_report(tracked, store), KeyboardInterrupt())
    stopped = Seen(server, tmp_path.name)
    assert stopped.named("toy, seed 0").info.status == "KILLED"
    changed = tracked.model_copy(
        update={"seed": 0, "collect": tracked.collect.model_copy(update={"drafts": 9})}
    )
    finished(tmp_path / "run", changed, rounds=2)
    assert track(changed, tmp_path / "run")
    seen = Seen(server, tmp_path.name)
    whole = seen.named("toy, seed 0")
    assert (
        whole.info.run_id == stopped.named("toy, seed 0").info.run_id
        and whole.info.status == "FINISHED"
    )
    assert len(seen.runs) == 4 and len(seen.points(whole, "rounds/gain/mean")) == 2
    assert (
        whole.data.params["collect.drafts"] == "2"
        and whole.data.tags["changed.collect.drafts"] == "9"
    )


def test_a_round_that_is_tuned_anew_is_another_nested_run(
    tracked: Config, server: str, tmp_path: Path
) -> None:
    finished(tmp_path / "run", tracked, rounds=1)
    assert track(tracked, tmp_path / "run")
    finished(tmp_path / "run", tracked, rounds=1, adapter="b2b2b2b2b2b2")
    assert track(tracked, tmp_path / "run")
    seen = Seen(server, tmp_path.name)
    old, new = seen.named("toy, seed 0: round 1"), seen.named("toy, seed 0: round 1 (2)")
    assert old.data.tags["cowest.superseded"] == "true" and "cowest.superseded" not in new.data.tags
    assert len(seen.points(new, "training/loss")) == 5 == len(seen.points(old, "training/loss"))


def test_what_was_deleted_there_is_made_again(tracked: Config, server: str, tmp_path: Path) -> None:
    finished(tmp_path / "run", tracked, rounds=1)
    assert track(tracked, tmp_path / "run")
    seen = Seen(server, tmp_path.name)
    seen.client.delete_run(seen.named("toy, seed 0").info.run_id)
    assert track(tracked, tmp_path / "run")
    assert Seen(server, tmp_path.name).named("toy, seed 0").data.metrics["test/strong/n"] == 2
    experiment = seen.runs[0].info.experiment_id
    seen.client.delete_experiment(experiment)
    said = Said()
    assert not track(tracked, tmp_path / "run", said)
    assert "is deleted: restore it there" in said.lines[0]


def test_commands_on_scripted_models_are_tracked_by_stages(server: str, tmp_path: Path) -> None:
    table = f'to = ["mlflow"]\nuri = "{server}"\nproject = "{tmp_path.name}"\nname = "by stages"'
    settings = load_config(files(tmp_path, table, "[pairs]\nleast = 1\n"))
    with Experiment(settings, tmp_path / "run") as experiment:
        experiment.collect()
    collected = Seen(server, tmp_path.name)
    first = collected.named("by stages: round 1")
    assert first.data.metrics["influence/helped"] + first.data.metrics["influence/same"] == 8
    assert first.data.metrics["cost/collect/calls"] > 0 and first.info.status == "FINISHED"
    done = CliRunner().invoke(
        app,
        ["evaluate", str(tmp_path / "toy.toml"), "--run", str(tmp_path / "run"), "--arm", "strong"],
    )
    assert done.exit_code == 0 and f"{server}/#/experiments" in done.output.replace("\n", "")
    whole = Seen(server, tmp_path.name).named("by stages")
    assert whole.data.metrics["test/strong/score"] == 0 and whole.data.metrics["test/strong/n"] == 3
    assert whole.info.run_id == collected.named("by stages").info.run_id
    asked = CliRunner().invoke(
        app, ["ask", str(tmp_path / "toy.toml"), "--run", str(tmp_path / "run"), "-q", "A ladder?"]
    )
    assert asked.exit_code == 0 and "tracked" not in asked.output, (
        "a question is no stage of the run"
    )


def test_a_server_that_was_down_is_told_later_by_the_verb(tmp_path: Path) -> None:
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    settings = load_config(files(tmp_path, f'to = ["mlflow"]\nuri = "{uri}"'))
    said = Said()
    with Experiment(settings, tmp_path / "run", progress=said) as experiment:
        experiment.collect()
        experiment.evaluate(["strong"])
    assert sum("Warning" in line for line in said.lines) == 1
    failed = CliRunner().invoke(app, ["track", str(tmp_path / "run")])
    assert failed.exit_code == 1 and "mlflow was not told" in failed.output
    with mlflow_server(tmp_path / "server", port) as url:
        done = CliRunner().invoke(app, ["track", str(tmp_path / "run")])
        assert done.exit_code == 0, done.output
        assert Seen(url, "toy").named("toy, seed 0").data.metrics["test/strong/n"] == 3
        elsewhere = ["--to", "mlflow", "--uri", url, "--project", "other"]
        assert CliRunner().invoke(app, ["track", str(tmp_path / "run"), *elsewhere]).exit_code == 0
        assert Seen(url, "other").named("toy, seed 0: round 1").data.metrics["influence/n"] == 8
