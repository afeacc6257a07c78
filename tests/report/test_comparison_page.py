"""A comparison's tables and files show its numbers, whole and escaped, in a terminal, in Markdown,
CSV and HTML."""

from __future__ import annotations

import base64
import csv
import dataclasses
import hashlib
import io
import json
import math
import re
import secrets

import pytest
from compared import compared, comparison, full
from hypothesis import given
from hypothesis import strategies as st
from report_runs import HOSTILE
from rich.console import Console
from written_page import Page, titles

from cowest_dspy.errors import ReportError
from cowest_dspy.influence.arms import Answer
from cowest_dspy.report import Arm
from cowest_dspy.report import compare_view as charts
from cowest_dspy.report.compare import compute_numbers
from cowest_dspy.report.compare_view import (
    comparison_view,
    print_comparison,
    read_comparison,
    render_comparison,
    to_csv,
    to_markdown,
    write_comparison,
)
from cowest_dspy.report.compared import SweepPoint
from cowest_dspy.report.view import escape_markdown

NASTY = 'a|b *c* _d_ <b>e</b> [f](http://g) `h`\n- i\\ & "j" 50% $k$ #l ^m ~n {o}'
WHOLE = full()
NUMBERS = compute_numbers(WHOLE, repeats=500)


def printed(whole, width, **options) -> str:
    stream = io.StringIO()
    print_comparison(whole, Console(file=stream, width=width, **options))
    return stream.getvalue()


# The terminal


@pytest.mark.parametrize("width", [80, 100, 120])
def test_the_terminal_fits_and_cuts_nothing(width):
    arms = tuple(
        dataclasses.replace(
            one, extra={f"a_longer_name_{i}": 0.5 for i in range(9)}, extra_intervals={}
        )
        for one in WHOLE.arms
    )
    text = printed(dataclasses.replace(WHOLE, arms=arms, sweep=WHOLE.sweep[:3]), width)
    assert all(len(line) <= width for line in text.splitlines()) and "…" not in text
    for i in range(9):
        assert f"a_longer_name_{i}" in text
    assert "continued" in text and "+76.9 [" in text and "exact McNemar" in text


def test_the_terminal_shows_the_verdict_first_and_is_plain_where_it_is_piped():
    text = printed(dataclasses.replace(WHOLE, sweep=(), warnings=("[bold]not markup[/bold]",)), 120)
    assert (
        text.startswith("Better than Strong plain")
        and "\x1b" not in text
        and "[bold]not markup[/bold]" in text
    )
    assert "continued" not in text  # the results fit 120 columns as one table


def test_a_title_is_not_markup_of_the_terminal():
    whole = comparison(
        compared("strong", "+-", title="[red]x[/red]"), compared("a", "+-", title="[/]")
    )
    assert "[red]x[/red]" in printed(whole, 120) and "[/]" in printed(whole, 120)


@pytest.mark.parametrize(
    "whole", [comparison(), comparison(compared("strong", "!!")), comparison(compared("a", ""))]
)
def test_a_comparison_with_nothing_in_it_is_shown(whole):
    assert "No verdict yet" in printed(whole, 120) or "No arm is tested" in printed(whole, 120)
    assert to_markdown(whole, compute_numbers(whole)) and to_csv(whole, compute_numbers(whole))


# Markdown


def test_markdown_has_tables_of_equal_rows_with_every_number():
    text = to_markdown(WHOLE, NUMBERS)
    tables = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    assert len(tables) == len(comparison_view(WHOLE, NUMBERS).tables) == 4
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1
    for line in NUMBERS.arms:
        assert line.score is not None and f"| {100 * line.score:.1f} |" in text
    assert text.startswith("## A comparison\n") and "**Strong plain**" in text


def test_nothing_in_markdown_is_markup_but_what_we_write():
    whole = full(NASTY)
    text = to_markdown(whole, compute_numbers(whole, repeats=100))
    assert (
        "<b>" not in text
        and "\n- i" not in text
        and "(http" in text
        and "](http" not in re.sub(r"\\.", "", text)
    )
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(
        re.sub(r"\\.", "", row).count("|") == re.sub(r"\\.", "", rows[0]).count("|")
        for row in rows[:3]
    )


@given(st.text(max_size=30))
def test_escaped_markdown_is_one_line_without_a_bare_pipe(text):
    found = escape_markdown(text)
    assert (
        len(found.splitlines()) <= 1 and "|" not in re.sub(r"\\.", "", found) and "<" not in found
    )


# CSV


def test_csv_gives_back_every_number_in_full():
    rows = list(csv.DictReader(io.StringIO(to_csv(WHOLE, NUMBERS))))
    assert [row["kind"] for row in rows] == ["arm"] * 3 + ["sweep"] * 6
    for row, line in zip(rows, NUMBERS.arms, strict=False):
        assert (row["name"], int(row["n"]), float(row["score"])) == (line.name, line.n, line.score)
        assert (float(row["holm"]) if row["holm"] else None) == line.holm
    assert (
        rows[0]["extra.macro_f1.mean"] == "0.41"
        and rows[1]["extra.macro_f1.mean"] == ""
        and float(rows[2]["test.interval.low"]) > 0
        and rows[2]["seeds"] == "0 1"
    )
    assert (
        rows[3]["settings"] == '{"dpo.beta": 0.01, "pairs.format": "dpo"}'
        and rows[3]["pairs"] == "100 101"
    )


@pytest.mark.parametrize("title", ["=1+1", "+1", "-1", "@x", "\tx"])
def test_a_title_in_csv_is_no_formula(title):
    whole = comparison(compared("strong", "+", title=title))
    row = next(csv.DictReader(io.StringIO(to_csv(whole, compute_numbers(whole)))))
    assert row["title"] == "'" + title


# The page


def test_the_page_shows_every_number_of_the_tables():
    page = Page(render_comparison(WHOLE, NUMBERS))
    for table in comparison_view(WHOLE, NUMBERS).tables:
        for row in table.rows:
            assert " ".join(row) in page.text
    assert "Better than Strong plain" in page.text and "one warning: plain" in page.text


def test_the_page_runs_nothing_asks_for_nothing_and_allows_only_its_style():
    html = render_comparison(full(HOSTILE), compute_numbers(full(HOSTILE), repeats=100))
    page = Page(html)
    assert not page.scripts and not page.handlers and " style=" not in html
    assert all(one == "data:," or one.startswith("#") for one in page.addresses)
    assert HOSTILE.split(" \u2028")[0] in page.text
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style.group(1).encode()).digest()).decode()
    assert (
        page.policy.startswith("default-src 'none'")
        and f"style-src 'sha256-{digest}'" in page.policy
    )
    assert "script-src" not in page.policy


def test_no_input_and_no_answer_is_on_the_page_nor_in_the_tables(tmp_path):
    answers = tuple(
        Answer(
            f"q{i}",
            {"post": "a cruel post"},
            "cruel gold",
            "cruel answer",
            1.0,
            draft="cruel draft",
        )
        for i in range(3)
    )
    whole = comparison(
        dataclasses.replace(compared("strong", "+"), arm=Arm("strong", "Strong", answers))
    )
    written = write_comparison(whole, tmp_path)
    for path in (written.html, written.csv, written.md):
        assert "cruel" not in path.read_text(encoding="utf-8")
    assert "a cruel post" in written.json.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "whole", [comparison(), comparison(compared("strong", "!!")), comparison(compared("a", "+-"))]
)
def test_the_page_of_an_unfinished_comparison_renders(whole, tmp_path):
    page = Page(write_comparison(whole, tmp_path).html.read_text(encoding="utf-8"))
    assert "yet" in page.text or "No arm is tested" in page.text


# Charts


def test_a_score_is_a_point_at_its_place_with_its_seeds_beside_it():
    chart = charts.score_chart(NUMBERS, NUMBERS.arms[0])
    said = [f"{line.title}: {100 * (line.score or 0):.1f} %" for line in NUMBERS.arms]
    assert [
        title.partition(", 95 %")[0] for title in titles(chart)
    ] == said * 2  # a wide page's, and a phone's
    places = [
        float(x)
        for x in re.findall(
            r'<path transform="translate\(([\d.]+),\d+\)"', str(chart).partition("</svg>")[0]
        )
    ]
    # Small dots of single seeds first, then a point per arm, on 570 pixels.
    assert places == [
        pytest.approx(570 * share, abs=0.1)
        for share in (1.0, 0.875, *(line.score or 0.0 for line in NUMBERS.arms))
    ]


def test_a_difference_has_its_place_and_the_colour_of_what_was_found():
    wide = str(charts.difference_chart(NUMBERS)[0].drawing).partition("</svg>")[0]
    assert titles(wide + "</svg>") == [
        "The control_shuffled arm: +0.0 [-8.8, +8.8] points",
        "The collaboration arm: +76.9 [+63.1, +89.1] points",
    ]
    found = re.findall(
        r'<path transform="translate\(([\d.]+),\d+\)"[^>]*fill="var\(--(\w+)\)"', wide
    )
    assert [kind for _, kind in found] == ["plain", "helped"]
    assert [float(x) for x, _ in found] == [285, pytest.approx(285 + 285 * 76.92 / 100, abs=0.1)]


def test_a_sweep_is_a_curve_per_series_over_the_number_that_varies_most():
    assert charts.sweep_axis(NUMBERS) == "dpo.beta"
    series = charts.sweep_series(NUMBERS, "dpo.beta")
    assert list(series) == ["format dpo", "format plain"] and all(
        len(points) == 3 for points in series.values()
    )
    chart = str(charts.sweep_chart(NUMBERS, "dpo.beta", NUMBERS.arms[0])[0].drawing)
    assert (
        "format dpo: 25.0 % at 0.01, 62.5 % at 0.1, 42.9 % at 0.5" in chart
        and "dpo.beta, logarithmic" in chart
    )
    assert [title.partition(":")[0] for title in titles(chart)[:2]] == [
        "beta 0.01, format dpo",
        "beta 0.1, format dpo",
    ]
    wide = chart.partition("</svg>")[0]
    lines = re.findall(r'<path d="([^"]+)" stroke="var\(--s\d\)"', wide)
    assert [len(re.findall(r"[ML]", line)) for line in lines] == [3, 3]
    places = [float(x) for x in re.findall(r"[ML]([-\d.]+),", lines[0])]
    # log 0.01, 0.1, 0.5: the first step is log 10 / log 50 of the whole.
    assert (places[1] - places[0]) / (places[2] - places[0]) == pytest.approx(
        math.log(10) / math.log(50), abs=0.002
    )


def test_a_sweep_without_a_number_has_a_table_and_no_chart():
    points = tuple(SweepPoint({"format": kind}, compared("tuned", "+-")) for kind in ("dpo", "kto"))
    whole = comparison(compared("strong", "--"), sweep=points)
    numbers = compute_numbers(whole)
    assert charts.sweep_axis(numbers) is None
    text = Page(render_comparison(whole, numbers)).text
    assert "Sweep" in text and "format kto 1 - 2 0 50.0" in text
    assert (
        charts.sweep_axis(
            compute_numbers(comparison(sweep=(SweepPoint({"on": True}, compared("a", "+")),)))
        )
        is None
    )


# Files


def test_all_four_files_are_written_whole_and_read_back(tmp_path):
    written = write_comparison(WHOLE, tmp_path / "run")
    names = [f"comparison.{kind}" for kind in ("csv", "html", "json", "md")]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == names
    again = read_comparison(tmp_path / "run")
    assert (
        again.arms == WHOLE.arms
        and again.sweep == WHOLE.sweep
        and again == read_comparison(written.json)
    )
    other = write_comparison(again, tmp_path / "again")
    assert all(
        getattr(written, kind).read_bytes() == getattr(other, kind).read_bytes()
        for kind in ("csv", "html", "json", "md")
    )
    numbers = json.loads(written.json.read_text(encoding="utf-8"))["numbers"]
    assert (
        numbers["arms"][2]["holm"] == compute_numbers(WHOLE).arms[2].holm and numbers["tests"] == 2
    )


def test_an_error_while_writing_leaves_the_old_files(tmp_path, monkeypatch):
    old = write_comparison(comparison(compared("strong", "+")), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    real, made = secrets.token_hex, []

    def full_disk(size):
        made.append(size)
        if len(made) == 4:
            raise OSError("No space left on device")
        return real(size)

    monkeypatch.setattr(secrets, "token_hex", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_comparison(comparison(compared("strong", "-")), tmp_path)
    assert {
        path.name: path.read_bytes() for path in tmp_path.iterdir()
    } == before and old.html.exists()


def test_a_missing_or_broken_comparison_says_what_to_type(tmp_path):
    with pytest.raises(ReportError, match="cowest compare"):
        read_comparison(tmp_path)
    for text in ("{", "[]"):
        (tmp_path / "comparison.json").write_text(text)
        with pytest.raises(ReportError):
            read_comparison(tmp_path)


def test_secrets_are_masked_in_every_file(tmp_path):
    key = "sk-" + "a1B2" * 6
    written = write_comparison(full(f"my key is {key}"), tmp_path)
    for path in dataclasses.asdict(written).values():
        text = path.read_text(encoding="utf-8")
        assert key not in text and "plain-words" not in text and "my key is" in text
