"""The tutorial is followed as it stands, in an empty folder: its files are written, its commands run, their output is looked at.

A fence with a file name ("```toml ferries.toml") is that file, "bash" are commands, "text" are lines of what the commands before it
printed. "bash slow" needs real models.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cowest_dspy import load_config, recipes
from cowest_dspy.tuning import DPO, SFT

ROOT = Path(__file__).parents[1]
TUTORIAL = ROOT / "docs" / "tutorial.md"
FENCE = re.compile(r"^```(?P<language>\w*) ?(?P<note>.*)\n(?P<text>(?:.*\n)*?)^```$", re.MULTILINE)
PROGRAMS = {"cowest": ["-m", "cowest_dspy.cli"], "pytest": ["-m", "pytest", "-p", "no:cacheprovider"]}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, what else stands on the fence's first line, and its text."""

    language: str
    note: str
    text: str


BLOCKS = [Block(found["language"], found["note"], found["text"]) for found in FENCE.finditer(TUTORIAL.read_text(encoding="utf-8"))]


def run(command: str, folder: Path) -> str:
    """A command of the tutorial, in a process of its own: what it prints."""
    program, *arguments = shlex.split(command)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160"}
    whole = [sys.executable, *PROGRAMS[program], *arguments]
    done = subprocess.run(whole, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def lines(text: str) -> list[str]:
    """Lines that are not empty, with one blank where there are more."""
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def write_files(folder: Path) -> None:
    for block in BLOCKS:
        if block.language in ("csv", "python", "toml"):
            (folder / block.note).write_text(block.text, encoding="utf-8")


def commands(*notes: str) -> Iterator[tuple[str, list[str]]]:
    """Each command of the "bash" blocks with these notes, and with the last of a block the lines that it is said to print."""
    for place, block in enumerate(BLOCKS):
        if block.language == "bash" and block.note in notes:
            following = BLOCKS[place + 1] if place + 1 < len(BLOCKS) else None
            said = lines(following.text) if following and following.language == "text" else []
            made = block.text.splitlines()
            yield from ((command, said if command == made[-1] else []) for command in made)


def test_every_fence_is_one_that_is_followed() -> None:
    text = TUTORIAL.read_text(encoding="utf-8")
    assert len(re.findall(r"^```", text, re.MULTILINE)) == 2 * len(BLOCKS)
    for block in BLOCKS:
        notes = {"bash": r"|slow", "text": "", "csv": r"\w+\.csv", "python": r"\w+\.py", "toml": r"\w+\.toml"}[block.language]
        assert re.fullmatch(notes, block.note), block
    assert len({block.note for block in BLOCKS if "." in block.note}) == sum("." in block.note for block in BLOCKS)


def test_the_users_own_python_has_fewer_than_40_lines() -> None:
    code = [line for block in BLOCKS if block.language == "python" for line in block.text.splitlines() if line.strip()]
    assert 0 < len(code) < 40


def test_the_tutorial_runs_and_prints_what_it_says(tmp_path: Path) -> None:
    write_files(tmp_path)
    (tmp_path / "models").mkdir()
    asked, told = 0, 0
    for command, said in commands(""):
        printed = lines(run(command, tmp_path))
        assert [line for line in said if line not in printed] == [], command
        asked, told = asked + 1, told + len(said)
    assert asked >= 8 and told >= 7
    assert (tmp_path / "runs/try/report.html").is_file()
    assert (tmp_path / "runs/formats/comparison/comparison.html").is_file()


def test_the_backends_of_the_tutorial_fit_its_task(tmp_path: Path) -> None:
    write_files(tmp_path)
    backends = [block.note for block in BLOCKS if block.language == "toml" and "[weak]" in block.text]
    assert len(backends) >= 3
    for backend in backends:
        config = load_config([tmp_path / "ferries.toml", tmp_path / backend])
        assert config.dpo == {} or DPO(**config.dpo)
        assert config.sft is None or (SFT(**config.sft.settings) and recipes.load(config.sft.drafts)())


def test_its_code_is_as_this_project_would_have_it(tmp_path: Path) -> None:
    write_files(tmp_path)
    settings = ["--no-cache", "--config", str(ROOT / "pyproject.toml"), "--config", f"src = ['{ROOT}']"]
    for check in (["check", *settings], ["format", "--check", "--diff", *settings]):
        done = subprocess.run([sys.executable, "-m", "ruff", *check, str(tmp_path)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_tutorial_runs_on_real_models(tmp_path: Path, real_models: Path) -> None:
    write_files(tmp_path)
    (tmp_path / "models").symlink_to(real_models, target_is_directory=True)
    for command, _ in commands("slow"):
        run(command, tmp_path)
    assert (tmp_path / "runs/real/report.html").is_file()
