"""The report's files, page, charts and tables: they show what they are given, whole, escaped, and nothing secret."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_runs import HOSTILE, arm, full_run, run, trace
from rich.console import Console

from cowest_dspy.errors import ReportError
from cowest_dspy.report import (
    Curve,
    CurvePoint,
    PairsSummary,
    Stage,
    print_report,
    read_report,
    render_html,
    write_report,
)
from cowest_dspy.report.browse import evenly
from cowest_dspy.report.charts import line_chart, nice_ticks, tag


class Page(HTMLParser):
    """What a browser would make of the page: its scripts, its text, and every address that it could ask for."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.texts: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.policy = ""
        self._raw: str | None = None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.addresses += [found[key] or "" for key in ("src", "href", "srcset", "data") if key in found]
        self.handlers += [key for key in found if key.startswith("on")]
        if found.get("http-equiv") == "Content-Security-Policy":
            self.policy = found["content"] or ""
        self._raw = tag if tag in ("script", "style") else None
        if tag == "script":
            self.scripts.append((found, ""))

    def handle_endtag(self, tag):
        self._raw = None

    def handle_data(self, data):
        if self._raw == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)
        elif self._raw is None:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))

    def data(self, name: str) -> dict:
        return next(json.loads(text) for found, text in self.scripts if found.get("id") == f"{name}-data")


# Files


def test_both_files_are_written_whole_and_read_back(tmp_path):
    written = write_report(full_run(), tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["report.html", "report.json"]
    again = read_report(tmp_path / "run")
    assert again == read_report(written.json)
    assert again.arms == full_run().arms


def test_the_numbers_in_the_json_are_those_of_the_page(tmp_path):
    written = write_report(full_run(), tmp_path)
    numbers = json.loads(written.json.read_text(encoding="utf-8"))["numbers"]
    page = Page(written.html.read_text(encoding="utf-8"))
    for line in numbers["arms"]:
        assert f"{line['title']} " in page.text and f"{100 * line['accuracy']:.1f} %" in page.text
    for sentence in numbers["verdict"]["sentences"]:
        assert sentence in page.text
    assert numbers["tuning"]["fixed"] == 5 and "Fixed : 4 of 5" in page.text


def test_the_same_report_gives_the_same_bytes(tmp_path):
    one, two = write_report(full_run(), tmp_path / "a"), write_report(full_run(), tmp_path / "b")
    assert one.json.read_bytes() == two.json.read_bytes() and one.html.read_bytes() == two.html.read_bytes()


def test_a_missing_or_broken_report_says_what_to_type(tmp_path):
    with pytest.raises(ReportError, match="cowest report"):
        read_report(tmp_path)
    for text in ("{", "[]"):
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(ReportError):
            read_report(tmp_path)


def test_secrets_are_masked_in_both_files_and_words_of_the_domain_are_not(tmp_path):
    key = "sk-" + "a1B2" * 6
    report = dataclasses.replace(
        full_run(f"my key is {key}"), warnings=(f"401 for Bearer {key}",), versions={"tokens": "max_tokens"}
    )
    written = write_report(report, tmp_path)
    for path in written.json, written.html:
        text = path.read_text(encoding="utf-8")
        assert key not in text and "plain-words" not in text and "me:pw" not in text
        assert "max_tokens" in text and "my key is ***" in text


# The page


def test_a_draft_that_holds_a_script_is_shown_and_not_run():
    page = Page(render_html(full_run(HOSTILE)))
    executable = [text for found, text in page.scripts if found.get("type") != "application/json"]
    assert len(executable) == 1 and "owned" not in executable[0]
    assert not page.handlers
    assert HOSTILE.split(" \u2028")[0] in page.text
    shown = [step[1] for row in page.data("traces")["rows"] for step in row["steps"] if step[0].startswith("Draft")]
    assert shown == [HOSTILE, HOSTILE]


def test_the_policy_allows_exactly_the_style_and_the_script_of_the_page():
    html = render_html(full_run(HOSTILE))
    script = next(text for found, text in Page(html).scripts if not found)
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    assert style is not None
    policy = Page(html).policy
    for name, text in (("script-src", script), ("style-src", style.group(1))):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{name} 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'") and " style=" not in html


def test_the_page_asks_the_network_for_nothing():
    page = Page(render_html(full_run()))
    assert all(address == "data:," or address.startswith("#") for address in page.addresses)


def test_every_link_of_the_page_leads_to_a_section():
    html = render_html(full_run())
    targets = set(re.findall(r'id="([^"]+)"', html))
    assert {address[1:] for address in Page(html).addresses if address.startswith("#")} <= targets


@pytest.mark.parametrize(
    "report",
    [
        run(),
        run(arm("strong", "!!")),
        run(arm("both", "")),
        run(arm("strong", "+-"), arm("both", "++"), before=None, after=None),
        dataclasses.replace(full_run(), pairs=None, curves=(), influence=(), traces=()),
        dataclasses.replace(full_run(), pairs=PairsSummary(0, 0), curves=(Curve("sft", (CurvePoint(1.0, 2.0),)),)),
    ],
    ids=["empty", "only failures", "no answers", "no tuning", "no feedback", "no pairs kept"],
)
def test_the_report_of_a_half_finished_run_renders(report, tmp_path):
    page = Page(write_report(report, tmp_path).html.read_text(encoding="utf-8"))
    assert "yet" in page.text
    print_report(report, Console(file=io.StringIO()))


def test_a_large_run_is_sampled_evenly_and_says_so():
    report = dataclasses.replace(full_run(), traces=tuple(trace(index) for index in range(500)))
    page = Page(render_html(report, max_rows=50))
    rows = page.data("traces")["rows"]
    assert len(rows) == 50 and rows[0]["steps"][0][1].startswith("t0,") and rows[-1]["steps"][0][1].startswith("t490,")
    assert "50 of 500 traces" in page.text


def test_a_very_long_text_is_cut_and_says_how_much_is_missing():
    html = render_html(full_run("x" * 100_000))
    assert "96,000 more characters in report.json" in html and len(html) < 200_000


@given(st.lists(st.integers(), max_size=50), st.integers(1, 60))
def test_an_even_sample_keeps_order_and_size(items, most):
    indexed = list(enumerate(items))
    found = evenly(indexed, most)
    assert found == sorted(found) and len(found) == min(most, len(items)) and set(found) <= set(indexed)


def test_filters_offer_only_what_would_show_something():
    page = Page(render_html(full_run()))
    effects = [name for name, _ in page.data("traces")["filters"][0]["options"]]
    assert effects == ["helped", "failed"]
    answers = dict(page.data("answers")["filters"][0]["options"])
    assert answers["fixed"] == "fixed by tuning (5)" and "broken" not in answers


def test_a_total_is_over_what_was_measured_and_an_unknown_price_stays_unknown():
    report = run(stages=(Stage("a", 1.5, calls=2), Stage("b", 2.0, calls=40), Stage("c", 0.5)))
    assert "total 4.0 42 - - - unknown -" in Page(render_html(report)).text


# Charts


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_ticks_ascend_and_span_the_data(low, span):
    ticks = nice_ticks(low, low + span)
    slack = 1e-6 * max(1.0, abs(low), span)
    assert ticks == sorted(set(ticks)) and len(ticks) >= 2
    assert ticks[0] <= low + slack and ticks[-1] >= low + span - slack


def test_a_line_chart_has_a_point_per_value_and_says_what_it_shows():
    chart = line_chart([(1.0, 0.7), (2.0, 0.5), (3.0, 0.1)], "step", "loss")
    points = re.search(r'points="([^"]+)"', chart)
    assert points is not None and len(points.group(1).split()) == 3
    assert 'aria-label="loss over step: from 0.7 to 0.1"' in chart
    assert not line_chart([(1.0, 0.7)], "step", "loss")


def test_a_line_chart_shows_held_out_rows_beside_those_of_the_training():
    training, held_out = [(1.0, 0.7), (2.0, 0.5)], [(0.0, 0.9), (1.0, 0.8), (2.0, 0.6)]
    chart = line_chart(training, "step", "loss", held_out=held_out)
    assert [len(points.split()) for points in re.findall(r'<polyline points="([^"]+)"', chart)] == [2, 3]
    assert 'aria-label="loss over step: from 0.7 to 0.5; loss, held out over step: from 0.9 to 0.6"' in chart
    assert "dashed: held out" in chart and chart.count('class="line held-out"') == 1
    # All points are inside the axes, also those at step 0.
    numbers = [float(x) for points in re.findall(r'points="([^"]+)"', chart) for x in re.findall(r"([\d.]+),", points)]
    assert min(numbers) == 52 and max(numbers) == 408
    alone = line_chart([], "step", "loss", held_out=held_out)
    assert "polyline" in alone and 'aria-label="loss, held out over step: from 0.9 to 0.6"' in alone


def test_a_page_shows_the_evaluations_of_a_training():
    history = [
        {"step": 0, "eval_loss": 0.69, "eval_rewards/margins": 0.0, "eval_rewards/accuracies": 0.5, "eval_kl": 0.0},
        {"step": 1, "loss": 0.69, "rewards/margins": 0.0, "rewards/accuracies": 0.5, "kl": 0.0},
        {"step": 2, "loss": 0.5, "rewards/margins": 0.4, "rewards/accuracies": 1.0, "kl": -0.25},
        {"step": 2, "eval_loss": 0.61, "eval_rewards/margins": 0.3, "eval_rewards/accuracies": 0.75, "eval_kl": -0.125},
    ]
    page = render_html(dataclasses.replace(full_run(), curves=(Curve.from_trl("dpo", history),)))
    assert "loss over step: from 0.69 to 0.5; loss, held out over step: from 0.69 to 0.61" in page
    assert "reward accuracy, held out over step: from 0.5 to 0.75" in page
    assert "log-ratio to the reference over step: from 0 to -0.25; log-ratio to the reference, held out over step" in page


def test_svg_elements_escape_what_they_are_given():
    assert tag("text", "<b>", class_='"x') == '<text class="&#34;x">&lt;b&gt;</text>'


# The terminal


def test_the_terminal_shows_the_verdict_first_and_no_colour_codes_where_it_is_piped():
    stream = io.StringIO()
    print_report(full_run("[bold]not markup[/bold]"), Console(file=stream, width=100))
    text = stream.getvalue()
    assert text.startswith("The both arm beats") or text.startswith("The both arm does NOT")
    assert "\x1b" not in text
    for words in ("helped", "dropped: no margin", "collect", "failed", "unknown", "one draft was truncated"):
        assert words in text


def test_the_terminal_fits_eighty_columns():
    stream = io.StringIO()
    print_report(full_run(), Console(file=stream, width=80))
    assert all(len(line) <= 80 for line in stream.getvalue().splitlines())
    assert "…" not in stream.getvalue()
