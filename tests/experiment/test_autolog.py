"""mlflow.dspy.autolog on our programs, metrics and optimiser (autologged.py, in a process of its
own): nothing breaks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("autolog")
    quiet = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    command = [
        sys.executable,
        str(Path(__file__).parents[1] / "support/autologged.py"),
        str(folder),
        str(tiny_model),
    ]
    run = subprocess.run(
        command, cwd=folder, env=quiet, capture_output=True, text=True, timeout=850
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


def test_a_question_is_one_trace_with_the_draft_and_the_refined_answer(
    found: dict[str, Any],
) -> None:
    asked = found["asked"]
    assert (asked["answer"], asked["draft"], asked["root"]) == (
        "yes",
        "It is even.",
        "Collaboration.forward",
    )
    assert asked["inputs"] == {"question": "Is 2 even?"} and asked["outputs"] == {
        "answer": "yes",
        "draft": "It is even.",
    }
    assert (
        asked["spans"].count("Predict.forward") == 2
        and asked["spans"].count("RecordedLM.__call__") == 2
    )
    assert asked["models"] == ["scripted/strong", "scripted/weak"]


def test_a_copy_in_threads_gives_each_question_a_trace_of_its_own(found: dict[str, Any]) -> None:
    asked = found["asked"]
    assert (
        asked["traces"] == 1 + len(asked["answers"])
        and asked["alike"]
        and asked["status"] == ["OK"]
    )


def test_evaluating_and_collecting_give_what_they_give_without_it(found: dict[str, Any]) -> None:
    scored = found["scored"]
    assert scored["feedback"] == ["influence"], (
        "the metric's value stands beside each trace, under its name"
    )
    assert scored["score"] == 100.0 and set(scored["influences"]) == {0.0, 1.0}


def test_our_optimiser_compiles_with_it(found: dict[str, Any]) -> None:
    plain, detailed = found["compiled"], found["detailed"]
    assert plain["rounds"] == detailed["rounds"] == 1
    assert plain["tuned"] and detailed["tuned"], (plain["reason"], detailed["reason"])
    assert plain["new traces"] == 0 and plain["runs"] == 0, (
        "off by default while something is compiled"
    )
    assert detailed["new traces"] > 0 and detailed["runs"] == 1
    assert detailed["files"] == ["best_model.json", "trainset.json", "valset.json"]
