"""The charts of a report: drawn by Vega-Lite, they show the numbers of report.json, every text of
them, and nothing that runs."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_runs import HOSTILE, arm, draft, full_run, gain, made_round, run
from written_page import svgs, titles

from cowest_dspy.influence import NoiseFloor
from cowest_dspy.optimizers.cycle import StepResult
from cowest_dspy.report import (
    RunReport,
    charts,
    drawing,
    render_html,
    write_report,
)
from cowest_dspy.report.charts import (
    Axis,
    Chart,
    ChartRow,
    bars,
    histogram,
    lines,
    points,
    reach,
    shares,
)
from cowest_dspy.report.figures import bins
from cowest_dspy.report.run_view import run_view

ROWS = [
    ChartRow("one", 0.25, "one: 25 %", 0.1, 0.4, "accent", "25 %"),
    ChartRow(
        "a title that goes on beyond the room that it has beside its bar",
        0.75,
        "two: 75 %",
        text="75 %",
    ),
    ChartRow("none", None, "none: no answers"),
]


def whole_run() -> RunReport:
    """The run that has every part, with graded influences, rounds, steps and a noise floor."""
    graded = tuple(
        draft(f"t{i}", 0, round(-1 + i / 10, 2), None, i / 20, 1 + i % 2) for i in range(21)
    )
    return dataclasses.replace(
        full_run(),
        traces=graded,
        noise=NoiseFloor(20, 2, 0.1, 0.01),
        rounds=(
            made_round(1, 9, "accepted", "gain", gain(0.1, 0.02, 0.18)),
            made_round(2, 9, "rolled back", "no gain", gain(0.0, -0.1, 0.1)),
        ),
        steps=(
            StepResult(0, "start", "small", 0.5, 30, 0, False),
            StepResult(1, "weights", "small", 0.6, 30, 0, True, gain(0.1, 0.02, 0.18)),
        ),
    )


def drawn_texts(chart: str) -> list[str]:
    return ["".join(node.itertext()) for one in svgs(chart) for node in one.iter("text")]


def test_the_charts_show_the_numbers_of_report_json(tmp_path: Path) -> None:
    written = write_report(whole_run(), tmp_path)
    numbers = json.loads(written.json.read_text(encoding="utf-8"))["numbers"]
    said = titles(written.html.read_text(encoding="utf-8"))
    for line in numbers["arms"]:
        low, high = line["interval"]["low"], line["interval"]["high"]
        told = (
            f"{line['title']}: {100 * line['score']:.1f} %, 95 % {100 * low:.1f} to "
            f"{100 * high:.1f}, {line['correct']} of"
        )
        assert sum(title.startswith(told) for title in said) == 2, (
            "once for a wide page, once for a phone"
        )
    for number, counts in numbers["influence"].items():
        total = sum(counts[kind] for kind in ("helped", "same", "hurt", "failed"))
        for kind in ("helped", "same", "hurt", "failed"):
            assert said.count(f"round {number}: {counts[kind]} of {total} {kind}") == (
                2 if counts[kind] else 0
            )
        assert (
            said.count(
                f"round {number}: mean influence {counts['mean']:+.3f} " + span(counts["interval"])
            )
            == 2
        )
        for one in numbers["distribution"][number]:
            assert (
                f"influence {one['low']:+.2f} to {one['high']:+.2f}: {one['count']} drafts" in said
            )
        assert (
            sum(one["count"] for one in numbers["distribution"][number]) == total - counts["failed"]
        )
    for title, counts in numbers["by_draft"].items():
        total = sum(counts[kind] for kind in ("helped", "same", "hurt", "failed"))
        assert f"{title}: {counts['helped']} of {total} helped" in said or not counts["helped"]
    assert "before and after tuning: 5 of 7 fixed" in said and numbers["tuning"]["higher"] == 5
    assert (
        "collect: 12.5 seconds" in said
        and "loss 0.0875 at step 8" in said
        and "round 2: +0.000 [-0.100, +0.100]" in said
    )


def span(interval: dict[str, float]) -> str:
    return f"[{interval['low']:+.3f}, {interval['high']:+.3f}]"


def test_every_specification_fits_the_schema_that_vega_lite_publishes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alt: Any = pytest.importorskip("altair")
    seen: list[dict[str, Any]] = []
    real = charts.draw

    def recorded(specification: dict[str, Any], label: str, kind: str = "") -> Any:
        seen.append({"config": drawing.CONFIG, **specification})
        return real(specification, label, kind)

    monkeypatch.setattr(charts, "draw", recorded)
    render_html(whole_run())
    assert len(seen) > 20
    for specification in seen:
        alt.Chart.from_dict(specification)  # raises where it does not fit


def test_a_bar_is_as_long_as_its_value() -> None:
    wide, narrow = svgs(bars(ROWS, "Scores"))
    for chart, plot in ((wide, 570), (narrow, 339)):
        # A bar is drawn as M0,yh<width>v18...
        widths = [
            float(found)
            for path in chart.iter("path")
            for found in re.findall(r"^M0,[\d.]+h([\d.]+)v", path.get("d", ""))
        ]
        assert widths == [pytest.approx(plot * 0.25, abs=0.1), pytest.approx(plot * 0.75, abs=0.1)]


def test_a_chart_is_an_image_with_a_name_and_shows_every_row_and_its_words() -> None:
    both = bars(ROWS, 'Scores of "all" arms')
    assert [chart.get("role") for chart in svgs(both)] == ["img", "img"]
    assert [chart.get("aria-label") for chart in svgs(both)] == ['Scores of "all" arms'] * 2
    assert [chart.get("class") for chart in svgs(both)] == [
        "chart rows at-wide",
        "chart rows at-narrow",
    ]
    texts = drawn_texts(both)
    for words in ("one", "25 %", "none", "100 %"):
        assert texts.count(words) == 2
    assert (
        bars([], "nothing")
        == points([], "nothing", Axis(0, 1, (), "''"))
        == shares([], "nothing")
        == ""
    )


def test_colours_are_those_of_the_page_so_that_light_and_dark_are_its_own() -> None:
    html = render_html(whole_run())
    colours = {
        node.get(name)
        for chart in svgs(html)
        for node in chart.iter()
        for name in ("fill", "stroke")
        if node.get(name)
    }
    assert colours - {"none"} and all(
        colour and re.fullmatch(r"var\(--[a-z-]+\)", colour) for colour in colours - {"none"}
    )


def test_a_drawing_has_no_style_no_script_no_address_and_no_id_of_another() -> None:
    html = render_html(full_run(HOSTILE))
    ids = [node.get("id") for chart in svgs(html) for node in chart.iter() if node.get("id")]
    assert len(ids) == len(set(ids))
    for chart in svgs(html):
        for node in chart.iter():
            assert node.tag in {
                "svg",
                "g",
                "path",
                "line",
                "rect",
                "text",
                "tspan",
                "title",
                "defs",
                "clipPath",
            }, node.tag
            assert not {"style", "href", "onclick"} & set(node.attrib) and not any(
                name.startswith("on") for name in node.attrib
            )


@given(st.text(max_size=60))
@settings(max_examples=25)
def test_any_title_is_drawn_as_text(title: str) -> None:
    chart = bars([ChartRow(title, 0.5, f"said: {title}")], title)
    for one in svgs(chart):  # it parses
        assert one.get("role") == "img" and [found.tag for found in one.iter("script")] == []
    said = titles(chart)
    assert len(said) == 2 and said[0].startswith("said:")


def test_the_same_rows_give_the_same_bytes() -> None:
    first = bars(ROWS, "Scores")
    drawing._drawn.cache_clear()
    assert bars(ROWS, "Scores") == first


def test_lines_have_a_point_per_value_and_say_what_they_show() -> None:
    chart = lines([(1.0, 0.7), (2.0, 0.5)], [(0.0, 0.9), (1.0, 0.8), (2.0, 0.6)], "step", "loss")
    assert (
        'aria-label="loss over step: from 0.7 to 0.5; loss, held out over step: from 0.9 to 0.6"'
        in chart
    )
    assert titles(chart)[:2] == [
        "loss 0.7 at step 1",
        "loss 0.5 at step 2",
    ] and "loss, held out 0.6 at step 2" in titles(chart)
    assert chart.count('stroke-dasharray="5,4"') == 2  # for a wide page and for a narrow one
    assert not lines([(1.0, 0.7)], [], "step", "loss")
    assert 'aria-label="loss, held out over step: from 0.9 to 0.8"' in lines(
        [], [(0.0, 0.9), (1.0, 0.8)], "step", "loss"
    )


def test_a_long_training_is_drawn_in_part_and_to_its_end() -> None:
    chart = lines([(float(step), 1 / (step + 1)) for step in range(5000)], [], "step", "loss")
    path = max((node.get("d", "") for node in svgs(chart)[0].iter("path")), key=len)
    assert (
        390 <= len(re.findall("[ML]", path)) <= 402
        and titles(chart) == ["loss 0.0002 at step 4999"] * 2
    )


@given(st.lists(st.floats(-1, 1), max_size=80), st.integers(1, 31))
def test_bins_hold_every_value_once_and_lie_beside_each_other(
    values: list[float], count: int
) -> None:
    found = bins(values, count)
    assert sum(one.count for one in found) == len(values) and len(found) == count
    assert (
        found[0].low == -1
        and found[-1].high == 1
        and all(a.high == b.low for a, b in itertools.pairwise(found))
    )


def test_the_middle_of_a_histogram_is_the_colour_of_what_changed_nothing() -> None:
    chart = histogram(
        [(one.low, one.high, one.count) for one in bins([-1.0, -0.5, 0.0, 0.01, 0.5])], "h"
    )
    assert chart.count(
        'fill="var(--same)"'
    ) == 2 and "influence -0.05 to +0.05: 2 drafts" in titles(chart)


@given(st.lists(st.floats(-1, 1), max_size=5))
def test_an_axis_reaches_beyond_all_values(values: list[float]) -> None:
    assert (
        max((abs(value) for value in values), default=0) <= reach(values) + 1e-6
        and reach(values) >= 0.1
    )


def test_nothing_is_drawn_of_what_is_not_there() -> None:
    for report in (
        run(),
        run(arm("strong", "!!")),
        dataclasses.replace(run(), curves={"sft": ({"step": 1.0, "loss": 2.0},)}),
    ):
        drawn = {one.name for one in run_view(report).sections if any(map(_drawn, one.charts()))}
        assert drawn <= {"arms"}


def _drawn(chart: Chart) -> bool:
    return bool(chart.drawing)
