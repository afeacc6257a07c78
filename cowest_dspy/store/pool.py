"""Work in threads with results in order: so many items ahead and no more, so that a million items
take no more memory."""

from __future__ import annotations

import contextvars
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from cowest_dspy.store.call_context import stoppable

OnProgress = Callable[[int, int], None]
"""Called with (done, total)."""
Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 256
"""Items under way or waiting to be yielded, by default."""


def map_in_threads(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    num_threads: int,
    on_progress: OnProgress | None = None,
) -> list[Result]:
    """Call ``function`` for every item in so many threads, under the caller's context (its ledger
    above all), and return the results in the items' order. When one of them fails or is
    interrupted, calls that wait for a rate limit end. ``on_progress`` gets (done, in all)."""
    results: list[Result] = []
    with ThreadPoolExecutor(num_threads) as pool, stoppable():

        def start(item: Item) -> Future[Result]:
            return pool.submit(contextvars.copy_context().run, function, item)

        for result in results_in_order(start, items):
            results.append(result)
            if on_progress:
                on_progress(len(results), len(items))
    return results


def results_in_order(
    start: Callable[[Item], Future[Result]], items: Iterable[Item], *, ahead: int = AHEAD
) -> Iterator[Result]:
    """Yield the result of ``start(item)`` for every item, in their order; at most ``ahead`` are
    started and not yet yielded. When it is left early, those that have not begun are cancelled.
    """
    waiting: deque[Future[Result]] = deque()
    coming = iter(items)
    try:
        waiting.extend(start(item) for item in islice(coming, ahead))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(start(item) for item in islice(coming, 1))
            yield result
    finally:
        for future in waiting:
            future.cancel()
