"""The README's Python blocks run, in order, in one namespace; the blocks that need real models run in the slow tier."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
FENCE = re.compile(r"^```python(?P<slow> slow)?\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block: its code, the line of the README on which it begins, and whether it needs real models."""

    code: str
    line: int
    slow: bool


def blocks() -> list[Block]:
    text = README.read_text(encoding="utf-8")
    return [
        Block(match["code"], text.count("\n", 0, match.start("code")), match["slow"] is not None) for match in FENCE.finditer(text)
    ]


def run(chosen: list[Block]) -> dict[str, Any]:
    """Executes blocks one after another in one namespace; a traceback names the line of the README."""
    namespace: dict[str, Any] = {"__name__": "readme"}
    for block in chosen:
        exec(compile("\n" * block.line + block.code, str(README), "exec"), namespace)
    return namespace


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory that sees the recipes and the models, as a checkout does, and may be written to."""
    for name in ("programs", "metrics", "models"):
        if (ROOT / name).is_dir():
            (tmp_path / name).symlink_to(ROOT / name, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readme_shows_at_least_five_snippets() -> None:
    assert len(blocks()) >= 5


def test_every_fence_is_one_that_is_run() -> None:
    """A fence such as "```python3" or "```Python" would be shown, and never run."""
    fences = re.findall(r"^```(py.*)$", README.read_text(encoding="utf-8"), re.MULTILINE | re.IGNORECASE)
    assert set(fences) <= {"python", "python slow"}
    assert len(fences) == len(blocks())


def test_the_quick_snippets_run(checkout: Path) -> None:
    quick = [block for block in blocks() if not block.slow]
    assert quick
    assert run(quick)


@pytest.mark.slow
@pytest.mark.usefixtures("real_models")
def test_all_snippets_run_on_the_real_models(checkout: Path) -> None:
    assert run(blocks())
