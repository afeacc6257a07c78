"""collect and Influence.report as a DSPy user calls them: rows of any kind, settings as a
dictionary, a bar while it works."""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path
from typing import Any

import dspy
import pytest
from scripted import match, questions, strong_that_reads, together, weak_that_varies
from scripted_weak import weak_by_seed

from cowest_dspy import Influence, Sampling, Store, collect
from cowest_dspy.errors import ConfigError
from cowest_dspy.influence import noise_floor
from cowest_dspy.program.examples import prepare_examples

ROWS = [{"question": f"Question number {n}?", "answer": str(n)} for n in range(6)]


def test_rows_without_ids_are_collected_as_examples_that_have_them(tmp_path: Path) -> None:
    from datasets import Dataset

    weak, strong = weak_by_seed(), strong_that_reads()
    program = together(weak, strong)
    wanted = collect(program, prepare_examples(ROWS, program), match)
    assert len(wanted) == 24 and len({trace.example_id for trace in wanted}) == 6
    assert {trace.influence for trace in wanted} == {0.0, 1.0}
    with Store(tmp_path / "run") as store:
        assert collect(program, ROWS, match, store=store) == wanted
        calls = store.calls()
        for given in (Dataset.from_list(ROWS), [dspy.Example(**row) for row in ROWS]):
            assert collect(program, given, match, store=store) == wanted
        assert store.calls() == calls, "they are the same examples, so nothing is asked again"


def test_a_report_and_the_noise_floor_take_rows_too() -> None:
    weak, strong = weak_that_varies(["{n}"]), strong_that_reads()
    program = together(weak, strong)
    report = Influence(match, program).report(ROWS)
    assert report.values == (1.0,) * 6
    sampling = program.bind(strong=strong.lm(temperature=1.0))
    floor = noise_floor(sampling, ROWS, match, {"seed": 3})
    assert floor is not None and floor.n == 6


def test_a_run_of_examples_with_ids_is_not_touched(tmp_path: Path) -> None:
    """What was kept under an id is found under it, whatever the kind of the row."""
    program = together(weak_by_seed(), strong_that_reads())
    rows: list[dict[str, Any]] = [one.toDict() for one in questions(4)]
    with Store(tmp_path / "run") as store:
        first = list(collect(program, questions(4), match, store=store))
        calls, keys = store.calls(), set(store.records("trace"))
        assert list(collect(program, rows, match, store=store)) == first
        assert (store.calls(), set(store.records("trace"))) == (calls, keys)
    assert {trace.example_id for trace in first} == {"q0", "q1", "q2", "q3"}


def test_the_same_row_twice_is_two_examples() -> None:
    weak, strong = weak_by_seed(), strong_that_reads()
    traces = collect(together(weak, strong), [ROWS[1], ROWS[1]], match, {"drafts": 2})
    one, other = dict.fromkeys(trace.example_id for trace in traces)
    assert other == f"{one}-2" and len(traces) == 4


# Settings as a dictionary


def test_sampling_may_be_a_dictionary() -> None:
    program = together(weak_by_seed(), strong_that_reads())
    made = collect(program, questions(3), match, {"drafts": 3, "seed": 5})
    assert made == collect(program, questions(3), match, Sampling(3, seed=5))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"draft": 4}, 'sampling, fields of Sampling: there is no "draft". Did you mean "drafts"?'),
        ({"drafts": 0}, r"sampling, .*: drafts: .*greater than or equal to 1 \(given: 0\)"),
        ({"temperature": "hot"}, "sampling, .*: temperature: .*valid number"),
        ({"drafts": 0, "top_p": 2.0}, "drafts: .*; top_p: "),
        (4, r"sampling is a int; expected Sampling\(...\) or a dict of its fields"),
    ],
)
def test_settings_that_cannot_be_name_the_argument_before_anything_is_asked(
    given: Any, says: str
) -> None:
    weak, strong = weak_by_seed(), strong_that_reads()
    with pytest.raises(ConfigError, match=says):
        collect(together(weak, strong), questions(3), match, sampling=given)
    assert weak.asked == strong.asked == []


def test_a_budget_may_be_a_dictionary(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'budget, .*there is no "dollars"'):
        Store(tmp_path / "run", budget={"dollars": 1})
    assert not (tmp_path / "run").exists()
    with Store(tmp_path / "run", budget={"tokens": 10}) as store:
        assert store.guard is not None and store.guard.budget.tokens == 10


# A bar


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def shown(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch, **options: Any) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    collect(together(weak_by_seed(), strong_that_reads()), questions(3), match, **options)
    return stream.getvalue()


def test_a_bar_is_shown_where_somebody_may_look(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(Terminal(), monkeypatch)
    assert "Collecting drafts" in text and "3/3" in text
    assert shown(io.StringIO(), monkeypatch) == ""


def test_a_bar_is_shown_or_not_as_the_caller_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "3/3" in shown(io.StringIO(), monkeypatch, display_progress=True)
    assert shown(Terminal(), monkeypatch, display_progress=False) == ""


def test_a_report_shows_a_bar_too(monkeypatch: pytest.MonkeyPatch) -> None:
    program = together(weak_that_varies(["{n}"]), strong_that_reads())
    for display, count in ((True, "6/6"), (None, "6/6"), (False, "")):
        monkeypatch.setattr(sys, "stderr", Terminal())
        Influence(match, program).report(ROWS, display_progress=display)
        assert count in sys.stderr.getvalue() and bool(sys.stderr.getvalue()) == bool(count)  # pyright: ignore[reportAttributeAccessIssue]


def test_who_shows_the_progress_gets_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    done = {"on_progress": lambda *at: seen.append(at)}
    assert shown(Terminal(), monkeypatch, **done) == ""
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert "3/3" in shown(Terminal(), monkeypatch, **done, display_progress=True)
    assert len(seen) == 6


def test_a_notebook_counts_as_somebody_who_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shell:
        kernel = object()

    class IPython:
        get_ipython = staticmethod(Shell)

    monkeypatch.setitem(sys.modules, "IPython", IPython)  # pyright: ignore[reportArgumentType]
    assert "3/3" in shown(io.StringIO(), monkeypatch)


def test_drafts_that_are_cut_off_are_counted_and_not_logged_one_by_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    program = together(weak_that_varies(["a draft that goes on and on..."]), strong_that_reads())
    # DSPy's loggers do not pass records on to the root's handlers; the command line quiets them.
    caplog.set_level(logging.WARNING, "dspy.clients.lm")
    logging.getLogger("dspy.clients.lm").addHandler(caplog.handler)
    try:
        traces = collect(program, ROWS, match, max_errors=1.0)
        assert not caplog.records
        program(question="Question number 1?")
        assert any("truncated" in one.getMessage() for one in caplog.records)
    finally:
        logging.getLogger("dspy.clients.lm").removeHandler(caplog.handler)
    assert all((trace.error or "").startswith("truncated") for trace in traces)


def test_a_report_of_nothing_but_failures_says_what_to_do() -> None:
    weak, strong = weak_that_varies(["a draft that goes on and on..."]), strong_that_reads()
    report = Influence(match, together(weak, strong)).report(ROWS)
    assert str(report).startswith("no influence: 6 drafts failed (truncated 6): raise max_tokens")
