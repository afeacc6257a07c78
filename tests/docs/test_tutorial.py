"""The tutorial, besides what holds for every page (test_pages.py): what it prints, how little
Python it takes, its style."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pages import ROOT, TUTORIAL, blocks, prepare, run, with_a_tiny_model

from cowest_dspy import load_config
from cowest_dspy.tuning import DPO, SFT
from cowest_dspy.utils import importing

BLOCKS = blocks(TUTORIAL)


def test_the_users_own_python_has_fewer_than_50_lines() -> None:
    code = [
        line
        for block in BLOCKS
        if block.language == "python"
        for line in block.text.splitlines()
        if line.strip()
    ]
    assert 0 < len(code) < 50


def test_the_tutorial_runs_and_prints_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(prepare(TUTORIAL, tmp_path))
    ran = run(TUTORIAL, tmp_path, {""})
    assert len(ran.commands) >= 8 and ran.compared >= 7
    assert (tmp_path / "runs/try/report.html").is_file()
    assert (tmp_path / "runs/formats/comparison/comparison.html").is_file()


def test_the_backends_of_the_tutorial_fit_its_task(tmp_path: Path) -> None:
    prepare(TUTORIAL, tmp_path)
    backends = [
        block.note for block in BLOCKS if block.language == "toml" and "[weak]" in block.text
    ]
    assert len(backends) >= 3
    for backend in backends:
        config = load_config([tmp_path / "ferries.toml", tmp_path / backend])
        assert config.dpo == {} or DPO(**config.dpo)
        assert config.sft is None or (
            SFT(**config.sft.settings) and importing.load(config.sft.drafts)()
        )


def test_its_code_is_as_this_project_would_have_it(tmp_path: Path) -> None:
    prepare(TUTORIAL, tmp_path)
    settings = [
        "--no-cache",
        "--config",
        str(ROOT / "pyproject.toml"),
        "--config",
        f"src = ['{ROOT}']",
    ]
    # No docstrings are asked for, as in programs/.
    for check in (
        ["check", "--ignore", "D", *settings],
        ["format", "--check", "--diff", *settings],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *check, str(tmp_path)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_commands_for_real_models_run_with_a_tiny_one_that_is_tuned(
    tmp_path: Path, tiny_model: Path
) -> None:
    """A real cycle, trained and all: a tiny model in the place of the weak one, the rule in the
    place of the strong one."""
    with_a_tiny_model(prepare(TUTORIAL, tmp_path), tiny_model)
    asked = [printed for _, printed in run(TUTORIAL, tmp_path, {"tuned"}).commands]
    assert len(asked) == 2 and "it takes adapters" in asked[0]
    assert "after preference tuning" in asked[1] or "(untuned: round 1 was rolled back)" in asked[1]
    assert (tmp_path / "runs/real/report.html").is_file()
