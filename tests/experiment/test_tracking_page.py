"""docs/tracking.md: its tables are read, its commands exist, and its code runs as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cowest_dspy.cli.main import app
from cowest_dspy.experiment.config import validate
from cowest_dspy.experiment.tables import TrackingRules
from cowest_dspy.tuning import DPO

TEXT = (Path(__file__).parents[2] / "docs/tracking.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}[^\n]*\n(.*?)```", TEXT, re.DOTALL)


def test_its_tables_are_read_and_it_says_every_key() -> None:
    tables = [tomllib.loads(block) for block in blocks("toml")]
    rules = [validate(TrackingRules, table["tracking"], "docs/tracking.md") for table in tables]
    assert set(tables[0]["tracking"]) == set(TrackingRules.model_fields)
    assert rules[0].wait == TrackingRules.model_fields["wait"].default and rules[0].artifacts
    assert DPO(**tables[2]["dpo"]).report_to == ("mlflow",) == rules[2].to


def test_its_commands_have_the_options_that_it_shows() -> None:
    options = CliRunner().invoke(app, ["track", "--help"], env={"COLUMNS": "200"}).output
    lines = [
        line.partition("#")[0]
        for block in blocks("bash")
        for line in block.splitlines()
        if line.startswith("cowest track")
    ]
    assert len(lines) == 3
    for option in re.findall(r"--\w+", "".join(lines)):
        assert option in options


@pytest.mark.slow
def test_its_code_runs_as_it_stands(tmp_path: Path) -> None:
    (code,) = blocks("python")
    quiet = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=quiet,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["yes", "['Predict.forward', 'Predict.forward']"]
