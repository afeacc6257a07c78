"""The report's files, page, charts and tables: they show what they are given, whole, escaped, and
nothing secret."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_runs import HOSTILE, arm, full_run, pair, run, trace
from rich.console import Console
from written_page import Page

from cowest_dspy.errors import ReportError
from cowest_dspy.report import (
    PairsSummary,
    Stage,
    print_report,
    read_report,
    render_html,
    run_page,
    training_curve,
    write_report,
)
from cowest_dspy.report.facts import Prompts
from cowest_dspy.report.numbers import sample_evenly
from cowest_dspy.report.page import data_block

# Files


def test_both_files_are_written_whole_and_read_back(tmp_path):
    written = write_report(full_run(), tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "report.html",
        "report.json",
    ]
    again = read_report(tmp_path / "run")
    assert again == read_report(written.json)
    assert again.arms == full_run().arms


def test_the_numbers_in_the_json_are_those_of_the_page(tmp_path):
    written = write_report(full_run(), tmp_path)
    numbers = json.loads(written.json.read_text(encoding="utf-8"))["numbers"]
    page = Page(written.html.read_text(encoding="utf-8"))
    for line in numbers["arms"]:
        assert f"{line['title']} " in page.text and f"{100 * line['score']:.1f} %" in page.text
    for sentence in numbers["verdict"]["sentences"]:
        assert sentence in page.text
    assert numbers["tuning"]["higher"] == 5 and "Fixed : 4 of 5" in page.text
    assert [counts["helped"] for counts in numbers["influence"].values()] == [1, 0] and numbers[
        "totals"
    ]["calls"] == 9


def test_the_same_report_gives_the_same_bytes(tmp_path):
    one, two = write_report(full_run(), tmp_path / "a"), write_report(full_run(), tmp_path / "b")
    assert (
        one.json.read_bytes() == two.json.read_bytes()
        and one.html.read_bytes() == two.html.read_bytes()
    )


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
        full_run(f"my key is {key}"),
        warnings=(f"401 for Bearer {key}",),
        versions={"tokens": "max_tokens"},
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
    shown = [
        text
        for index in range(2)
        for label, text in page.row("traces", index)
        if label.startswith("Draft")
    ]
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


def test_the_date_is_for_people_and_for_machines():
    html = render_html(full_run())
    assert '<time datetime="2025-01-01T00:00:00Z">1 January 2025, 00:00 UTC</time> · seed 0' in html


def test_a_page_that_hides_inputs_has_no_prompts():
    prompts = Prompts(({"role": "user", "content": "a secret"},), {"a": (0,)})
    rows = (dataclasses.replace(trace(0), requests={"draft": "a"}),)
    shown = dataclasses.replace(full_run(), traces=rows, prompts=prompts)
    hiding = dataclasses.replace(shown, config={"report": {"hide": ["question"]}})
    assert "a secret" in render_html(shown) and "a secret" not in render_html(hiding)


def test_stages_are_named_for_people():
    stages = (Stage("dpo 2", 3.0, title="Preference tuning, round 2"),)
    curve = ({"step": 1.0, "loss": 2.0}, {"step": 2.0, "loss": 1.0})
    html = render_html(run(stages=stages, curves={"dpo 2": curve}))
    assert html.count("Preference tuning, round 2") >= 5 and "dpo 2" not in Page(html).text


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
        dataclasses.replace(full_run(), pairs=None, curves={}, traces=()),
        dataclasses.replace(
            full_run(), pairs=PairsSummary(0, 0), curves={"sft": ({"step": 1.0, "loss": 2.0},)}
        ),
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
    # 500 drafts, and behind them those of the 16 held-out answers that had one.
    assert len(page.data("traces")["rows"]) == 50 and page.row("traces")[0][1].startswith("t0,")
    assert page.row("traces", 47)[0][1].startswith("t485,") and page.row("traces", 49)[0][
        1
    ].startswith("q5,")
    assert "50 of 516 traces" in page.text


def test_a_very_long_text_is_cut_and_says_how_much_is_missing():
    html = render_html(full_run("x" * 100_000))
    assert "96,000 more characters in report.json" in html and len(html) < 200_000


def test_a_page_stays_small_however_long_the_texts_are(monkeypatch):
    monkeypatch.setattr(run_page, "MAX_BYTES", 200_000)
    report = dataclasses.replace(
        full_run(), traces=tuple(trace(index, text=f"{index} " * 400) for index in range(300))
    )
    html = render_html(report)
    rows = len(Page(html).data("traces")["rows"])
    assert 60 < rows < 300 and f"{rows} of 316 traces" in Page(html).text and len(html) < 400_000


def test_a_held_out_draft_is_a_trace_beside_what_the_strong_model_answered_alone():
    rows = [dict(Page(render_html(full_run())).row("traces", index)) for index in range(20)]
    found = next(
        row for row in rows if row["Example"].startswith("q1,") and "The both arm" in row["Example"]
    )
    assert (
        found["Influence"] == "+1.00, helped"
        and "Alone (score 0)" in found
        and "With draft (score 1)" in found
    )
    failed = next(
        row for row in rows if row["Example"].startswith("q2,") and "The both arm" in row["Example"]
    )
    assert failed["Error"] == "timeout: 60 s" and "Influence" not in failed


def test_every_text_stands_in_the_page_once():
    long = "a rather long question that four drafts have in common"
    rows = tuple(
        dataclasses.replace(trace(0), draft_index=index, inputs={"question": long})
        for index in range(4)
    )
    assert render_html(dataclasses.replace(full_run(), traces=rows, pairs=None)).count(long) == 1


@given(
    st.recursive(
        st.none() | st.booleans() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_no_text_of_a_data_block_ends_it_and_all_of_it_comes_back(value):
    block = str(data_block(value))
    assert not set(block) & set("<>&") and json.loads(block) == value


@given(st.lists(st.integers(), max_size=50), st.integers(1, 60))
def test_an_even_sample_keeps_order_and_size(items, most):
    indexed = list(enumerate(items))
    found = sample_evenly(indexed, most)
    assert (
        found == sorted(found)
        and len(found) == min(most, len(items))
        and set(found) <= set(indexed)
    )


def test_filters_offer_only_what_would_show_something():
    page = Page(render_html(full_run()))
    effects, rounds, arms = (dict(one["options"]) for one in page.data("traces")["filters"])
    assert effects == {
        "helped": "helped (7)",
        "hurt": "hurt (1)",
        "same": "same (8)",
        "failed": "failed (4)",
    }
    assert rounds == {
        "round 1": "round 1, training (2)",
        "round 2": "round 2, training (2)",
    }
    assert arms == {
        "The sft arm": "The sft arm, held out (8)",
        "The both arm": "The both arm, held out (8)",
    }
    answers = dict(page.data("answers")["filters"][0]["options"])
    assert answers["fixed"] == "fixed by tuning (5)" and "broken" not in answers


def test_a_pair_shows_which_words_its_drafts_do_not_share():
    row = pair("t0", "why?", "The valve <b> holds 12 bar.", "The valve <b> holds 14 bar.", None)
    html = render_html(dataclasses.replace(full_run(), pairs=PairsSummary(1, 1, {}, (row,))))
    assert (
        "The valve &lt;b&gt; holds <ins>12</ins> bar." in html
        and "The valve &lt;b&gt; holds <del>14</del> bar." in html
    )


def test_a_page_shows_the_evaluations_of_a_training():
    history = [
        {
            "step": 0,
            "eval_loss": 0.69,
            "eval_rewards/margins": 0.0,
            "eval_rewards/accuracies": 0.5,
            "eval_kl": 0.0,
        },
        {"step": 1, "loss": 0.69, "rewards/margins": 0.0, "rewards/accuracies": 0.5, "kl": 0.0},
        {"step": 2, "loss": 0.5, "rewards/margins": 0.4, "rewards/accuracies": 1.0, "kl": -0.25},
        {
            "step": 2,
            "eval_loss": 0.61,
            "eval_rewards/margins": 0.3,
            "eval_rewards/accuracies": 0.75,
            "eval_kl": -0.125,
        },
    ]
    page = render_html(dataclasses.replace(full_run(), curves={"dpo": training_curve(history)}))
    assert "loss over step: from 0.69 to 0.5; loss, held out over step: from 0.69 to 0.61" in page
    assert "reward accuracy, held out over step: from 0.5 to 0.75" in page
    assert (
        "log-ratio to the reference over step: from 0 to -0.25; log-ratio to the reference, held "
        "out over step"
    ) in page
    assert (
        "2 0.5 - 0.4 - 1 - -0.25 -" in Page(page).text
        and "2 - 0.61 - 0.3 - 0.75 - -0.125" in Page(page).text
    )


def test_a_total_is_over_what_was_measured_and_an_unknown_price_stays_unknown():
    report = run(stages=(Stage("a", 1.5, calls=2), Stage("b", 2.0, calls=40), Stage("c", 0.5)))
    assert "total 4.0 42 - - - unknown -" in Page(render_html(report)).text


# The terminal


def test_the_terminal_shows_the_verdict_first_and_no_colour_codes_where_it_is_piped():
    stream = io.StringIO()
    print_report(full_run("[bold]not markup[/bold]"), Console(file=stream, width=100))
    text = stream.getvalue()
    assert text.startswith("The both arm beats") or text.startswith("The both arm does NOT")
    assert "\x1b" not in text
    for words in (
        "helped",
        "dropped: no margin",
        "collect",
        "failed",
        "unknown",
        "one draft was truncated",
    ):
        assert words in text


def test_the_terminal_fits_eighty_columns():
    stream = io.StringIO()
    print_report(full_run(), Console(file=stream, width=80))
    assert all(len(line) <= 80 for line in stream.getvalue().splitlines())
    assert "…" not in stream.getvalue()
