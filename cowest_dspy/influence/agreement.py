"""How far two evaluators agree on the same answers: Kendall's tau-b, which takes ties into
account."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cowest_dspy.influence.intervals import Interval

DIGITS = 3  # scores that are equal to three digits are tied


@dataclass(frozen=True)
class Agreement:
    """``tau`` in [-1, 1]: 1 where both put every two answers in the same order, 0 where they know
    nothing of each other; None where one of them gave all answers the same score. ``interval`` (95
    %, bootstrap over examples) is of ``tau``; ``n`` answers."""

    tau: float | None
    interval: Interval | None
    n: int

    def __str__(self) -> str:
        if self.tau is None:
            return f"not defined: one of them gave all {self.n} answers the same score"
        spread = f" [{self.interval.low:+.2f}, {self.interval.high:+.2f}]" if self.interval else ""
        return f"tau-b {self.tau:+.2f}{spread}, n {self.n}"


def agreement(
    first: Sequence[float],
    second: Sequence[float],
    examples: Sequence[str] | None = None,
    *,
    seed: int = 0,
    repeats: int = 500,
) -> Agreement:
    """Kendall's tau-b (Kendall 1945, Biometrika 33:239) of two lists of scores in [0, 1], of the
    same answers in the same order.

    ``examples``: the example of each answer; whole examples are drawn for the interval, since
        answers to one are not independent.

    Raises:
        ValueError: lists of different lengths.
    """
    import numpy as np

    if len(first) != len(second) or (examples is not None and len(examples) != len(first)):
        raise ValueError(f"agreement needs lists of one length, got {len(first)} and {len(second)}")
    if not first:
        return Agreement(None, None, 0)
    _, rows = np.unique(np.round(first, DIGITS), return_inverse=True)
    _, columns = np.unique(np.round(second, DIGITS), return_inverse=True)
    _, groups = np.unique(
        list(examples) if examples is not None else np.arange(len(first)), return_inverse=True
    )
    shape, count = (int(rows.max()) + 1, int(columns.max()) + 1), int(groups.max()) + 1
    tau = _tau(rows, columns, np.ones(len(first)), shape)
    generator = np.random.default_rng(seed)
    drawn: list[float] = []
    for _ in range(repeats if count > 1 and tau is not None else 0):
        weights = np.bincount(generator.integers(count, size=count), minlength=count)[groups]
        one = _tau(rows, columns, weights.astype(float), shape)
        drawn += [] if one is None else [one]
    interval = (
        Interval(*(float(end) for end in np.quantile(drawn, [0.025, 0.975]))) if drawn else None
    )
    return Agreement(tau, interval, len(first))


def _tau(rows: Any, columns: Any, weights: Any, shape: tuple[int, int]) -> float | None:
    """tau-b of answers that count ``weights`` times, from the table of how often each two scores
    meet."""
    import numpy as np

    table = np.zeros(shape)
    np.add.at(table, (rows, columns), weights)
    # Of each cell: what lies below and to the right of it (ordered alike), below and to the left
    # (ordered otherwise).
    below = table[::-1].cumsum(axis=0)[::-1] - table
    right = below.sum(axis=1, keepdims=True) - below.cumsum(axis=1)
    left = below.cumsum(axis=1) - below
    alike, otherwise = float((table * right).sum()), float((table * left).sum())
    n = float(table.sum())

    def untied(sums: Any) -> float:
        return (n * n - float((sums * sums).sum())) / 2

    spread = untied(table.sum(axis=1)) * untied(table.sum(axis=0))
    return (alike - otherwise) / spread**0.5 if spread > 0 else None
