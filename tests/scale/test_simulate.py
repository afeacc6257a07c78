"""The simulation of a run obeys the laws of queues, and the page says what it found."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import settings as rules
from hypothesis import strategies as st

pytest.importorskip("simpy", reason="make test-all installs SimPy")

import simulate as command
import simulate_page
from simulation import RESOURCES, Load, Times, simulate

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

PLAIN = Load(examples=40, drafts=0)
TIMES = st.builds(
    Times,
    call=st.floats(0, 0.01),
    keep=st.floats(0, 0.01),
    sync=st.floats(0, 0.01),
    weak=st.floats(0, 0.5),
    strong=st.floats(0.01, 0.5),
    spread=st.sampled_from([0.0, 0.5, 1.0]),
)
LOADS = st.builds(
    Load,
    examples=st.integers(1, 40),
    drafts=st.integers(0, 4),
    strong_slots=st.integers(1, 16),
    weak_slots=st.integers(1, 16),
    limit=st.one_of(st.none(), st.floats(0.5, 100)),
    drivers=st.integers(1, 3),
)


def test_one_slot_and_nothing_else_takes_the_sum_of_all_times() -> None:
    assert simulate(PLAIN, Times(strong=0.3)).seconds == pytest.approx(40 * 0.3)
    assert simulate(
        PLAIN, Times(call=0.1, keep=0.2, sync=0.3, strong=0.4)
    ).seconds == pytest.approx(40 * 1.0)


@pytest.mark.parametrize("slots", [2, 5, 8])
def test_slots_share_the_work(slots: int) -> None:
    made = simulate(replace(PLAIN, strong_slots=slots), Times(strong=0.3))
    assert made.seconds == pytest.approx(40 * 0.3 / slots) and made.busy["strong"] == pytest.approx(
        1
    )


def test_an_example_costs_its_drafts_their_refinements_and_one_alone() -> None:
    load = Load(examples=10, drafts=4, strong_slots=1, weak_slots=1)
    assert load.calls == 90
    assert simulate(load, Times(strong=1.0)).seconds == pytest.approx(50)
    assert simulate(replace(load, strong_slots=100), Times(weak=1.0)).seconds == pytest.approx(40)


@given(load=LOADS, times=TIMES, seed=st.integers(0, 5))
@rules(max_examples=60)
def test_nothing_is_faster_than_its_slots_its_limit_and_its_driver_allow(
    load: Load, times: Times, seed: int
) -> None:
    made = simulate(load, times, seed)
    strong, weak = load.examples * (load.drafts + 1), load.examples * load.drafts
    least = [
        weak * times.weak / load.weak_slots,
        load.calls * (times.call + times.keep) / load.drivers if load.drivers == 1 else 0.0,
        (strong - 1) / load.limit if load.limit else 0.0,
        strong * times.strong / load.strong_slots if not times.spread else 0.0,
    ]
    assert made.seconds >= max(least) * (1 - 1e-9)
    assert set(made.busy) == set(RESOURCES) and all(0 <= part <= 1 for part in made.busy.values())
    assert made.commits <= load.calls and (made.commits > 0) == (times.sync > 0)
    assert made.bottleneck in RESOURCES


@given(load=LOADS, times=TIMES, seed=st.integers(0, 5))
@rules(max_examples=20)
def test_the_same_seed_gives_the_same_and_more_slots_never_hurt_where_times_are_equal(
    load: Load, times: Times, seed: int
) -> None:
    assert simulate(load, times, seed) == simulate(load, times, seed)
    alone = replace(load, drafts=0, drivers=1, limit=None)
    even = Times(strong=times.strong)
    more = simulate(replace(alone, strong_slots=alone.strong_slots + 1), even)
    assert more.seconds <= simulate(alone, even).seconds * (1 + 1e-9)


def test_another_seed_is_another_run() -> None:
    times = Times(strong=0.3, spread=1.0)
    assert simulate(PLAIN, times, 1) != simulate(PLAIN, times, 2)


@given(load=LOADS, times=TIMES)
@rules(max_examples=30)
def test_calls_inside_are_their_rate_times_their_stay(load: Load, times: Times) -> None:
    """Little's law, of the slots: those that are taken on average are the rate times the mean stay
    in one."""
    made = simulate(replace(load, examples=4, strong_slots=3), times)
    stay = made.inside - made.waited
    taken = made.strong_rate * stay
    assert taken <= 3 * (1 + 1e-9)
    if (
        made.busy["strong"] and 4 * (2 * load.drafts + 1) < 100
    ):  # Few calls: busy is of the whole run, as the rate is.
        assert taken == pytest.approx(3 * made.busy["strong"], rel=1e-6)


def waiting(servers: int, arrivals: float, spread: float, count: int = 40_000) -> float:
    """Mean seconds before a slot, of calls that come at random, each of which takes a second on
    average."""
    load = Load(examples=count, drafts=0, strong_slots=servers, arrivals=arrivals)
    return simulate(load, Times(strong=1.0, spread=spread), seed=3).waited


def erlang_c(servers: int, load: float) -> float:
    """The probability that one who comes has to wait (Erlang, 1917)."""
    terms = [load**k / math.factorial(k) for k in range(servers)]
    last = load**servers / math.factorial(servers) * servers / (servers - load)
    return last / (sum(terms) + last)


@pytest.mark.parametrize("busy", [0.5, 0.8])
def test_one_server_of_constant_time_waits_as_pollaczek_and_khinchine_say(busy: float) -> None:
    assert waiting(1, busy, 0.0) == pytest.approx(busy / (2 * (1 - busy)), rel=0.1)


@pytest.mark.parametrize(("servers", "busy"), [(1, 0.5), (2, 0.7), (8, 0.8)])
def test_several_servers_of_exponential_times_wait_as_erlang_says(
    servers: int, busy: float
) -> None:
    load = servers * busy
    assert waiting(servers, load, 1.0) == pytest.approx(
        erlang_c(servers, load) / (servers - load), rel=0.12
    )


def test_spread_is_that_of_the_answers_times() -> None:
    """One server, times of any kind: the mean wait has the factor (1 + spread squared) / 2
    (Pollaczek, Khinchine)."""
    assert waiting(1, 0.6, 0.5) == pytest.approx(0.6 / 0.4 * (1 + 0.25) / 2, rel=0.12)


def test_a_rate_limit_is_kept_and_is_what_gives_way() -> None:
    made = simulate(Load(examples=400, drafts=0, strong_slots=50, limit=20.0), Times(strong=1.0))
    assert made.strong_rate <= 20.0 and made.rate == pytest.approx(20.0, rel=0.02)
    assert (made.bottleneck, made.busy["limit"]) == ("limit", pytest.approx(1.0, abs=0.02))


def test_several_drivers_do_as_much_more_until_something_else_is_full() -> None:
    times = Times(call=0.01, keep=0.01, strong=0.05)
    one, four = (
        simulate(Load(400, 0, strong_slots=40, drivers=drivers), times) for drivers in (1, 4)
    )
    assert (one.bottleneck, one.rate) == ("driver", pytest.approx(50, rel=0.02))
    assert four.rate == pytest.approx(200, rel=0.05)


def test_a_commit_takes_all_that_wait() -> None:
    slow = Times(sync=0.1)
    one, many = (simulate(Load(200, 0, strong_slots=slots), slow) for slots in (1, 20))
    assert (one.commits, one.seconds) == (200, pytest.approx(20))
    assert many.commits <= 22 and many.seconds <= 2.2, "twenty together"


MEASURED = command.Measured(
    call=[2e-4, 2.5e-4, 3e-4, 3e-4], keep=[7e-5, 1e-4], sync=2e-4, bytes=2500.0,
    points=[{"threads": 8.0, "latency": 0.3, "traces": 160.0, "seconds": 7.6}],
)  # fmt: skip


@pytest.fixture(scope="module")
def page() -> simulate_page.Page:
    return command.page(MEASURED, command.Assumed(), seed=0, nodes=(1, 10))


def test_a_measured_point_stands_beside_its_simulation_with_the_error(
    page: simulate_page.Page,
) -> None:
    (point,) = page.points
    assert point["simulated"] == pytest.approx(200 * 0.3 / 8, rel=0.02)
    assert point["error"] == pytest.approx(point["simulated"] / 7.6 - 1)
    assert (
        f"| 8 | 300 ms | 160 | 7.60 | {point['simulated']:.2f} | {point['error']:+.0%} |"
        in simulate_page.tables(page)
    )


def test_the_drivers_time_is_interpolated_between_the_threads_that_were_measured() -> None:
    assert [MEASURED.call_with(threads) for threads in (1, 8, 128, 512, 10_000)] == pytest.approx(
        [2e-4, 2.5e-4, 3e-4, 3e-4, 3e-4]
    )
    assert MEASURED.call_with(32) == pytest.approx(2.75e-4), (
        "half-way from 8 to 128, as doublings go"
    )


def test_no_case_is_faster_than_its_driver_and_its_limit(page: simulate_page.Page) -> None:
    for one in page.columns:
        least = MEASURED.call_with(16 * one.nodes // one.drivers) + MEASURED.keep[1]
        assert one.outcome.rate <= one.drivers / least * 1.02
        if "API" in one.name:
            assert one.outcome.rate <= command.Assumed().limit / 60 * 9 / 5 * 1.05


def test_what_gives_way_first_is_what_was_put_there(page: simulate_page.Page) -> None:
    found = {
        (
            one.name.partition(",")[0] + one.name.rpartition(",")[2],
            one.nodes,
        ): one.outcome.bottleneck
        for one in page.columns
    }
    assert found["one driver no limit", 1] == "strong"
    assert found["one driver the weak model on two cores a node", 1] == "weak"


def test_tables_and_figure_are_put_between_the_marks_and_nowhere_else(
    page: simulate_page.Page, tmp_path: Path
) -> None:
    file, figure = tmp_path / "scale.md", tmp_path / "scale.svg"
    file.write_text(f"# Before\n\n{simulate_page.BEGIN}\nold\n{simulate_page.END}\n\nAfter.\n")
    for _ in range(2):
        simulate_page.write(page, file, figure)
    text = file.read_text()
    assert text.startswith("# Before\n") and text.endswith("\n\nAfter.\n") and "old" not in text
    assert text.count("| examples | drafts |") == 1
    root = ElementTree.fromstring(figure.read_text())
    said = "".join(root.itertext())
    assert root.tag.endswith("svg") and all(
        name in said for name in ("nodes", "examples an hour", page.columns[0].name)
    )


def test_costs_are_those_of_the_formula(page: simulate_page.Page) -> None:
    """10,000 examples with 4 drafts: 50,000 strong calls of 400 and 100 tokens, at 0.4 and 1.6 USD
    per million."""
    assert "| 10,000 | 40,000 | 50,000 | 0.03 | 16 | 0.1 |" in simulate_page.tables(page)


def test_the_documentation_has_the_figures_of_the_times_beside_it() -> None:
    """docs/scale.md was written from docs/scale.json: its measured columns are these."""
    found = command.Measured(**json.loads((ROOT / "docs/scale.json").read_text()))
    text = (ROOT / "docs/scale.md").read_text()
    assert (
        f"| {', '.join(f'{1000 * each:.3f}' for each in found.call)} ms |" in text
        and f"| {found.bytes / 1000:.1f} kB |" in text
    )
    for point in found.points:
        assert (
            f"| {point['threads']:.0f} | {1000 * point['latency']:.0f} ms | "
            f"{point['traces']:,.0f} | {point['seconds']:.2f} |"
        ) in text


def test_drafts_of_many_examples_ahead_keep_a_full_driver_from_the_strong_model() -> None:
    """As measured with 128 threads, where the simulation was too fast by 28 % while it began as few
    examples as the slots need."""
    load, times = (
        Load(examples=640, drafts=4, strong_slots=128, weak_slots=256),
        Times(call=0.0008, keep=0.0003, strong=0.3),
    )
    few, many = simulate(load, times), simulate(replace(load, ahead=512), times)
    assert load.room == 53 and many.seconds > 1.05 * few.seconds
