"""What a stage looks like while it runs, in a terminal, in lines and as JSON; and what is reckoned
for it."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from live_task import worked
from rich.cells import cell_len
from rich.console import Console

from cowest_dspy import Store
from cowest_dspy.cli.console import printing_above
from cowest_dspy.cli.progress import Progress, format_ended, run_costs, view
from cowest_dspy.optimizers.run import NoProgress, RunContext
from cowest_dspy.store.budget import Limit
from cowest_dspy.store.journal import Event, Journal, OpenStage, Rate
from cowest_dspy.store.progress import Best, Snapshot, StageState
from cowest_dspy.store.usage import Usage

NOW = Snapshot(
    state="running",
    updated="2026-01-01T00:00:00.000+00:00",
    pid=1,
    host="here",
    process_started=0.0,
    run="runs/x",
    now=(
        StageState("2 weights", "Step 2: weights", 400.0),
        StageState(
            "collect",
            "Collecting drafts and their influence",
            83.0,
            done=120,
            total=500,
            left=263.0,
        ),
    ),
    calls=610,
    calls_kept=700,
    cached=40,
    calls_per_second=7.34,
    tokens=123_456,
    usd=0.0123,
    failures={"parse": 1, "timeout": 2},
    limits=(
        Limit("strong calls", 96, 100),
        Limit("tokens", 123_456),
        Limit("USD", 0.0123, 1.0),
        Limit("minutes", 3.2),
    ),
    best=Best("round 2", 0.8125, 40),
)


def screen(width: int = 120, *, terminal: bool = True) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(
        file=out,
        force_terminal=terminal,
        width=width,
        height=40,
        color_system=None,
        highlight=False,
    ), out


def lines_of(what: Any, width: int) -> list[str]:
    console, out = screen(width, terminal=False)
    console.print(what)
    return out.getvalue().splitlines()


# What is reckoned


def stage_at(*seen: tuple[float, int], total: int) -> StageState:
    """A stage that was so far at these moments."""
    moments = iter([moment for moment, _ in seen] + [seen[-1][0]])
    stage = OpenStage("collect", "Collecting", 0.0, lambda: next(moments))
    for _, done in seen:
        stage.at(done, total)
    stage.clock = lambda: seen[-1][0]
    return stage.now()


@pytest.mark.parametrize(("seconds", "left"), [(2, 12.0), (45, 270.0), (300, 1800.0)])
def test_the_time_left_is_that_of_the_steps_left_also_of_slow_ones(
    seconds: float, left: float
) -> None:
    now = stage_at(*((done * seconds, done) for done in range(5)), total=10)
    assert now.left == pytest.approx(left)


@given(st.floats(0.01, 100), st.integers(2, 50), st.integers(0, 1000))
def test_a_steady_pace_leaves_what_it_takes(each: float, done: int, more: int) -> None:
    now = stage_at(*((step * each, step) for step in range(done + 1)), total=done + more)
    assert now.left == pytest.approx(more * each, rel=1e-6)


def test_what_the_store_had_is_forgotten_when_the_pace_has_changed() -> None:
    read = [(step * 0.001, step) for step in range(500)]
    asked = [(0.5 + 2.0 * step, 499 + step) for step in range(1, 40)]
    assert stage_at(*read, *asked, total=1000).left == pytest.approx(2.0 * (1000 - 538), rel=0.01)


def test_nothing_is_said_of_a_stage_that_has_not_advanced_and_a_restart_begins_anew() -> None:
    assert stage_at((0, 7), total=10).left is None
    assert stage_at((0, 7), (5, 7), total=10).left is None
    assert stage_at((0, 7), (1, 0), (2, 1), total=10).left == pytest.approx(9)


@given(st.integers(0, 500), st.floats(0.1, 1.0))
def test_calls_per_second_are_those_of_the_last_seconds(burst: int, every: float) -> None:
    rate, now, count = Rate(10.0), 0.0, burst
    rate.see(now, 0)
    rate.see(now + every, burst)
    while now < 30.0:
        now += every
        count += 3
        rate.see(now + every, count)
    assert rate.per_second() == pytest.approx(3 / every, rel=0.01)


# What is drawn


def test_a_view_says_all_there_is() -> None:
    text = "\n".join(lines_of(view(NOW, "Stopping"), 160))
    for part in ("Step 2: weights", "Collecting drafts", "120/500", "1:23", "left 4:23", "7.3 calls/s", "610 calls",
                 "40 from the store", "123,456 tokens", "USD 0.012", "failed 3: timeout 2, parse 1", ("strong calls " "96 " "of " "100"),
                 "USD 0.0123 of 1.0", "0.812 (round 2, n 40)", "Stopping"):  # fmt: skip
        assert part in " ".join(text.split())
    assert "tokens 123,456" not in text, "what is not limited is no part of the budget's line"


@given(
    st.integers(24, 200),
    st.text(max_size=60),
    st.dictionaries(st.sampled_from(["parse", "timeout", "server"]), st.integers(1, 10**6)),
)
def test_no_line_is_wider_than_the_terminal(
    width: int, title: str, failures: dict[str, int]
) -> None:
    stage = replace(NOW.now[1], title=title)
    now = replace(NOW, now=(NOW.now[0], stage), failures=failures, best=None, limits=())
    assert max(cell_len(line) for line in lines_of(view(now), width)) <= width


def test_a_stage_of_which_nothing_is_known_is_a_bar_without_an_end() -> None:
    text = "\n".join(
        lines_of(view(replace(NOW, now=(StageState("1 prompts", "Step 1: prompts", 5.0),))), 100)
    )
    assert (
        "Step 1: prompts" in text
        and "5.0 s" in text
        and "left" not in text
        and "/" not in text.splitlines()[0]
    )


def test_the_line_that_stays_of_a_stage_leaves_out_what_is_nothing() -> None:
    assert str(format_ended(StageState("x", "Tuning", 75.0))) == "done    Tuning  1:15"
    whole = StageState("x", "Asking", 4.0, 1200, 3, 10, 20, None, {"server": 1}, whole=False)
    assert str(format_ended(whole)) == (
        "left    Asking  4.0 s, 1,200 calls, 3 from the store, 30 tokens, USD unknown, failed "
        "1: server 1"
    )


def test_a_terminal_keeps_a_line_of_each_stage_and_what_was_said_between(tmp_path: Path) -> None:
    console, out = screen()
    with pytest.warns(UserWarning, match="beware"):
        worked(Progress(screen=console), tmp_path)
    text = out.getvalue()
    assert "a line [bold]as it is[/bold]" in text
    inner, outer = text.index("done    Collecting"), text.index("done    Step 1: weights")
    assert inner < outer and "failed 1: parse 1" in text
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l"), "the cursor is shown again"


def test_a_stage_that_fails_leaves_its_line_and_the_terminal_as_it_was(tmp_path: Path) -> None:
    console, out = screen()
    with Store(tmp_path) as store:
        stages = RunContext(store, Progress(screen=console))

        def fail() -> None:
            with stages.stage("collect", "Collecting") as progress:
                progress(3, 8)
                raise RuntimeError("broken")

        with pytest.raises(RuntimeError, match="broken"):
            fail()
    assert "left    Collecting" in out.getvalue()
    last = store.journal.snapshot()
    assert (last.stages[0].done, last.stages[0].total, last.stages[0].whole) == (3, 8, False)


def test_without_a_terminal_a_stage_is_a_few_plain_lines(tmp_path: Path) -> None:
    console, out = screen(40, terminal=False)
    with pytest.warns(UserWarning, match="beware"):
        worked(Progress(screen=console), tmp_path)
    said = out.getvalue().splitlines()
    assert said[:3] == ["Step 1: weights ...", "Collecting ...", "a line [bold]as it is[/bold]"]
    assert said[3].startswith("Collecting: done in ") and said[3].endswith("failed 1: parse 1")
    assert said[4].startswith("Step 1: weights: done in ")


def test_plain_lines_say_each_quarter_of_a_stage_once() -> None:
    console, out = screen(40, terminal=False)
    progress = Progress("plain", screen=console)
    progress.update("stage_begin", replace(NOW, now=(replace(NOW.now[1], done=0),)))
    for done in (1, 100, 125, 130, 300, 499, 500, 500):
        progress.update("progress", replace(NOW, now=(replace(NOW.now[1], done=done),)))
    title = NOW.now[1].title
    assert out.getvalue().splitlines() == [
        f"{title} ...",
        *(f"{title}: {done} of 500" for done in (125, 300, 499, 500)),
    ]


def test_bars_are_drawn_where_the_terminal_can(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Progress(screen=screen()[0]).draws
    assert not Progress(screen=screen(terminal=False)[0]).draws
    assert not Progress("plain", screen=screen()[0]).draws
    monkeypatch.setenv("TERM", "dumb")
    assert not Progress(screen=screen()[0]).draws, "a dumb terminal cannot draw a line again"


class Events(NoProgress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.seen: list[tuple[Event, str]] = []

    def update(self, event: Event, snapshot: Snapshot) -> None:
        stage = snapshot.stages[-1] if event == "stage_end" else snapshot.stage
        assert stage is not None
        self.seen.append((event, snapshot.said[-1] if event == "message" else stage.title))


def test_a_progress_of_ones_own_is_told_each_event_once_and_of_parts_whose_they_are(
    tmp_path: Path,
) -> None:
    events = Events()
    with Store(tmp_path) as store, store.journal.listening(events.update):
        stages = RunContext(store.within("seed-1"), events)
        with stages.stage("collect", "Collecting"):
            stages.say("x")
        assert events.seen == [
            ("stage_begin", "seed-1: Collecting"),
            ("message", "seed-1: x"),
            ("stage_end", "seed-1: Collecting"),
        ]
        assert store.journal.snapshot().stages[0].title == "seed-1: Collecting"


class Screen(io.StringIO):
    """A terminal that keeps what it is sent."""

    def isatty(self) -> bool:
        return True


def printed(write: Callable[[TextIO], None]) -> list[str]:
    """What of this is seen while something is drawn."""
    screen_ = Screen()
    console = Console(file=screen_, force_terminal=True, width=80, color_system=None)
    with redirect_stdout(screen_), redirect_stderr(screen_), printing_above(console):
        write(sys.stdout)
    return screen_.getvalue().splitlines()


def test_bars_of_libraries_are_left_out_and_lines_are_whole() -> None:
    from tqdm import tqdm

    def write(stream: TextIO) -> None:
        for _ in tqdm(range(3), file=stream, mininterval=0):
            pass
        for _ in tqdm(iter(range(3)), file=stream, mininterval=0):
            pass
        stream.write("half a ")
        stream.flush()
        stream.write("line\n\nover\rwritten\n[bold]plain[/bold] \x1b[31mred\x1b[0m\nno end")

    assert printed(write) == ["half a line", "", "written", "[bold]plain[/bold] red", "no end"]


@given(st.lists(st.text("ab \n", max_size=9), max_size=9))
def test_whatever_is_printed_in_whatever_pieces_comes_out(pieces: list[str]) -> None:
    text = "".join(pieces)
    seen = printed(lambda stream: cast("Any", stream).writelines(pieces))
    whole, _, rest = text.rpartition("\n")
    wanted = (whole.split("\n") if "\n" in text else []) + ([rest] if rest.strip() else [])
    assert seen == wanted


def test_what_goes_elsewhere_is_none_of_the_terminals() -> None:
    out, screen_ = io.StringIO(), Screen()
    console = Console(file=screen_, force_terminal=True, width=80, color_system=None)
    with redirect_stdout(out), redirect_stderr(screen_), printing_above(console):
        print("to a file")
        print("to the terminal", file=sys.stderr)
    assert out.getvalue() == "to a file\n" and screen_.getvalue() == "to the terminal\n"


# The state


@given(
    st.builds(
        Snapshot,
        state=st.sampled_from(["running", "finished", "stopped", "failed"]),
        updated=st.text(),
        pid=st.integers(),
        host=st.text(),
        process_started=st.floats(allow_nan=False),
        stages=st.lists(
            st.builds(StageState, st.text(), st.text(), st.floats(0, 1e6)), max_size=3
        ).map(tuple),
        now=st.lists(
            st.builds(StageState, st.text(), st.text(), st.floats(0, 1e6)), max_size=3
        ).map(tuple),
        limits=st.lists(
            st.builds(Limit, st.text(), st.none() | st.integers(-(2**53), 2**53)), max_size=2
        ).map(tuple),
        best=st.none() | st.builds(Best, st.text(), st.floats(0, 1), st.integers()),
    )
)
def test_a_state_comes_back_from_json_as_it_was(now: Snapshot) -> None:
    again = json.loads(json.dumps(now.to_dict()))
    assert Snapshot.from_dict(again) == now
    assert Snapshot.from_dict({**again, "of a newer version": 1}) == now


def test_the_best_score_is_the_highest_mean_of_what_was_answered(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.scored("start", [0.0, 1.0, None])
    journal.scored("worse", [0.0, 0.0])
    journal.scored("nothing", [None])
    assert journal.snapshot().best == Best("start", 0.5, 2)
    journal.scored("round 1", [1.0, 1.0, 0.0])
    assert journal.snapshot().best == Best("round 1", pytest.approx(2 / 3), 3)  # pyright: ignore[reportArgumentType]
    journal.close()


def test_what_was_spent_is_said_of_the_whole_run_and_of_this_session(tmp_path: Path) -> None:
    journal = Journal(tmp_path, kept=10, usd=0.5)
    journal.add(Usage(calls=1, tokens_in=3, tokens_out=4, usd=0.25))
    now = journal.snapshot()
    assert (now.calls, now.calls_kept, now.tokens, now.usd) == (1, 11, 7, 0.75)
    journal.add(Usage(calls=1, tokens_in=3, tokens_out=4, usd=None))
    assert journal.snapshot().usd is None and run_costs(journal.snapshot())[-1] == "USD unknown"
    journal.close()


def test_usage_of_answers_adds_up() -> None:
    answers = [{"input_tokens": 5, "output_tokens": 1, "usd": usd} for usd in (0.1, 0.2)]
    used = Usage.of_answer(answers[0]) + Usage.of_answer(answers[1])
    assert (used.calls, used.tokens_in, used.tokens_out) == (2, 10, 2)
    assert used.usd == pytest.approx(0.3) and (used + Usage(calls=1, usd=None)).usd is None


def test_a_folder_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    journal = Journal(folder)
    (folder / "progress.json").unlink()
    folder.rmdir()
    with journal.stage("collect", "Collecting") as here:
        here.at(1, 2)
    assert journal.close().state == "finished"
