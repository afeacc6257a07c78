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
from report_runs import HOSTILE, full_run, gain, made_round, run, trace
from written_page import titles

from cowest_dspy.report import RunReport, write_report
from cowest_dspy.report.compare_view import write_comparison
from cowest_dspy.report.facts import Prompts


def long_run() -> RunReport:
    """A run with 50 traces more, all of round 2, some of which hurt, and texts without a place to
    break."""
    rows = tuple(
        dataclasses.replace(trace(index, (index % 5) / 4 or -1.0, f"draft {index}"), round=2)
        for index in range(10, 60)
    )
    made = full_run(HOSTILE + "x" * 300)
    known = [(0, "The valve holds 12 bar."), (1, "The valve holds 14 bar, they say.")]
    drafts = tuple(
        dataclasses.replace(row, draft=text, completion=text, requests={"draft": "a", "alone": "b"})
        for row, (_, text) in zip(made.traces, known, strict=False)
    )
    prompts = Prompts(
        (
            {"role": "system", "content": "Write what you know."},
            {"role": "user", "content": HOSTILE},
            {"role": "user", "content": "Why?"},
        ),
        {"a": (0, 1), "b": (2,)},
    )
    rounds = (
        made_round(1, 9, "accepted", "gain", gain(0.1, 0.02, 0.18)),
        made_round(2, 9, "rolled back", "no gain", gain(0.0, -0.1, 0.1)),
    )
    title = (
        "a title of an arm that goes on for longer than a phone is wide, and then some, "
        "without ever coming to the point"
    )
    arms = (*made.arms[:2], dataclasses.replace(made.arms[2], title=title, note="n" * 120))
    return dataclasses.replace(
        made,
        arms=arms,
        traces=(*drafts, *made.traces[2:], *rows),
        prompts=prompts,
        rounds=rounds,
        warnings=("w" * 200,),
    )


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


TRACES = "#traces-section"


def status(seen: Watched, name: str) -> str:
    return seen.page.inner_text(f"#{name} [role=status]")


def test_a_script_in_a_draft_is_shown_and_not_run(browser: Any, report: Path) -> None:
    with opened(browser, report, fragment=TRACES) as seen:
        seen.page.click("#traces button.open >> nth=2")
        assert HOSTILE.split("&")[0] in seen.page.inner_text("#traces tr.steps")
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
    with opened(browser, report, fragment=TRACES) as seen:
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
        seen.open_section("Answers")
        page.select_option("#answers select", "fixed")
        assert status(seen, "answers") == "1 to 5 of 5"


def test_pages_go_from_first_to_last_and_back(browser: Any, report: Path) -> None:
    with opened(browser, report, fragment=TRACES) as seen:
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


def shown_sections(seen: Watched) -> list[str]:
    return seen.page.evaluate(
        "[...document.querySelectorAll('main > section')].filter((one) => "
        "one.checkVisibility({contentVisibilityProperty: true}) && !one.hidden).map((one) => one.id)"
    )


def test_one_section_is_shown_at_a_time_and_its_address_opens_it(
    browser: Any, report: Path
) -> None:
    with opened(browser, report) as seen:
        page = seen.page
        assert shown_sections(seen) == ["arms"]
        assert page.evaluate("document.documentElement.scrollHeight") < 2000
        seen.open_section("Cost")
        assert shown_sections(seen) == ["stages"] and page.url.endswith("#stages")
        assert page.locator("nav [aria-current]").all_inner_texts() == ["Cost"]
        # The navigation sticks, and the section begins right below it.
        nav, section = (page.locator(one).bounding_box() for one in ("nav", "#stages"))
        assert nav["y"] == pytest.approx(0, abs=2)
        assert section["y"] == pytest.approx(nav["height"], abs=2)
        page.go_back()
        assert shown_sections(seen) == ["arms"]
        # The search of the browser finds what is not shown.
        page.evaluate("document.getElementById('pairs').dispatchEvent(new Event('beforematch'))")
        assert shown_sections(seen) == ["pairs"]
    for fragment, section in (("#curves", "curves"), ("#nothing", "arms"), ("#100%", "arms")):
        with opened(browser, report, fragment=fragment) as seen:
            assert shown_sections(seen) == [section]


def test_without_its_script_the_page_is_whole(browser: Any, report: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    try:
        page = context.new_page()
        page.goto(report.as_uri())
        for name in ("arms", "rounds", "stages", "settings"):
            assert page.is_visible(f"#{name} h2")
        assert "report.json holds the same traces" in page.inner_text("#traces")
    finally:
        context.close()


def test_a_trace_has_an_address(browser: Any, report: Path) -> None:
    with opened(browser, report, fragment="#trace-2/t30/0") as seen:
        page = seen.page
        assert shown_sections(seen) == ["traces-section"]
        assert status(seen, "traces") == "21 to 40 of 70"
        assert "t30, draft 0, round 2" in page.inner_text("#traces tr.steps")
        top = page.locator("#traces tr:has([aria-expanded=true])").bounding_box()["y"]
        assert 0 < top < 100
        page.select_option("#traces select >> nth=0", "hurt")
        page.click("#traces button.open >> nth=1")
        page.click("#traces tr.steps >> text=Link to this row")
        assert page.url.endswith("#trace-2/t10/0")
        # A filter that would hide it gives way.
        page.evaluate("location.hash = '#trace-1/t0/0'")
        page.wait_for_selector("#traces tr.steps >> text=t0, draft 0, round 1")
        assert status(seen, "traces") == "1 to 20 of 70"
    with opened(browser, report, fragment="#answer-q3/") as seen:
        assert shown_sections(seen) == ["answers-section"]
        assert "How much is 3?" in seen.page.inner_text("#answers tr.steps")


def test_the_drafts_of_an_example_stand_side_by_side(browser: Any, report: Path) -> None:
    with opened(browser, report, fragment="#trace-1/t0/0") as seen:
        cards = seen.page.locator("#traces .sides > div")
        assert cards.locator(".tag").all_inner_texts() == ["draft 0, +1.00", "draft 1, -1.00"]
        assert cards.locator(".text").all_inner_texts() == [
            "The valve holds 12 bar.",
            "The valve holds 14 bar, they say.",
        ]
        assert cards.locator("ins").all_inner_texts() == ["14", ",", "they", "say"]
        cards.get_by_role("link", name="draft 1").click()
        seen.page.wait_for_selector("#traces tr.steps >> text=t0, draft 1, round 1")
        assert cards.locator("ins").all_inner_texts() == ["12"]


def test_the_prompts_of_a_trace_are_those_that_were_sent(browser: Any, report: Path) -> None:
    with opened(browser, report, fragment="#trace-1/t0/0") as seen:
        prompts = seen.page.locator("#traces tr.steps details")
        assert prompts.locator("summary").all_inner_texts() == [
            "Prompt of the draft",
            "Prompt of the strong model alone",
        ]
        prompts.first.locator("summary").click()
        assert prompts.first.locator("dt").all_inner_texts() == ["system", "user"]
        assert prompts.first.locator("dd").all_inner_texts()[0] == "Write what you know."
        assert HOSTILE.split("&")[0] in prompts.first.inner_text()
        assert "With the prompts of 2 of 54 drafts" in seen.page.inner_text(TRACES)


@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["desktop", "phone"])
def test_a_list_is_sorted_by_any_column(browser: Any, report: Path, size: tuple[int, int]) -> None:
    with opened(browser, report, size, fragment=TRACES) as seen:
        page, head = seen.page, seen.page.get_by_role("columnheader", name="Influence")
        influences = page.locator("#traces td.result")
        as_in_the_run = influences.all_inner_texts()
        page.get_by_role("button", name="Influence").click()
        assert head.get_attribute("aria-sort") == "ascending"
        assert influences.all_inner_texts()[:10] == ["-1.00"] * 10
        page.get_by_role("button", name="Influence").click()
        assert head.get_attribute("aria-sort") == "descending"
        assert influences.all_inner_texts()[:10] == ["+1.00"] * 10
        page.get_by_role("button", name="Last").last.click()
        assert influences.all_inner_texts()[-1] == "failed"
        page.get_by_role("button", name="Influence").click()
        assert head.get_attribute("aria-sort") == "none"
        assert influences.all_inner_texts() == as_in_the_run


def test_the_rounds_can_be_read_on_a_phone(browser: Any, report: Path) -> None:
    with opened(browser, report, PHONE, fragment="#rounds") as seen:
        found = seen.page.evaluate(
            """() => [...document.querySelectorAll("#rounds td")].map((cell) =>
              [getComputedStyle(cell, "::before").content, cell.textContent, cell.getBoundingClientRect().right])"""
        )
        assert [row[:2] for row in found[:5]] == [
            ['"pairs"', "9"],
            ['"replayed"', "0"],
            ['"gain, dev split"', "+0.100 [+0.020, +0.180]"],
            ['"n"', "30"],
            ['"outcome"', "accepted"],
        ]
        assert all(right <= PHONE[0] for *_, right in found)
        assert seen.page.get_by_role("rowheader").first.inner_text() == "round 1"


def test_every_step_of_a_trace_can_be_read(browser: Any, report: Path) -> None:
    with opened(browser, report, fragment=TRACES) as seen:
        seen.page.fill("#traces input", "draft 25")
        seen.page.click("#traces button.open")
        shown = seen.page.locator("#traces tr.steps td > dl dt").all_inner_texts()
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
        seen.page.get_by_role("link", name="Traces", exact=True).focus()
        page.keyboard.press("Enter")
        page.focus("#traces button.open >> nth=0")
        page.keyboard.press("Enter")
        assert page.get_attribute("#traces button.open >> nth=0", "aria-expanded") == "true"
        assert page.is_visible("#traces tr.steps >> nth=0")
        page.keyboard.press("Space")
        assert page.get_attribute("#traces button.open >> nth=0", "aria-expanded") == "false"
        assert page.locator("#traces tr.steps").count() == 0
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
            for title in seen.page.locator("nav a").all_inner_texts():
                seen.open_section(title)
                if title == "Traces":
                    seen.page.click("#traces button.open >> nth=0")
                seen.page.evaluate(
                    "for (const one of document.querySelectorAll('details')) one.open = true"
                )
                assert seen.overflow() == []
                shown = seen.page.evaluate(
                    """() => [...document.querySelectorAll("section:not([hidden]) figure")].map((figure) =>
                      [...figure.querySelectorAll("svg")].filter((one) => one.getClientRects().length).length)"""
                )
                assert set(shown) <= {1}  # of each chart in two sizes, one


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
        assert len(shown_sections(seen)) == 1  # the attribute stays, and on paper it hides nothing:
        heights = seen.page.evaluate(
            "[...document.querySelectorAll('main > section')].map((one) => one.offsetHeight)"
        )
        assert len(heights) == 10 and min(heights) > 60
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
    with opened(browser, path, fragment=TRACES) as seen:
        assert status(seen, "traces") == "1 to 20 of 10,016"
        seen.page.fill("#traces input", "9999: valve")
        assert status(seen, "traces") == "1 to 1 of 1"
