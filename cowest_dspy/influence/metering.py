"""The usage of calls by role: a ledger that notes, of each call that goes through it, its role,
time, tokens and price.

meter = Meter(store, weak="local/weak@ab12")
with keeping(meter):
    ...
meter.average("strong")      # Measured(calls=6, seconds=1.4, input_tokens=212.0,
                              output_tokens=18.5, usd=0.0004)
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dspy.lm15 import Request, Response

from cowest_dspy.influence.metric import Metric
from cowest_dspy.store import serialize
from cowest_dspy.store.call_context import call_context, with_context
from cowest_dspy.store.store import Store


@dataclass(frozen=True)
class Measured:
    """Calls of one role, and what one of them takes on average; ``usd`` is None when the price of
    one is not known."""

    calls: int
    seconds: float
    input_tokens: float
    output_tokens: float
    usd: float | None


@dataclass(frozen=True)
class _Noted:
    role: str
    seconds: float
    answer: dict[str, Any]


class Meter:
    """A ledger that passes calls on to a store, and notes them. What the store has is noted with
    the time that it took when it was asked.

    Calls inside a metric are the judge's, others with the weak model's id are the weak model's, the
    rest is the strong model's.
    """

    def __init__(self, store: Store, weak: str) -> None:
        self._store, self._weak = store, weak
        self._noted: list[_Noted] = []
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def answer(self, request: Request, ask: Callable[[], Response]) -> tuple[Response, bool]:
        """Answer like :meth:`Store.answer`, and note what the call took."""
        started = time.monotonic()
        response, cached = self._store.answer(request, ask)
        seconds = self._store.seconds_of(request) if cached else time.monotonic() - started
        weak_or_strong = "weak" if request.model == self._weak else "strong"
        role = call_context().role or weak_or_strong
        with self._lock:
            self._noted.append(_Noted(role, seconds, serialize.response_to_dict(response)))
        return response, cached

    def as_judge(self, metric: Metric) -> Metric:
        """The metric, with its calls noted as the judge's."""

        def metered(*arguments: Any, **options: Any) -> Any:
            with with_context(role="judge"):
                return metric(*arguments, **options)

        return metered

    def average(self, role: str) -> Measured | None:
        """Average what the calls of a role took; None when there was none."""
        mine = [one for one in self._noted if one.role == role]
        if not mine:
            return None
        prices = [one.answer["usd"] for one in mine]
        return Measured(
            len(mine),
            sum(one.seconds for one in mine) / len(mine),
            sum(one.answer["input_tokens"] for one in mine) / len(mine),
            sum(one.answer["output_tokens"] for one in mine) / len(mine),
            None if None in prices else sum(prices) / len(mine),
        )
