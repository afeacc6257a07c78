"""The pages that users read, as blocks that can be run: README.md, docs/**/*.md,
benchmarks/README.md.

What stands after a fence's language says what is done with the block:

    python              run, in order, in one namespace and one folder for the page
    python slow         the same, in the slow tier, with the real models; "python tuned": with the
                        commands of "bash tuned"
    python alone        run by a test of the page's own, in a process of its own, since it changes
                        the whole process
    bash                commands that are run; exit code 0
    bash fails          the same; each ends with exit code 1
    bash slow           run in the slow tier, with the real models
    bash tuned          run with a tiny model that is really tuned in the place of the weak one
    bash norun REASON   not run: it needs hours, a network, other people's accounts. Verbs, options,
                        files and targets are looked up
    text                after a "bash" that is run: lines that its last command prints. Elsewhere:
                        only shown
    toml                a part of a configuration: laid over the page's task and read
    toml|python|csv F   the file F in the page's folder

Pages in docs/howto begin where the tutorial ends, with its files; the others with a checkout.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer.main

from cowest_dspy import load_config
from cowest_dspy.cli.main import app
from cowest_dspy.experiment.config_text import effective_toml

ROOT = Path(__file__).parents[2]
TUTORIAL = ROOT / "docs/tutorial.md"
PAGES = [
    ROOT / "README.md",
    ROOT / "benchmarks/README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
FENCE = re.compile(r"^```(?P<language>\w*) ?(?P<note>.*)\n(?P<text>(?:.*\n)*?)^```$", re.MULTILINE)
PROGRAMS = {
    "cowest": ["-m", "cowest_dspy.cli.main"],
    "pytest": ["-m", "pytest", "-p", "no:cacheprovider"],
}
NOTES = {
    "": r"",
    "text": r"",
    "json": r"",
    "csv": r"[\w/]+\.csv",
    "python": r"|alone|slow|tuned|[\w/]+\.py",
    "toml": r"|[\w/]+\.toml",
    "bash": r"|fails|slow|tuned|norun \S.*",
}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, what else stands on the fence's first line, its text, and the
    line before the text."""

    language: str
    note: str
    text: str
    line: int

    @property
    def file(self) -> str | None:
        """The file that the block is."""
        return self.note if re.fullmatch(r"[\w/]+\.\w+", self.note) else None

    @property
    def reason(self) -> str | None:
        """Why it is not run."""
        return self.note.removeprefix("norun ") if self.note.startswith("norun ") else None

    @property
    def commands(self) -> list[str]:
        """The commands of a "bash" block, without comments; a line that ends with a backslash goes
        on in the next."""
        whole = self.text.replace("\\\n", " ").splitlines()
        return [shlex.join(words) for line in whole if (words := shlex.split(line, comments=True))]


def name_of(page: Path) -> str:
    """The page as a test's id."""
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[Block]:
    """The page's fenced blocks."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            found["language"],
            found["note"],
            found["text"],
            text.count("\n", 0, found.start("text")),
        )
        for found in FENCE.finditer(text)
    ]


def is_checkout(page: Path) -> bool:
    """Whether the page speaks of a checkout; the tutorial and how-tos speak of a folder of the
    reader's."""
    return page != TUTORIAL and page.parent.name != "howto"


def prepare(page: Path, folder: Path) -> Path:
    """``folder`` as the page's reader has it: the recipes of a checkout or the tutorial's files,
    and the page's own files."""
    if is_checkout(page):
        for name in ("programs", "metrics"):
            shutil.copytree(
                ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__")
            )
    else:
        (folder / "models").mkdir()
    given = [TUTORIAL] if page.parent.name == "howto" else []
    for one in (*given, page):
        for block in blocks(one):
            if block.file:
                (folder / block.file).write_text(block.text, encoding="utf-8")
    return folder


def with_models(folder: Path, models: Path) -> Path:
    """The same folder with the real models, which get a smaller allowance to optimise prompts with:
    40 calls take them minutes."""
    (folder / "models").rmdir() if (folder / "models").is_dir() else None
    (folder / "models").symlink_to(models, target_is_directory=True)
    task = folder / "gepa.toml"
    if task.is_file():
        whole = task.read_text()
        assert "max_metric_calls = 40" in whole
        task.write_text(whole.replace("max_metric_calls = 40", "max_metric_calls = 12"))
    return folder


def with_a_tiny_model(folder: Path, tiny_model: Path) -> Path:
    """The same folder with a tiny model in the place of the weak one, a rule in that of the strong
    one, and settings to match."""
    (folder / "models" / "SmolLM2-135M-Instruct").symlink_to(tiny_model, target_is_directory=True)
    weak = (folder / "models.toml").read_text().partition("[strong]")[0]
    strong = (folder / "stand_ins.toml").read_text().partition("[strong]")[2].partition("[sft]")[0]
    (folder / "models.toml").write_text(f"{weak}[strong]{strong}")
    task = (folder / "ferries.toml").read_text()
    for old, new in (
        (
            "num_train_epochs = 10, learning_rate = 1e-3",
            "num_train_epochs = 60, learning_rate = 2e-2, bf16 = false",
        ),
        ("drafts = 4", "drafts = 6\nmax_errors = 1.0"),
        ("least = 2", "least = 1"),
        ("beta = 0.1", "beta = 0.1\nmax_steps = 2\nbf16 = false"),
    ):
        assert old in task
        task = task.replace(old, new)
    (folder / "ferries.toml").write_text(task)
    return folder


def lines(text: str) -> list[str]:
    """Lines that are not empty, with one blank where there are more."""
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def run_command(command: str, folder: Path, *, code: int = 0) -> str:
    """A command of a page, in a process of its own: what it prints, errors included."""
    program, *arguments = shlex.split(command)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160"}
    whole = [sys.executable, *PROGRAMS[program], *arguments]
    done = subprocess.run(
        whole, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, (
        f"{command}\nexit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    )
    assert "Traceback" not in done.stderr, done.stderr[-4000:]
    return done.stdout + done.stderr


@dataclass(frozen=True)
class Ran:
    """What was run of a page: its commands with what they printed, how many printed lines were
    compared, and its names."""

    commands: tuple[tuple[str, str], ...]
    compared: int
    names: dict[str, Any]


def run(page: Path, folder: Path, notes: set[str]) -> Ran:
    """Runs the page's "python" and "bash" blocks with these notes, in order. ``folder`` is the
    working directory.

    A traceback names the line of the page; what a "text" block says must be among the lines that
    the command before it printed.
    """
    names: dict[str, Any] = {"__name__": "page"}
    printed: list[tuple[str, str]] = []
    compared = 0
    all_blocks = blocks(page)
    for place, block in enumerate(all_blocks):
        if block.note not in notes:
            continue
        if block.language == "python":
            exec(compile("\n" * block.line + block.text, str(page), "exec"), names)
        if block.language == "bash":
            printed.extend(
                (command, run_command(command, folder, code=int(block.note == "fails")))
                for command in block.commands
            )
            following = all_blocks[place + 1] if place + 1 < len(all_blocks) else None
            said = lines(following.text) if following and following.language == "text" else []
            got = lines(printed[-1][1])
            assert [line for line in said if line not in got] == [], (
                f"{printed[-1][0]}\n{printed[-1][1]}"
            )
            compared += len(said)
    return Ran(tuple(printed), compared, names)


def read_toml(page: Path, block: Block, folder: Path) -> None:
    """Reads a "toml" block: laid over the task of the page and its stand-ins, as a later file.

    Raises:
        ConfigError: it says something that cannot be.
    """
    task = (
        ("programs/handbook.toml", "programs/backends/scripted.toml")
        if is_checkout(page)
        else ("ferries.toml", "stand_ins.toml")
    )
    part = folder / (block.file or "part.toml")
    part.write_text(block.text, encoding="utf-8")
    effective_toml(load_config([*(folder / name for name in task), part]))


def verbs() -> dict[str, Any]:
    """Every verb of the command line by its words: "collect", "config show"."""

    def within(words: str, command: Any) -> Iterator[tuple[str, Any]]:
        inner = getattr(command, "commands", {})
        yield from (
            (key, one)
            for name, one in inner.items()
            for key, one in within(f"{words} {name}".strip(), one)
        )
        if not inner:
            yield words, command

    return dict(within("", typer.main.get_command(app)))


def complaint(command: str, page: Path) -> str | None:
    """What is wrong with a command that is not run: a verb, an option, a file or a target that does
    not exist."""
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    if words[0] == "make":
        targets = re.findall(
            r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE
        )
        unknown = [word for word in words[1:] if "=" not in word and word not in targets]
        return f"no target {unknown}" if unknown else None
    files = [
        word
        for word in words[1:]
        if re.match(r"(programs|metrics|docs|benchmarks|demo|tests)/", word)
    ]
    own = {block.file for one in (TUTORIAL, page) for block in blocks(one)}
    files += [
        word for word in words[1:] if re.fullmatch(r"\w+\.(toml|py)", word) and word not in own
    ]
    missing = [file for file in files if not (ROOT / file.partition("::")[0]).exists()]
    if missing:
        return f"no file {missing}"
    if words[0] != "cowest":
        return None
    known = verbs()
    name = next((name for name in (" ".join(words[1:3]), words[1]) if name in known), None)
    if name is None:
        return f"no verb {words[1:3]}"
    try:
        known[name].make_context(name, words[1 + len(name.split()) :])
    except Exception as error:  # Whatever the parser says of the command is what the test shows.
        return f"{type(error).__name__}: {error}"
    return None
