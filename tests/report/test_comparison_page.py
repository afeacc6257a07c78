"""A comparison's tables and files show its numbers, whole and escaped, in a terminal, in Markdown,
CSV, LaTeX and HTML."""

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
import shutil
import subprocess

import pytest
from compared import compared, comparison, full
from hypothesis import given, settings
from hypothesis import strategies as st
from report_runs import HOSTILE
from rich.console import Console
from written_page import Page, titles

from cowest_dspy.errors import ReportError
from cowest_dspy.influence.arms import Answer
from cowest_dspy.report import Arm
from cowest_dspy.report.comparison import (
    SweepPoint,
    charts,
    numbers_of,
    print_comparison,
    read_comparison,
    render_comparison,
    to_csv,
    to_latex,
    to_markdown,
    write_comparison,
)
from cowest_dspy.report.comparison.latex import escape_latex
from cowest_dspy.report.comparison.markdown import escape_markdown
from cowest_dspy.report.comparison.tables import text_tables

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
        assert (float(row["test_p_holm"]) if row["test_p_holm"] else None) == line.holm
    assert (
        rows[0]["extra.macro_f1"] == "0.41"
        and rows[1]["extra.macro_f1"] == ""
        and rows[2]["seeds"] == "0 1"
    )
    assert (
        rows[3]["settings"] == '{"dpo.beta": 0.01, "pairs.format": "dpo"}'
        and rows[3]["pairs"] == "100 101"
    )


@pytest.mark.parametrize("title", ["=1+1", "+1", "-1", "@x", "\tx"])
def test_a_title_in_csv_is_no_formula(title):
    whole = comparison(compared("strong", "+", title=title))
    row = next(csv.DictReader(io.StringIO(to_csv(whole, numbers_of(whole)))))
    assert row["title"] == "'" + title


# LaTeX


def cells_of(row: str) -> list[str]:
    return re.split(r"(?<!\\) & ", row.removesuffix(r" \\").removeprefix(r"\raggedright "))


def check_structure(text: str) -> list[list[list[str]]]:
    """Balanced braces and environments, as many cells as columns in every row; the rows of each
    table."""
    depth = 0
    for brace in re.sub(r"\\[\\{}]", "", text):
        depth += {"{": 1, "}": -1}.get(brace, 0)
        assert depth >= 0
    assert depth == 0
    assert re.findall(r"\\begin\{([a-z*]+)\}", text) == ["table*", "tabular"] * (
        text.count("tabular}") // 2
    )
    tables = []
    for _, numeric, body in re.findall(
        r"\\begin\{tabular\}\{(l|p\{0\.2\\linewidth\})(r*)\}\n(.*?)\\end\{tabular\}",
        text,
        re.DOTALL,
    ):
        rows = [cells_of(line) for line in body.splitlines() if line.endswith(r"\\")]
        assert {len(row) for row in rows} == {1 + len(numeric)}
        tables.append(rows)
    return tables


def test_latex_has_a_row_per_arm_with_its_numbers_and_a_table_of_the_sweep():
    arms, sweep = check_structure(to_latex(WHOLE, NUMBERS))
    assert [row[0] for row in arms] == [
        "Arm",
        "Strong plain",
        r"The control\_shuffled arm",
        "The collaboration arm",
    ]
    assert (
        arms[3][1:4] == ["40", "5", "93.3"]
        and arms[3][6].startswith("$+76.9$ {[}$+")
        and arms[1][6:8] == ["reference", ""]
    )
    assert [row[0] for row in sweep[1:3]] == [
        "beta 0.01, format dpo",
        "beta 0.1, format dpo",
    ] and len(sweep) == 7


def test_the_caption_in_latex_says_n_interval_and_test():
    caption = next(
        line for line in to_latex(WHOLE, NUMBERS).splitlines() if line.startswith(r"\caption")
    )
    for words in (
        "on 40 examples, over up to 2 seeds",
        "Wilson",
        "bootstrap",
        "McNemar",
        "Holm-corrected over 2 tests",
    ):
        assert words in caption


def test_latex_sets_every_text_as_it_stands():
    whole = full(NASTY)
    text = to_latex(whole, numbers_of(whole, repeats=100))
    assert check_structure(text)[0][1][0].startswith(
        r"Strong a\textbar{}b {*}c{*} \_d\_ \textless{}b\textgreater{}e"
    )
    assert (
        r"\textbackslash{} \& {\char34}j{\char34} 50\% \$k\$ \#l \textasciicircum{}m "
        r"\textasciitilde{}n \{o\}"
    ) in text
    assert escape_latex("a--b---c") == "a-{}-b-{}-{}-c"


def test_a_row_of_latex_that_begins_with_a_bracket_is_no_option_of_the_row_before():
    whole = comparison(compared("strong", "+", title="[1cm]"), compared("a", "+", title="* b"))
    rows = check_structure(to_latex(whole, numbers_of(whole)))[0]
    assert rows[1][0] == "{[}1cm{]}" and rows[2][0] == "{*} b"


@given(st.text(max_size=30))
@settings(max_examples=60)
def test_any_title_leaves_the_table_whole(title):
    whole = comparison(compared("strong", "+-", title=title), title=title)
    assert len(check_structure(to_latex(whole, numbers_of(whole)))[0]) == 2


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex")
def test_latex_compiles(tmp_path):
    whole = full(NASTY)
    body = to_latex(whole, numbers_of(whole, repeats=100))
    source = (
        "\\documentclass{article}\\usepackage{booktabs}\\begin{document}\n"
        + body
        + "\\end{document}\n"
    )
    (tmp_path / "page.tex").write_text(source, encoding="utf-8")
    run = subprocess.run(
        ["pdflatex", "-interaction=batchmode", "-halt-on-error", "page.tex"],
        cwd=tmp_path,
        check=False,
    )
    assert run.returncode == 0, (tmp_path / "page.log").read_text(errors="replace")[-2000:]


# The page


def test_the_page_shows_every_number_of_the_tables():
    page = Page(render_comparison(WHOLE, NUMBERS))
    for table in text_tables(WHOLE, NUMBERS):
        for row in table.rows:
            assert " ".join(row) in page.text
    assert "Better than Strong plain" in page.text and "one warning: plain" in page.text


def test_the_page_runs_nothing_asks_for_nothing_and_allows_only_its_style():
    html = render_comparison(full(HOSTILE), numbers_of(full(HOSTILE), repeats=100))
    page = Page(html)
    assert not page.scripts and not page.handlers and " style=" not in html
    assert all(address in ("data:,", "#main") for address in page.addresses)
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
    for path in (written.html, written.csv, written.tex, written.md):
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
    assert charts.difference_reach(NUMBERS) == 90
    wide = str(charts.difference_chart(NUMBERS)).partition("</svg>")[0]
    assert titles(wide + "</svg>") == [
        "The control_shuffled arm: +0.0 [-8.8, +8.8] points",
        "The collaboration arm: +76.9 [+63.1, +89.1] points",
    ]
    found = re.findall(
        r'<path transform="translate\(([\d.]+),\d+\)"[^>]*fill="var\(--(\w+)\)"', wide
    )
    assert [kind for _, kind in found] == ["plain", "helped"]
    assert [float(x) for x, _ in found] == [285, pytest.approx(285 + 285 * 76.92 / 90, abs=0.1)]


def test_a_sweep_is_a_curve_per_series_over_the_number_that_varies_most():
    assert charts.sweep_axis(NUMBERS) == "dpo.beta"
    series = charts.sweep_series(NUMBERS, "dpo.beta")
    assert list(series) == ["format dpo", "format plain"] and all(
        len(points) == 3 for points in series.values()
    )
    chart = str(charts.sweep_chart(NUMBERS, "dpo.beta", NUMBERS.arms[0]))
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
    numbers = numbers_of(whole)
    assert charts.sweep_axis(numbers) is None
    text = Page(render_comparison(whole, numbers)).text
    assert "Sweep, in numbers" in text and "format kto 1 - 2 0 50.0" in text
    assert (
        charts.sweep_axis(
            numbers_of(comparison(sweep=(SweepPoint({"on": True}, compared("a", "+")),)))
        )
        is None
    )


# Files


def test_all_five_files_are_written_whole_and_read_back(tmp_path):
    written = write_comparison(WHOLE, tmp_path / "run")
    names = [f"comparison.{kind}" for kind in ("csv", "html", "json", "md", "tex")]
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
        for kind in ("csv", "html", "json", "md", "tex")
    )
    numbers = json.loads(written.json.read_text(encoding="utf-8"))["numbers"]
    assert numbers["arms"][2]["holm"] == numbers_of(WHOLE).arms[2].holm and numbers["tests"] == 2


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
