"""Rate limits: no window holds more than is allowed, whoever asks; who waits sleeps, in the order
of coming."""

from __future__ import annotations

import contextvars
import heapq
import threading
import time
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowest_dspy.store.call_context import stoppable
from cowest_dspy.store.rate_limit import Admission, Limits, rest, shared_limits

REQUESTS, TOKENS, WINDOW = 4, 100, 60.0


@dataclass
class World:
    """A clock that only moves when somebody waits, and the calls under way, which end when their
    time has come."""

    now: float = 0.0
    waits: int = 0
    ends: list[tuple[float, int, Admission, int]] = field(default_factory=list)
    limits: Limits = field(init=False)

    def __post_init__(self) -> None:
        self.limits = Limits(
            REQUESTS, TOKENS, window=WINDOW, clock=lambda: self.now, waker=lambda: Waker(self)
        )

    def move_to(self, later: float) -> None:
        """Time passes; calls end on the way."""
        while self.ends and self.ends[0][0] <= later:
            at, _, admission, tokens = heapq.heappop(self.ends)
            self.now = at
            self.limits.leave(admission, tokens)
        self.now = later


@dataclass(eq=False)
class Waker:
    """A fake ``threading.Event``: to wait is to let the world's time pass, until the next call ends
    at most."""

    world: World

    def set(self) -> None:
        """Nothing: the world has one thread."""

    def clear(self) -> None:
        """Nothing."""

    def wait(self, timeout: float | None = None) -> bool:
        self.world.waits += 1
        wake_ups = [self.world.ends[0][0]] if self.world.ends else []
        if timeout is not None:
            assert timeout > 0, "a wait of no time is a spin"
            wake_ups.append(self.world.now + timeout)
        assert wake_ups, "it would wait for ever"
        self.world.move_to(min(wake_ups))
        return True


# A call: seconds before it, estimated tokens, the part of them that it really takes, its seconds,
# when in them the server counts it
Calls = list[tuple[float, int, float, float, float]]
calls = st.lists(
    st.tuples(
        st.floats(0, 90),
        st.integers(0, TOKENS),
        st.floats(0, 1),
        st.floats(0, 100),
        st.floats(0, 1),
    ),
    max_size=40,
)


@given(calls)
def test_no_window_of_the_servers_clock_ever_holds_more_than_is_allowed(sequence: Calls) -> None:
    world = World()
    seen: list[tuple[float, int]] = []
    for number, (before, estimate, part, seconds, counted) in enumerate(sequence):
        world.move_to(world.now + before)
        admission = world.limits.enter(estimate)
        seen.append((world.now + counted * seconds, int(part * estimate)))
        heapq.heappush(world.ends, (world.now + seconds, number, admission, int(part * estimate)))
    for start, _ in seen:
        inside = [tokens for at, tokens in seen if start <= at < start + WINDOW * (1 - 1e-9)]
        assert len(inside) <= REQUESTS
        assert sum(inside) <= TOKENS


@given(calls)
def test_nobody_spins_while_waiting(sequence: Calls) -> None:
    world = World()
    for number, (_, estimate, part, seconds, _) in enumerate(sequence):
        admission = world.limits.enter(estimate)
        heapq.heappush(world.ends, (world.now + seconds, number, admission, int(part * estimate)))
    assert world.waits <= 4 * len(sequence), (
        "a call is woken by the ends of others and by what leaves the window, and by no more"
    )


def test_what_a_call_did_not_use_is_given_back() -> None:
    world = World()
    world.limits.leave(world.limits.enter(TOKENS), 10)
    world.limits.enter(TOKENS - 10)
    assert world.now == 0


def test_what_a_call_used_beyond_its_estimate_holds_back_the_next() -> None:
    world = World()
    world.limits.leave(world.limits.enter(10), TOKENS + 50)
    world.limits.enter(1)
    assert world.now == WINDOW


def test_an_estimate_above_the_whole_limit_waits_for_an_empty_window() -> None:
    world = World()
    world.limits.leave(world.limits.enter(1))
    world.limits.enter(10 * TOKENS)
    assert world.now == WINDOW


def test_a_hold_is_for_all_and_ends() -> None:
    world = World()
    world.limits.hold(7.0)
    world.limits.hold(3.0)
    world.limits.enter()
    world.limits.enter()
    assert world.now == 7.0


def test_without_limits_nobody_waits() -> None:
    limits = Limits()
    for _ in range(1000):
        limits.leave(limits.enter(10**9), 10**9)


def test_who_comes_first_is_let_in_first() -> None:
    limits = Limits(tokens=10, window=0.05)
    first = limits.enter(10)
    order: list[int] = []
    threads: list[threading.Thread] = []

    def come(number: int, tokens: int) -> None:
        admission = limits.enter(tokens)
        order.append(number)
        limits.leave(admission)

    for number, tokens in enumerate((10, 1, 10, 1)):  # a small one does not overtake a large one
        threads.append(threading.Thread(target=come, args=(number, tokens)))
        threads[-1].start()
        while len(limits._queue) <= number:
            time.sleep(0.001)
    limits.leave(first)
    for thread in threads:
        thread.join(5)
    assert order == [0, 1, 2, 3]


def test_an_interrupt_stops_every_call_that_waits_for_its_turn_or_rests_at_once() -> None:
    limits = Limits(requests=1, window=3600)
    limits.enter()
    stopped: list[str] = []

    def waiting(name: str, wait: object) -> None:
        try:
            limits.enter() if wait is None else rest(3600)
        except KeyboardInterrupt:
            stopped.append(name)

    threads: list[threading.Thread] = []

    def work() -> None:
        with stoppable():
            for name, wait in (("turn", None), ("turn", None), ("pause", 1)):
                threads.append(
                    threading.Thread(
                        target=contextvars.copy_context().run, args=(waiting, name, wait)
                    )
                )
                threads[-1].start()
            while len(limits._queue) < 2:
                time.sleep(0.001)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    for thread in threads:
        thread.join(5)
    assert sorted(stopped) == ["pause", "turn", "turn"]
    assert not limits._queue


def test_an_endpoint_has_one_pair_of_limits_and_the_last_number_counts() -> None:
    limits = shared_limits("openai/m", None, "KEY_OF_A_TEST", requests=5)
    assert shared_limits("openai/m", None, "KEY_OF_A_TEST", tokens=7) is limits
    assert (limits.requests, limits.tokens) == (5, 7)
    shared_limits("openai/m", None, "KEY_OF_A_TEST", requests=9)
    assert limits.requests == 9
    assert shared_limits("openai/m", None, "ANOTHER_KEY_OF_A_TEST") is not limits
