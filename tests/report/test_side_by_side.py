"""cowest report RUN RUN ...: numbers of each run, what differs, and a test only where the same
examples were asked."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from report_runs import HOSTILE, arm, full_run, gain, made_round, run
from typer.testing import CliRunner
from written_page import titles

from cowest_dspy.cli.main import app
from cowest_dspy.errors import CowestError, ReportError
from cowest_dspy.experiment.summary import read_run
from cowest_dspy.report import RunReport, compare_scores, write_report
from cowest_dspy.report.runs_view import (
    render_side_by_side,
    short_names,
    side_by_side,
    write_side_by_side,
)
from cowest_dspy.report.significance import holm
from cowest_dspy.store.store import Store

marks = st.text(alphabet="+-!", min_size=4, max_size=24)


def other_questions(report: RunReport) -> RunReport:
    """The same ids, but other questions under them."""
    arms = tuple(
        dataclasses.replace(
            one,
            answers=tuple(
                dataclasses.replace(a, inputs={"question": "another"}) for a in one.answers
            ),
        )
        for one in report.arms
    )
    return dataclasses.replace(report, arms=arms)


def test_runs_of_the_same_examples_are_tested_on_the_arm_that_they_are_about() -> None:
    one, two = run(arm("both", "+" * 10 + "-" * 30)), run(arm("both", "+" * 30 + "-" * 10))
    view = side_by_side({"a": one, "b": two})
    (test,) = view.tests
    expected = compare_scores(two.arms[0].scores(), one.arms[0].scores())
    assert test.test is not None and (test.shared, test.test.n, test.test.p, test.holm) == (
        40,
        40,
        expected.p,
        expected.p,
    )
    assert test.test.difference == pytest.approx(0.5) and test.finding == 1
    assert view.sentences[0].startswith("b is better than a (The both arm): +50.0 [")
    (back,) = side_by_side({"b": two, "a": one}).tests
    assert (
        back.finding == -1 and back.test is not None and back.test.difference == pytest.approx(-0.5)
    )


@settings(max_examples=30)
@given(st.lists(marks, min_size=2, max_size=4))
def test_law_a_test_is_the_paired_one_on_shared_examples_corrected_over_all(
    runs: list[str],
) -> None:
    reports = {str(place): run(arm("both", one)) for place, one in enumerate(runs)}
    view = side_by_side(reports)
    assert len(view.tests) == len(runs) * (len(runs) - 1) // 2
    alone = []
    for test in view.tests:
        first, second = (reports[name].arms[0].scores() for name in (test.first, test.second))
        shared = first.keys() & second.keys()
        exact = compare_scores({k: second[k] for k in shared}, {k: first[k] for k in shared})
        if not exact.n:
            assert test.test is None and "no test example" in test.why
            continue
        assert test.test is not None
        assert (test.shared, test.test.n, test.test.difference) == (
            len(shared),
            exact.n,
            exact.difference,
        )
        alone.append(test.test.p)
        assert test.finding is None or (test.finding != 0) <= (
            test.holm is not None and test.holm < 0.05
        )
    assert [test.holm for test in view.tests if test.test] == holm(alone)


def test_runs_of_different_examples_say_that_they_are_not_comparable() -> None:
    one = run(arm("both", "++--"))
    view = side_by_side({"a": one, "b": other_questions(one), "c": run(arm("sft", "++"))})
    assert [test.test for test in view.tests] == [None, None, None]
    assert "no test example in common" in view.sentences[0]
    assert "c has not evaluated that arm yet" in view.sentences[1]


def test_runs_that_are_scored_differently_are_not_compared() -> None:
    one, two = (
        run(arm("both", "++--"), config={"metric": f"/x/{name}.py:{name}"})
        for name in ("exact", "loose")
    )
    assert (
        "different metrics, exact.py:exact and loose.py:loose"
        in side_by_side({"a": one, "b": two}).sentences[0]
    )
    moved = dataclasses.replace(one, config={"metric": "/elsewhere/exact.py:exact"})
    assert side_by_side({"a": one, "b": moved}).tests[0].test is not None


def test_only_differing_keys_are_shown_and_secrets_are_masked() -> None:
    strong = {"model": "m", "api_key": "plain-words"}
    configs: list[dict[str, Any]] = [
        {"dpo": {"beta": 0.1}, "seed": 0, "strong": strong},
        {
            "dpo": {"beta": 0.5, "num_train_epochs": 2},
            "seed": 0,
            "strong": {**strong, "api_key": "other-words"},
        },
    ]
    view = side_by_side(
        {name: run(config=config) for name, config in zip("ab", configs, strict=True)}
    )
    assert view.settings == {"dpo.beta": ("0.1", "0.5"), "dpo.num_train_epochs": ("-", "2")}
    assert "words" not in json.dumps(view.to_json()) + render_side_by_side(view)


def test_each_run_has_its_numbers() -> None:
    rounds = (made_round(1, 12, "accepted", "it helped", gain(0.1, 0.05, 0.2, 8)),)
    config = {"weak": {"model": "/models/small"}, "strong": {"model": "big", "dtype": "int8"}}
    one = dataclasses.replace(full_run(), rounds=rounds, config=config)
    (column, _) = side_by_side({"a": one, "b": run()}).runs
    totals = column.numbers.totals
    assert (totals.calls, totals.cached_calls, totals.seconds) == (9, 3, 15.5)
    assert (totals.tokens_in, totals.tokens_out) == (100, 50)
    assert totals.usd is None, "the price of these calls is not known"
    assert column.models == {"weak": "small", "strong": "big (int8)"}
    assert column.rounds == ("1: accepted, gain +0.100 [+0.050, +0.200], 12 pairs",)
    tuning = column.numbers.tuning
    assert tuning is not None and (tuning.higher, tuning.lower) == (5, 0)
    cell = column.arm("strong")
    assert (
        cell is not None
        and (cell.answered, cell.failed, cell.score) == (7, 1, pytest.approx(1 / 7))
        and cell.interval is not None
    )


class Page(HTMLParser):
    """Tags, attributes that name an address, and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.asked, self.text = set[str](), list[str](), ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.asked += [
            value or ""
            for name, value in attrs
            if name in ("src", "href", "style") or name.startswith("on")
        ]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("text", ["plain", HOSTILE])
def test_the_page_is_self_contained_and_escapes_every_text(text: str) -> None:
    hostile = dataclasses.replace(
        full_run(text), title=text, warnings=(text,), config={text: text}, versions={text: text}
    )
    page = render_side_by_side(side_by_side({text: hostile, "b": full_run()}))
    seen = Page(page)
    assert not seen.tags & {"script", "img", "iframe", "object", "form"}
    assert all(one == "data:," or one.startswith("#") for one in seen.asked)
    assert "@import" not in page and "url(" not in page
    assert text in seen.text, "it is shown"
    said = titles(page)
    assert len(said) == 12 and all(", 95 % " in one for one in said), (
        "a bar with its interval for each arm of each run, wide and narrow"
    )


def test_files_are_written_together_and_nothing_else_is_overwritten(tmp_path: Path) -> None:
    view = side_by_side({"a": full_run(), "b": run()})
    written = write_side_by_side(view, tmp_path / "new")
    assert written.html == tmp_path / "new/side_by_side.html"
    document = json.loads(written.json.read_text(encoding="utf-8"))
    assert document["schema_version"] == 3 and [one["name"] for one in document["runs"]] == [
        "a",
        "b",
    ]
    assert write_side_by_side(view, tmp_path / "new") == written, "its own file it replaces"
    report = write_report(full_run(), tmp_path / "run")
    before = report.json.read_text(encoding="utf-8")
    with pytest.raises(ReportError, match=r"no side-by-side page.*--out"):
        write_side_by_side(view, tmp_path / "run" / "report.html")
    assert report.json.read_text(encoding="utf-8") == before


def test_names_are_short_and_different(tmp_path: Path) -> None:
    assert short_names([Path("runs/a/x"), Path("runs/b/x"), Path("y")]) == ["a/x", "b/x", "y"]
    assert short_names([Path("runs/a/report.json"), Path("runs/b")]) == ["a", "b"]
    with pytest.raises(ReportError, match="named twice"):
        short_names([tmp_path / "a", tmp_path / "b" / ".." / "a"])


RECIPE = (
    toy.RECIPE
    + """
def rows(split, seed=0):
    return [{"id": f"{split}{n}", "question": f"{split} {n}?", "answer": "yes"} for n in range(6)]

def program():
    return Collaboration("question -> answer", draft="knowledge")

def weak():
    return ScriptedEngine(lambda request: "a note")

def strong():
    return ScriptedEngine(lambda request: "yes" if "2?" in request["messages"][-1]["content"] else "no")
"""
)


@pytest.fixture
def ran(tmp_path: Path) -> Callable[..., Path]:
    """A function that makes a run of a toy task, with one arm evaluated."""
    (tmp_path / "toy.py").write_text(RECIPE)
    (tmp_path / "toy.toml").write_text(
        toy.TASK + "[collect]\ndrafts = 2\n" + toy.engine("weak") + toy.engine("strong")
    )

    def make(name: str, *more: str) -> Path:
        folder = tmp_path / "runs" / name
        cowest(
            "evaluate", str(tmp_path / "toy.toml"), "--run", str(folder), "--arm", "strong", *more
        )
        return folder

    return make


def cowest(*words: str) -> str:
    """The output of a verb that must succeed."""
    done = CliRunner().invoke(app, [*words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_the_verb_shows_runs_side_by_side_and_changes_none(
    ran: Callable[..., Path], tmp_path: Path
) -> None:
    one, two = ran("one"), ran("two", "--seed", "3")
    before = {
        file: file.read_bytes()
        for run in (one, two)
        for file in run.iterdir()
        if file.suffix in (".json", ".html", ".toml")
    }
    said = cowest("report", str(one), str(two))
    assert "strong alone" in said and "seed" in said and "side by side:" in said
    assert (tmp_path / "runs/side_by_side.html").is_file(), "by default where the runs are"
    assert all(file.read_bytes() == content for file, content in before.items())
    document = json.loads(
        cowest("report", str(one), str(two), "--json", "--out", str(tmp_path / "both.html"))
    )
    assert document["settings"]["seed"] == ["0", "3"] and (tmp_path / "both.html").is_file()


def test_one_run_by_its_folder_gives_the_report_that_its_files_give(
    ran: Callable[..., Path], tmp_path: Path
) -> None:
    one = ran("one")
    named = cowest("report", str(tmp_path / "toy.toml"), "--run", str(one))
    facts = {
        key: value
        for key, value in json.loads((one / "report.json").read_text()).items()
        if key != "created"
    }
    (one / "report.json").unlink()
    assert cowest("report", str(one)).replace("\n", "") == named.replace("\n", "")
    again = {
        key: value
        for key, value in json.loads((one / "report.json").read_text()).items()
        if key != "created"
    }
    assert again == facts
    cowest("report", str(one), "--out", str(tmp_path / "elsewhere"))
    assert (tmp_path / "elsewhere/report.html").is_file()


def test_a_missing_or_damaged_run_is_named_and_nothing_is_written(
    ran: Callable[..., Path], tmp_path: Path
) -> None:
    one, two = ran("one"), ran("two")
    empty = tmp_path / "runs" / "empty"
    empty.mkdir()
    (two / "run.sqlite").write_bytes(b"SQLite format 3\0" + b"nonsense" * 900)
    for path, words in (
        (tmp_path / "runs/none", "There is no run at"),
        (empty, "is no run's folder"),
        (two, "cannot be read"),
    ):
        with pytest.raises(CowestError, match=words) as caught:
            CliRunner().invoke(app, ["report", str(one), str(path)], catch_exceptions=False)
        assert str(path) in str(caught.value)
    assert "--repair" in str(caught.value)
    assert (
        not (tmp_path / "runs/side_by_side.html").exists() and not (tmp_path / "runs/none").exists()
    )
    assert (two / "run.sqlite").read_bytes().startswith(b"SQLite format 3\0nonsense")


def test_a_run_that_is_being_worked_on_is_read_from_its_report(ran: Callable[..., Path]) -> None:
    one = ran("one")
    with Store(one):
        assert "being worked on" in read_run(one).warnings[-1]
        (one / "report.json").unlink()
        with pytest.raises(ReportError, match="in use by another process"):
            read_run(one)


def test_a_report_alone_is_enough(ran: Callable[..., Path], tmp_path: Path) -> None:
    one = ran("one")
    (tmp_path / "kept").mkdir()
    shutil.copy(one / "report.json", tmp_path / "kept")
    assert (
        read_run(tmp_path / "kept").arms == read_run(one).arms == read_run(one / "report.json").arms
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a", "toy.toml"], "both were given"),
        (["a", "b", "--seed", "3"], "--run, --seed and --set go with TOML files"),
        (["a", "--out", "x.html"], "give a folder"),
    ],
)
def test_what_does_not_go_together_is_said(words: list[str], said: str) -> None:
    with pytest.raises(ReportError, match=re.escape(said)):
        CliRunner().invoke(app, ["report", *words], catch_exceptions=False)
