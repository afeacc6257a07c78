"""A comparison's tables and files show its numbers, whole and escaped, in a terminal, in Markdown, CSV, LaTeX and HTML."""

from __future__ import annotations

import csv
import dataclasses
import io
import re

import pytest
from compared import compared, comparison, full
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from cowest_dspy.comparison import numbers_of, print_comparison, to_csv, to_markdown
from cowest_dspy.comparison.markdown import escape_markdown
from cowest_dspy.comparison.tables import text_tables

NASTY = 'a|b *c* _d_ <b>e</b> [f](http://g) `h`\n- i\\ & "j" 50% $k$ #l ^m ~n {o}'
WHOLE = full()
NUMBERS = numbers_of(WHOLE, repeats=500)


def printed(whole, width, **options) -> str:
    stream = io.StringIO()
    print_comparison(whole, Console(file=stream, width=width, **options))
    return stream.getvalue()


# The terminal


@pytest.mark.parametrize("width", [80, 100, 120])
def test_the_terminal_fits_and_cuts_nothing(width):
    arms = tuple(
        dataclasses.replace(one, extra={f"a_longer_name_{i}": 0.5 for i in range(9)}, extra_intervals={}) for one in WHOLE.arms
    )
    text = printed(dataclasses.replace(WHOLE, arms=arms, sweep=WHOLE.sweep[:3]), width)
    assert all(len(line) <= width for line in text.splitlines()) and "…" not in text
    for i in range(9):
        assert f"a_longer_name_{i}" in text
    assert "continued" in text and "+76.9 [" in text and "exact McNemar" in text


def test_the_terminal_shows_the_verdict_first_and_is_plain_where_it_is_piped():
    text = printed(dataclasses.replace(WHOLE, sweep=(), warnings=("[bold]not markup[/bold]",)), 120)
    assert text.startswith("Better than Strong plain") and "\x1b" not in text and "[bold]not markup[/bold]" in text
    assert "continued" not in text  # the results fit 120 columns as one table


def test_a_title_is_not_markup_of_the_terminal():
    whole = comparison(compared("strong", "+-", title="[red]x[/red]"), compared("a", "+-", title="[/]"))
    assert "[red]x[/red]" in printed(whole, 120) and "[/]" in printed(whole, 120)


@pytest.mark.parametrize("whole", [comparison(), comparison(compared("strong", "!!")), comparison(compared("a", ""))])
def test_a_comparison_with_nothing_in_it_is_shown(whole):
    assert "No verdict yet" in printed(whole, 120) or "No arm is tested" in printed(whole, 120)
    assert to_markdown(whole, numbers_of(whole)) and to_csv(whole, numbers_of(whole))


# Markdown


def test_markdown_has_tables_of_equal_rows_with_every_number():
    text = to_markdown(WHOLE, NUMBERS)
    tables = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    assert len(tables) == len(text_tables(WHOLE, NUMBERS)) == 4
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1
    for line in NUMBERS.arms:
        assert line.score is not None and f"| {100 * line.score:.1f} |" in text
    assert text.startswith("## A comparison\n") and "**Strong plain**" in text


def test_nothing_in_markdown_is_markup_but_what_we_write():
    whole = full(NASTY)
    text = to_markdown(whole, numbers_of(whole, repeats=100))
    assert "<b>" not in text and "\n- i" not in text and "(http" in text and "](http" not in re.sub(r"\\.", "", text)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(re.sub(r"\\.", "", row).count("|") == re.sub(r"\\.", "", rows[0]).count("|") for row in rows[:3])


@given(st.text(max_size=30))
def test_escaped_markdown_is_one_line_without_a_bare_pipe(text):
    found = escape_markdown(text)
    assert len(found.splitlines()) <= 1 and "|" not in re.sub(r"\\.", "", found) and "<" not in found


# CSV


def test_csv_gives_back_every_number_in_full():
    rows = list(csv.DictReader(io.StringIO(to_csv(WHOLE, NUMBERS))))
    assert [row["kind"] for row in rows] == ["arm"] * 3 + ["sweep"] * 6
    for row, line in zip(rows, NUMBERS.arms, strict=False):
        assert (row["name"], int(row["n"]), float(row["score"])) == (line.name, line.n, line.score)
        assert (float(row["test_p_holm"]) if row["test_p_holm"] else None) == line.holm
    assert rows[0]["extra.macro_f1"] == "0.41" and rows[1]["extra.macro_f1"] == "" and rows[2]["seeds"] == "0 1"
    assert rows[3]["settings"] == '{"dpo.beta": 0.01, "pairs.format": "dpo"}' and rows[3]["pairs"] == "100 101"


@pytest.mark.parametrize("title", ["=1+1", "+1", "-1", "@x", "\tx"])
def test_a_title_in_csv_is_no_formula(title):
    whole = comparison(compared("strong", "+", title=title))
    row = next(csv.DictReader(io.StringIO(to_csv(whole, numbers_of(whole)))))
    assert row["title"] == "'" + title
