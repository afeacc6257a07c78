"""README and docs run: Python, TOML and commands, each page from its first block on; what is not
run is listed here.

pages.py says what the words after a fence's language mean.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from pages import (
    NOTES,
    PAGES,
    ROOT,
    TUTORIAL,
    blocks,
    complaint,
    name_of,
    prepare,
    read_toml,
    run,
    with_a_tiny_model,
    with_models,
)

# The blocks that no test runs, by page, and why. A page's own words are these: its fences say "bash
# norun" and the reason.
NOT_RUN: dict[str, list[str]] = {
    "README.md": [
        "installs packages",
        "a download of 1.2 GB, then some ten minutes; and all tests",
        "some minutes, and money for an API",
    ],
    "docs/compare.md": [
        "wants the rows of MedMCQA, and hours",
        "wants a tuned run, and the rows of another task",
        "of runs of your own",
    ],
    "docs/demo.md": ["a download of 1.2 GB, then some ten minutes", "goes on from make demo"],
    "docs/domains.md": [
        "wants the rows of MedMCQA, and hours",
        "wants the rows of MedMCQA, and hours",
        "wants the rows of GeoQuery, and hours",
    ],
    "docs/results/geoquery.md": ["wants the rows of GeoQuery, and two hours on two cores"],
    "docs/howto/cluster.md": ["needs several machines"],
    "docs/howto/bundle.md": ["needs an account on the Hub"],
    "docs/howto/notebook.md": ["minutes of two real models"],
    "docs/howto/pairs.md": ["needs an account on the Hub"],
    "docs/howto/serve.md": [
        "serves until it is stopped",
        "asks the server above",
        "opens a port to others, and serves until it is stopped",
    ],
    "docs/howto/vllm.md": ["needs vLLM and a GPU", "needs the two servers of step 1"],
    "docs/index.md": ["installs packages"],
    "docs/install.md": ["installs packages"] * 3,
    "docs/scale.md": ["measures for minutes"],
    "docs/when.md": ["two models, some minutes"],
    "docs/tracking.md": [
        "needs MLflow's server and real models",
        "needs a run of real models and a tracker",
    ],
}
# Code that is run by a test of the page's own.
ALONE = {
    "README.md": "docs/test_readme.py",
    "docs/howto/serve.md": "serve/test_serving_page.py",
    "docs/tracking.md": "experiment/test_tracking_page.py",
}


def with_note(*wanted: tuple[str, str]) -> list[Path]:
    """The pages that have blocks of these languages and notes. test_tutorial.py runs the tutorial,
    and looks at more."""
    return [
        page
        for page in PAGES
        if page != TUTORIAL
        and any((block.language, block.note) in wanted for block in blocks(page))
    ]


# Pages that start a cluster, fit a router or tune a model: in the long tier.
LONG = {"docs/router.md", "docs/howto/bundle.md", "docs/howto/cluster.md"}


def by_tier(pages: list[Path]) -> list[Any]:
    """The pages as parameters, the long ones marked."""
    return [
        pytest.param(page, marks=pytest.mark.slow) if name_of(page) in LONG else page
        for page in pages
    ]


QUICK = with_note(("python", ""), ("bash", ""), ("bash", "fails"))
TUNED = with_note(("python", "tuned"), ("bash", "tuned"))
SLOW = with_note(("python", "slow"), ("bash", "slow"))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_fence_is_one_that_something_is_done_with(page: Path) -> None:
    """A fence such as "```python3" or "```toml (part)" would be shown, and never looked at."""
    fences = re.findall(r"^ *(?:```|~~~).*$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(fences) == 2 * len(blocks(page)), "a fence is indented, or not closed"
    for block in blocks(page):
        assert block.language in NOTES, (
            f'line {block.line}: "{block.language}" is not among {", ".join(NOTES)}'
        )
        assert re.fullmatch(NOTES[block.language], block.note), (
            f"line {block.line}: {block.language} {block.note}"
        )
    files = [block.file for block in blocks(page) if block.file]
    assert len(set(files)) == len(files)


@pytest.mark.parametrize("page", by_tier(QUICK), ids=name_of)
def test_what_needs_no_model_runs_and_prints_what_is_said(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(prepare(page, tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    assert run(page, tmp_path, {"", "fails"})


@pytest.mark.parametrize("page", by_tier(TUNED), ids=name_of)
def test_what_tunes_runs_with_a_tiny_model(
    page: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(with_a_tiny_model(prepare(page, tmp_path), tiny_model))
    assert run(page, tmp_path, {"tuned"}).commands
    assert (tmp_path / "runs/real/report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("page", SLOW, ids=name_of)
def test_what_needs_real_models_runs(
    page: Path, tmp_path: Path, real_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole page, since what needs models goes on from what does not."""
    monkeypatch.chdir(with_models(prepare(page, tmp_path), real_models))
    monkeypatch.syspath_prepend(tmp_path)
    assert run(page, tmp_path, {"", "fails", "slow"})


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(b.language == "toml" for b in blocks(page))], ids=name_of
)
def test_every_toml_is_read(page: Path, tmp_path: Path) -> None:
    prepare(page, tmp_path)
    for block in blocks(page):
        if block.language == "toml":
            read_toml(page, block, tmp_path)


def test_what_is_not_run_is_listed_here_and_exists() -> None:
    found = {
        name_of(page): [block.reason for block in blocks(page) if block.reason] for page in PAGES
    }
    assert {page: reasons for page, reasons in found.items() if reasons} == NOT_RUN
    assert sum(map(len, NOT_RUN.values())) == 29
    for page in PAGES:
        for block in blocks(page):
            wrong = (
                {command: told for command in block.commands if (told := complaint(command, page))}
                if block.reason
                else {}
            )
            assert wrong == {}, f"{name_of(page)}, line {block.line}"


def test_code_that_changes_a_whole_process_has_a_test_of_its_own() -> None:
    found = [name_of(page) for page in PAGES for block in blocks(page) if block.note == "alone"]
    assert found == list(ALONE)
    for name, test in ALONE.items():
        assert f'"{name}"' in (ROOT / "tests" / test).read_text(encoding="utf-8")


def test_commands_that_do_not_exist_are_found() -> None:
    page = ROOT / "README.md"
    assert complaint("cowest cycle programs/handbook.toml --run runs/x", page) is None
    for command in (
        "cowest cicle programs/handbook.toml",
        "cowest cycle programs/handbook.toml --runs runs/x",
        "cowest cycle programs/handbok.toml",
        "cowest config shows programs/handbook.toml",
        "make demos",
        "python benchmarks/bench_nothing.py",
    ):
        assert complaint(command, page), command


def test_the_demo_says_first_what_its_page_says() -> None:
    stages = (ROOT / "demo/stages.txt").read_text(encoding="utf-8")
    assert f"```text\n{stages}```" in (ROOT / "docs/demo.md").read_text(encoding="utf-8")
    assert "cat demo/stages.txt" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_the_readme_is_short_and_shows_how_to_begin() -> None:
    page = ROOT / "README.md"
    assert page.stat().st_size <= 8 * 1024
    assert sum(block.language == "python" for block in blocks(page)) == 1


def slug(heading: str) -> str:
    """The anchor of a heading, as MkDocs and GitHub make it."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.replace("`", ""))
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())


def prose(page: Path) -> str:
    """The page without its fenced blocks and code."""
    return re.sub(
        r"`[^`\n]*`",
        "",
        re.sub(
            r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
        ),
    )


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    """Files and headings are there. Addresses of others are only read: no test asks a network."""
    links = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    for link in links:
        if re.match(r"\w+:", link):
            parts = urlsplit(link)
            assert (
                parts.scheme == "https"
                and "." in parts.netloc
                and parts.netloc == parts.netloc.lower()
            ), link
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), link
        if anchor:
            text = re.sub(
                r"^```.*?^```$",
                "",
                target.read_text(encoding="utf-8"),
                flags=re.MULTILINE | re.DOTALL,
            )
            headings = {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
            assert anchor in headings, f"{link}: {sorted(headings)}"
