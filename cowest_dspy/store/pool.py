"""Work done in threads and given in order: so many items ahead and no more, so that a million items
take no more memory."""

from __future__ import annotations

import contextvars
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from cowest_dspy.store.call_context import stoppable

OnProgress = Callable[[int, int], None]
"""Called with (done, total)."""
Item = TypeVar("Item")
Made = TypeVar("Made")

AHEAD = 256
"""Items under way or waiting to be given, unless it is said otherwise."""


def map_in_order(
    pool: Executor, function: Callable[[Item], Made], items: Iterable[Item], *, ahead: int = AHEAD
) -> Iterator[Made]:
    """``function`` of every item, computed in the pool under the caller's context, given in the
    items' order."""
    return results_in_order(
        lambda item: pool.submit(contextvars.copy_context().run, function, item), items, ahead=ahead
    )


def map_in_threads(
    function: Callable[[Item], Made],
    items: Sequence[Item],
    *,
    threads: int,
    on_progress: OnProgress | None = None,
) -> list[Made]:
    """``function`` of every item, in their order: in so many threads under the caller's context
    (its ledger above all), and when one of them fails or is interrupted, whoever waits for a rate
    limit is let go. ``on_progress`` is told (done, in all)."""
    made: list[Made] = []
    with ThreadPoolExecutor(threads) as pool, stoppable():
        for one in map_in_order(pool, function, items):
            made.append(one)
            if on_progress:
                on_progress(len(made), len(items))
    return made


def results_in_order(
    start: Callable[[Item], Future[Made]], items: Iterable[Item], *, ahead: int = AHEAD
) -> Iterator[Made]:
    """Yield the result of ``start(item)`` for every item, in their order; at most ``ahead`` are
    started and not yet given.

    When it is left early, promises that are still open are cancelled.
    """
    waiting: deque[Future[Made]] = deque()
    coming = iter(items)
    try:
        waiting.extend(start(item) for item in islice(coming, ahead))
        while waiting:
            made = waiting.popleft().result()
            waiting.extend(start(item) for item in islice(coming, 1))
            yield made
    finally:
        for future in waiting:
            future.cancel()
