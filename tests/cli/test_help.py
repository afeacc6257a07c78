"""`cowest --help` and `--version`: there at once, and in groups."""

from __future__ import annotations

import subprocess
import sys

import pytest
import typer
from command_line import cowest

import cowest_dspy
from cowest_dspy.cli.main import VERBS

LOOK = """
import sys
from cowest_dspy.cli.main import main
try:
    sys.argv = ["cowest", *sys.argv[1:]]
    main()
finally:
    print(*sorted({"dspy", "torch", "litellm", "numpy"} & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["cycle", "--help"]])
def test_help_imports_neither_dspy_nor_torch(arguments: list[str]) -> None:
    run = subprocess.run(
        [sys.executable, "-c", LOOK, *arguments], capture_output=True, text=True, check=True
    )
    assert run.stdout and run.stderr.split() == []


def test_verbs_are_listed_in_groups_each_once_and_in_order() -> None:
    text = cowest("--help")
    names = [
        verb.info.name if isinstance(verb, typer.Typer) else verb.__name__
        for verbs in VERBS.values()
        for verb in verbs
    ]
    listed = [line.split()[1] for line in text.splitlines() if line.startswith("│ ")]
    assert [name for name in listed if name in names] == names
    groups = [line.split()[1] for line in text.splitlines() if line.startswith("╭")]
    assert groups == ["Options", *VERBS]


def test_version_is_that_of_the_package() -> None:
    assert cowest("--version") == f"cowest_dspy {cowest_dspy.__version__}\n"
