"""benchmarks/marked.py: how benchmarks put their tables into pages that are otherwise written by
hand."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table

from cowest_dspy.utils.importing import load

ROOT = Path(__file__).parents[2]
FILE = ROOT / "benchmarks/marked.py"


def marked(name: str) -> Any:
    return load(f"{FILE}:{name}")


def table() -> Table:
    made = Table(title="calls that answer at once")
    made.add_column("")
    made.add_column("calls/s", justify="right")
    made.add_row("alone", "482")
    made.add_row("ray", "266")
    return made


def test_what_stands_between_the_marks_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("# Before\n<!-- a -->\nold\n<!-- end -->\nAfter.\n", encoding="utf-8")
    marked("put")(page, "<!-- a -->", "<!-- end -->", "new")
    marked("put")(page, "<!-- a -->", "<!-- end -->", "newer")
    assert page.read_text(encoding="utf-8") == "# Before\n<!-- a -->\nnewer\n<!-- end -->\nAfter.\n"


@pytest.mark.parametrize(
    "text", ["# No mark\n", "<!-- a -->\nNo end.\n", "No beginning. <!-- end -->\n"]
)
def test_a_page_without_both_marks_is_left_as_it_is(tmp_path: Path, text: str) -> None:
    page = tmp_path / "README.md"
    page.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="has not both of"):
        marked("put")(page, "<!-- a -->", "<!-- end -->", "new")
    assert page.read_text(encoding="utf-8") == text


def test_a_table_of_the_terminal_becomes_one_of_markdown() -> None:
    wanted = (
        "Calls that answer at once:\n\n|  | calls/s |\n| --- | ---: |\n| alone | 482 |\n| "
        "ray | 266 |"
    )
    assert marked("markdown")(table()) == wanted


def test_only_a_run_without_options_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "README.md"
    page.write_text(
        "<!-- part: written by `make bench` -->\n<!-- end of part -->\n", encoding="utf-8"
    )
    publish = marked("publish")
    monkeypatch.setitem(publish.__globals__, "README", page)
    monkeypatch.setattr(sys, "argv", ["bench_part.py", "--seconds", "3"])
    publish("part", [table()])
    assert "482" not in page.read_text(encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["bench_part.py"])
    publish("part", [table(), "Lost: 0."])
    text = page.read_text(encoding="utf-8")
    assert "| alone | 482 |" in text and "Lost: 0.\n<!-- end of part -->" in text


def test_every_benchmark_that_publishes_has_its_place_in_the_page() -> None:
    page = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    parts = [
        found
        for file in FILE.parent.glob("bench_*.py")
        for found in re.findall(r'publish\("(\w+)"', file.read_text("utf-8"))
    ]
    assert sorted(parts) == sorted(re.findall(r"<!-- (\w+): written by", page))
    for part in parts:
        assert (
            page.count(f"<!-- {part}: written by `make bench` -->")
            == page.count(f"<!-- end of {part} -->")
            == 1
        )
