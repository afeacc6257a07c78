"""What a report says is true of every domain: no word of the demo's domain stands in it, and notes
come from the configuration."""

from __future__ import annotations

import ast
import io
import re
from collections.abc import Iterator
from pathlib import Path

import toy
from report_runs import arm
from rich.console import Console

import cowest_dspy
from cowest_dspy import Store, load_config
from cowest_dspy.experiment.summary import ARMS, build_arm, run_report
from cowest_dspy.report import print_report, render_html

LIBRARY = Path(cowest_dspy.__file__).parent
# Words of the recipes' domains. Paths of the demo in examples of commands
# ("programs/handbook.toml") name a file that there is.
DOMAINS = re.compile(
    r"(?<![/\w])(handbooks?|archives?|plants?|islands?|arbel|patients?|exams?|drugs?|diseases?|fact "
    r"sheets?|passers|rules of thumb"
    r"|oracle's facts|machine rooms?)(?![\w.-]*\.toml)\b",
    re.IGNORECASE,
)


def spoken_texts(path: Path) -> Iterator[str]:
    """The texts of a module that may be shown: all but docstrings, which are for readers of the
    code."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    quiet = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in quiet:
            yield node.value


def test_the_library_says_no_word_of_one_domain() -> None:
    """A report on loans told that the weak model "learned the same handbook"."""
    scaffold = LIBRARY / "scaffold"  # What `cowest new` writes is a domain of its own.
    modules = [path for path in LIBRARY.rglob("*.py") if scaffold not in path.parents]
    pages = [
        path
        for kind in ("*.j2", "*.js")
        for path in LIBRARY.rglob(kind)
        if scaffold not in path.parents
    ]
    texts = [(path, text) for path in modules for text in spoken_texts(path)]
    texts += [(path, path.read_text(encoding="utf-8")) for path in pages]
    assert len(texts) > 2000
    found = {(path.name, word.group()) for path, text in texts for word in DOMAINS.finditer(text)}
    assert found == set()


def settings(folder: Path, more: str) -> list[Path]:
    (folder / "toy.py").write_text(toy.RECIPE)
    (folder / "toy.toml").write_text(
        f"{toy.TASK}{more}\n{toy.engine('weak')}{toy.engine('strong')}"
    )
    return [folder / "toy.toml"]


def test_a_note_says_what_the_configuration_says_and_no_more(tmp_path: Path) -> None:
    """Where nothing was fine-tuned, the weak arm was called "fine-tuned to answer"."""
    bare = load_config(
        settings(tmp_path, '[evaluate]\nweak = "toy.py:program"\noracle = "rules"\n')
    )
    with Store(tmp_path / "run") as store:
        weak, oracle = build_arm("weak", bare, store), build_arm("oracle", bare, store)
        assert (weak.title, weak.note) == (
            "weak alone, as it came",
            "nothing was fine-tuned for it",
        )
        assert '"rules"' in oracle.note
        taught = load_config(
            settings(tmp_path, '[sft]\ndrafts = "toy.py:known"\nanswers = "toy.py:solved"\n[kto]\n')
        )
        weak = build_arm("weak", taught, store)
        assert (
            weak.title == "weak alone, fine-tuned to answer"
            and "toy.py:known" in weak.note
            and "toy.py:solved" in weak.note
        )
        assert (
            build_arm("shuffled", taught, store).title
            == "control: KTO on the same drafts, labels shuffled"
        )
        assert (
            build_arm("shuffled", bare, store).title
            == "control: DPO on the same pairs, labels shuffled"
        )


def test_a_report_of_another_domain_has_no_word_of_the_demo_s(tmp_path: Path) -> None:
    config = load_config(
        settings(tmp_path, '[evaluate]\nweak = "toy.py:program"\noracle = "rules"\n')
    )
    with Store(tmp_path / "run") as store:
        for name in ARMS:
            made, answers = build_arm(name, config, store), arm(name, "++-!").answers
            record = {
                "title": made.title,
                "note": made.note,
                "answers": [vars(answer) for answer in answers],
            }
            store.keep("arm", name, {**record, "identity": "i"})
        report = run_report(config, store)
    console = Console(file=io.StringIO(), width=200)
    print_report(report, console)
    for text in (console.file.getvalue(), render_html(report)):  # pyright: ignore[reportAttributeAccessIssue]
        assert [word.group() for word in DOMAINS.finditer(text)] == []
