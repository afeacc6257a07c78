"""Report and comparison in a real browser: nothing runs but our script, no network is asked,
everything can be used."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import PHONE, WIDE, Watched, chromium, opened
from compared import full
from report_runs import HOSTILE, full_run, run, trace
from written_page import titles

from cowest_dspy.report import RunReport, write_report
from cowest_dspy.report.compare_view import write_comparison


def long_run() -> RunReport:
    """A run with 50 traces more, all of round 2, some of which hurt, and texts without a place to
    break."""
    rows = tuple(
        dataclasses.replace(trace(index, (index % 5) / 4 or -1.0, f"draft {index}"), round=2)
        for index in range(10, 60)
    )
    made = full_run(HOSTILE + "x" * 300)
    title = (
        "a title of an arm that goes on for longer than a phone is wide, and then some, "
        "without ever coming to the point"
    )
    arms = (*made.arms[:2], dataclasses.replace(made.arms[2], title=title, note="n" * 120))
    return dataclasses.replace(made, arms=arms, traces=(*made.traces, *rows), warnings=("w" * 200,))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(long_run(), tmp_path_factory.mktemp("report")).html


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_comparison(full(HOSTILE), tmp_path_factory.mktemp("comparison")).html


def status(seen: Watched, name: str) -> str:
    return seen.page.inner_text(f"#{name} [role=status]")


def test_a_script_in_a_draft_is_shown_and_not_run(browser: Any, report: Path) -> None:
    with opened(browser, report) as seen:
        seen.page.click("#traces button.open >> nth=0")
        assert HOSTILE.split("&")[0] in seen.page.inner_text("#traces tr.steps:not([hidden])")
        assert seen.page.title() == "A run" and seen.page.locator("img").count() == 0
        assert (
            seen.page.evaluate("document.scripts.length") == 3
        )  # ours, and the two blocks of data


def test_the_policy_of_the_page_refuses_what_is_not_its_own(browser: Any, report: Path) -> None:
    with opened(browser, report) as seen:
        seen.page.evaluate(
            """() => {
              const one = document.createElement("script");
              one.textContent = "document.title = 'owned'";
              document.body.append(one);
            }"""
        )
        assert seen.page.title() == "A run"
        assert len(seen.faults) == 1 and "Content Security Policy" in seen.faults.pop()


def test_filters_and_search_narrow_and_come_back(browser: Any, report: Path) -> None:
    with opened(browser, report) as seen:
        page = seen.page
        assert status(seen, "traces") == "1 to 20 of 70"
        page.select_option("#traces select >> nth=0", "hurt")
        assert status(seen, "traces") == "1 to 11 of 11"
        assert set(page.locator("#traces td.result").all_inner_texts()) == {"-1.00"}
        page.select_option("#traces select >> nth=1", "round 1")
        assert status(seen, "traces") == "1 to 1 of 1"
        page.select_option("#traces select >> nth=1", "round 2")
        page.fill("#traces input", "draft 25")
        assert status(seen, "traces") == "1 to 1 of 1"
        page.fill("#traces input", "")
        page.select_option("#traces select >> nth=0", "")
        assert status(seen, "traces") == "1 to 20 of 52"
        page.select_option("#traces select >> nth=1", "")
        page.select_option("#traces select >> nth=2", "The sft arm")
        assert status(seen, "traces") == "1 to 8 of 8"
        page.select_option("#answers select", "fixed")
        assert status(seen, "answers") == "1 to 5 of 5"


def test_pages_go_from_first_to_last_and_back(browser: Any, report: Path) -> None:
    with opened(browser, report) as seen:
        buttons = {
            name: seen.page.get_by_role("button", name=name).last
            for name in ("First", "Previous", "Next", "Last")
        }
        assert not buttons["First"].is_enabled() and not buttons["Previous"].is_enabled()
        for name, text in (
            ("Next", "21 to 40 of 70"),
            ("Last", "61 to 70 of 70"),
            ("Previous", "41 to 60 of 70"),
            ("First", "1 to 20 of 70"),
        ):
            buttons[name].click()
            assert status(seen, "traces") == text


def test_every_step_of_a_trace_can_be_read(browser: Any, report: Path) -> None:
    with opened(browser, report) as seen:
        seen.page.fill("#traces input", "draft 25")
        seen.page.click("#traces button.open")
        shown = seen.page.locator("#traces tr.steps:not([hidden]) dt").all_inner_texts()
        assert shown == [
            "Example",
            "Input",
            "Expected",
            "Draft",
            "Alone (score 0)",
            "With draft (score 1)",
            "Influence",
            "Models",
        ]


def test_a_keyboard_is_enough(browser: Any, report: Path) -> None:
    with opened(browser, report) as seen:
        page = seen.page
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to the results"
        page.keyboard.press("Enter")
        assert page.evaluate("location.hash") == "#main"
        page.focus("#traces button.open >> nth=0")
        page.keyboard.press("Enter")
        assert page.get_attribute("#traces button.open >> nth=0", "aria-expanded") == "true"
        assert page.is_visible("#traces tr.steps >> nth=0")
        page.keyboard.press("Space")
        assert page.get_attribute("#traces button.open >> nth=0", "aria-expanded") == "false"
        # Whatever can be clicked or scrolled can be reached.
        assert page.evaluate(
            "[...document.querySelectorAll('.wide, summary, a, button, input, "
            "select')].every((one) => one.tabIndex === 0)"
        )
        page.keyboard.press("Tab")
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_a_screen_reader_has_names_for_everything(
    browser: Any, report: Path, comparison: Path
) -> None:
    for path in (report, comparison):
        with opened(browser, path) as seen:
            nameless = seen.page.evaluate(
                """() => [...document.querySelectorAll("svg, input, select, button, [role=region], nav, table[role]")].filter(
                  (node) =>
                  !(node.getAttribute("aria-label") || (node.labels && node.labels.length) || node.textContent.trim())).length"""
            )
            assert nameless == 0
            heads = seen.page.evaluate(
                "[...document.querySelectorAll('h1,h2,h3')].map((one) => one.tagName)"
            )
            levels = [int(name[1]) for name in heads]
            assert (
                levels[0] == 1
                and levels.count(1) == 1
                and all(b - a <= 1 for a, b in itertools.pairwise(levels))
            )
            assert seen.page.get_attribute("html", "lang") == "en"
            assert seen.page.locator("main").count() == 1


@pytest.mark.parametrize("size", [WIDE, PHONE, (320, 640)], ids=["desktop", "phone", "small phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_sticks_out_at_any_width(
    browser: Any, report: Path, comparison: Path, size: tuple[int, int], scheme: str
) -> None:
    for path in (report, comparison):
        with opened(browser, path, size, scheme) as seen:
            if path is report:
                seen.page.click("#traces button.open >> nth=0")
            seen.page.evaluate(
                "for (const one of document.querySelectorAll('details')) one.open = true"
            )
            assert seen.overflow() == []
            shown = seen.page.evaluate(
                "[...document.querySelectorAll('svg.rows')].filter((one) => "
                "one.getClientRects().length).length"
            )
            assert shown >= 2  # of each chart in two sizes, one


def test_an_unfinished_report_opens_too(browser: Any, tmp_path: Path) -> None:
    with opened(browser, write_report(run(), tmp_path).html) as seen:
        assert "cowest evaluate" in seen.page.inner_text("#arms") and seen.overflow() == []


def test_light_and_dark_are_the_readers(browser: Any, report: Path) -> None:
    found = {}
    for scheme in ("light", "dark"):
        with opened(browser, report, scheme=scheme) as seen:
            script = "(name) => getComputedStyle(document.querySelector(name))"
            found[scheme] = (
                seen.page.evaluate(f"({script})('body').backgroundColor"),
                seen.page.evaluate(f"({script})('svg.rows path[fill=\"var(--accent)\"]').fill"),
            )
    assert found["light"][0] == "rgb(251, 250, 248)" and found["dark"][0] == "rgb(20, 23, 27)"
    assert found["light"][1] == "rgb(36, 86, 184)" and found["dark"][1] == "rgb(126, 166, 244)"


def test_a_drawn_bar_has_the_number_of_report_json(browser: Any, report: Path) -> None:
    lines = json.loads((report.parent / "report.json").read_text(encoding="utf-8"))["numbers"][
        "arms"
    ]
    assert titles(report.read_text(encoding="utf-8"))
    for size in (WIDE, PHONE):
        with opened(browser, report, size) as seen:
            bars = seen.page.evaluate(
                """() => [...document.querySelectorAll("#arms svg")].flatMap((chart) => {
                  if (!chart.getClientRects().length) return [];
                  const grid = [...chart.querySelectorAll(".role-axis-grid line")].map((one) => one.getBoundingClientRect().x);
                  const plot = Math.max(...grid) - Math.min(...grid);
                  return [...chart.querySelectorAll(".mark-rect path")].map((bar) =>
                    [bar.querySelector("title").textContent, bar.getBoundingClientRect().width / plot]);
                })"""
            )
            assert [share for _, share in bars] == [
                pytest.approx(line["score"], abs=0.01) for line in lines
            ]
            assert all(
                told.startswith(line["title"]) for (told, _), line in zip(bars, lines, strict=True)
            )


def test_it_prints_in_ink_on_paper_with_everything_unfolded(browser: Any, report: Path) -> None:
    with opened(browser, report, scheme="dark") as seen:
        seen.page.emulate_media(media="print", color_scheme="dark")
        assert seen.page.evaluate("getComputedStyle(document.body).color") == "rgb(28, 33, 40)"
        assert not seen.page.is_visible("nav") and not seen.page.is_visible("#traces .tools")
        seen.page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
        assert seen.page.locator("details:not([open])").count() == 0
        seen.page.evaluate("window.dispatchEvent(new Event('afterprint'))")
        assert seen.page.locator("details:not([open])").count() > 0
        assert seen.page.pdf().startswith(b"%PDF")


@pytest.mark.slow
def test_ten_thousand_traces_are_all_there_and_the_page_stays_under_ten_megabytes(
    browser: Any, tmp_path: Path
) -> None:
    text = (
        "a draft of about as many words as a small model writes when it is asked what it knows "
        "about a valve, a pump and a seal. "
    )
    rows = tuple(
        dataclasses.replace(
            trace(index // 4, 1.0 if index % 3 else 0.0, f"{index}: {text * 3}"),
            draft_index=index % 4,
        )
        for index in range(10_000)
    )
    points = tuple({"step": float(step), "loss": 1 / (step + 1)} for step in range(3000))
    made = dataclasses.replace(full_run(), traces=rows, curves={"dpo": points})
    path = write_report(made, tmp_path).html
    assert path.stat().st_size < 10_000_000
    with opened(browser, path) as seen:
        assert status(seen, "traces") == "1 to 20 of 10,016"
        seen.page.fill("#traces input", "9999: valve")
        assert status(seen, "traces") == "1 to 1 of 1"
