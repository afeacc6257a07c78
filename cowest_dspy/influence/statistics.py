"""Confidence intervals (of a proportion, of a paired difference, of a mean over examples), and how
far two evaluators agree; each with its source."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Interval:
    """A confidence interval with both ends included."""

    low: float
    high: float


def wilson_interval(successes: int, n: int, level: float = 0.95) -> Interval:
    """The score interval of a proportion (Wilson 1927, JASA 22:209); [0, 1] when ``n`` is 0.

    >>> wilson_interval(8, 10)
    Interval(low=0.4901..., high=0.9433...)
    """
    if not n:
        return Interval(0.0, 1.0)
    z = NormalDist().inv_cdf((1 + level) / 2)

    def low(count: int) -> float:
        reach = z * math.sqrt(count * (n - count) / n + z * z / 4)
        return max((count + z * z / 2 - reach) / (n + z * z), 0.0) if count else 0.0

    return Interval(low(successes), 1 - low(n - successes))


def paired_difference_interval(
    both_right: int, fixed: int, broken: int, both_wrong: int, level: float = 0.95
) -> Interval:
    """The interval of share(second) - share(first) for paired right and wrong.

    Newcombe 1998, Statistics in Medicine 17:2635, method 10 (Wilson limits, correlation corrected
    for continuity).

    >>> paired_difference_interval(36, 12, 2, 0)
    Interval(low=0.0569..., high=0.3404...)
    """
    n = both_right + fixed + broken + both_wrong
    right1, right2 = both_right + broken, both_right + fixed
    p1, p2 = right1 / n, right2 / n
    w1, w2 = wilson_interval(right1, n, level), wilson_interval(right2, n, level)
    cross = both_right * both_wrong - fixed * broken
    if cross > 0:
        cross = max(cross - n / 2, 0)
    spread = right1 * (n - right1) * right2 * (n - right2)
    phi = cross / math.sqrt(spread) if spread else 0.0
    below2, above2, below1, above1 = p2 - w2.low, w2.high - p2, p1 - w1.low, w1.high - p1
    down = math.sqrt(max(below2**2 - 2 * phi * below2 * above1 + above1**2, 0.0))
    up = math.sqrt(max(above2**2 - 2 * phi * above2 * below1 + below1**2, 0.0))
    return Interval(max(p2 - p1 - down, -1.0), min(p2 - p1 + up, 1.0))


def bootstrap_mean_interval(
    groups: Sequence[Sequence[float]], *, level: float = 0.95, seed: int = 0, repeats: int = 2000
) -> Interval | None:
    """The percentile bootstrap of the mean of all values (Efron and Tibshirani 1993, chapter 13),
    drawing whole groups.

    One group per example: drafts of one example are not independent. The same seed gives the same
    interval. None for fewer than two groups, which say nothing about spread.
    """
    if len(groups) < 2:
        return None
    import numpy as np

    sums = np.array([math.fsum(group) for group in groups])
    sizes = np.array([len(group) for group in groups])
    generator = np.random.default_rng(seed)
    means = np.empty(repeats)
    for index in range(repeats):
        drawn = generator.integers(len(groups), size=len(groups))
        means[index] = sums[drawn].sum() / sizes[drawn].sum()
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def share_interval(
    groups: Sequence[Sequence[bool]], *, level: float = 0.95, seed: int = 0, repeats: int = 2000
) -> Interval | None:
    """The interval of the share of True values, of which those of one group are not independent;
    None for fewer than two groups.

    :func:`bootstrap_mean_interval`; but where all values are equal, every resample would be too,
    and an interval of no width would say that no other value can come. There it is Wilson's, with
    each group counted once: as if its values were one.

    >>> share_interval([[False, False], [False], [False]])
    Interval(low=0.0, high=0.5614...)
    """
    if len({value for group in groups for value in group}) != 1 or len(groups) < 2:
        values = [[float(value) for value in group] for group in groups]
        return bootstrap_mean_interval(values, level=level, seed=seed, repeats=repeats)
    return wilson_interval(len(groups) if any(map(any, groups)) else 0, len(groups), level)


@dataclass(frozen=True)
class Agreement:
    """Kendall's tau-b of two evaluators in [-1, 1]: 1 where both put every two answers in the same
    order, 0 where they know nothing of each other; None where one of them gave all answers the same
    score. ``interval`` (95 %, bootstrap over examples) is of ``tau``; ``n`` answers."""

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
    same answers in the same order. Scores that are equal to three digits are tied.

    ``examples``: the example of each answer; whole examples are drawn for the interval, since
        answers to one are not independent.

    Raises:
        ValueError: lists of different lengths.
    """
    import numpy as np

    if len(first) != len(second) or (examples is not None and len(examples) != len(first)):
        raise ValueError(f"agreement needs lists of one length, got {len(first)} and {len(second)}")
    (rows, row), (columns, column) = (
        np.unique(np.round(scores, 3), return_inverse=True) for scores in (first, second)
    )
    cells, shape = row * len(columns) + column, (len(rows), len(columns))

    def tau(cells: np.ndarray) -> float | None:
        return _tau_b(np.bincount(cells, minlength=shape[0] * shape[1]).reshape(shape))

    whole = tau(cells)
    drawn: list[float] = []
    groups: dict[object, list[int]] = {}
    for place, name in enumerate(examples or range(len(first))):
        groups.setdefault(name, []).append(place)
    if whole is not None and len(groups) > 1:
        generator, places = np.random.default_rng(seed), [np.array(one) for one in groups.values()]
        for _ in range(repeats):
            chosen = generator.integers(len(places), size=len(places))
            one = tau(cells[np.concatenate([places[index] for index in chosen])])
            drawn += [] if one is None else [one]
    ends = np.quantile(drawn, [0.025, 0.975]) if drawn else ()
    return Agreement(whole, Interval(*map(float, ends)) if drawn else None, len(first))


def _tau_b(counts: np.ndarray) -> float | None:
    """Kendall's tau-b from how many answers have which two scores, shape (rows, columns), both in
    the order of the scores; None where all are tied in one of the two."""

    def pairs(counts: np.ndarray) -> int:
        """How many pairs there are within each count, in all."""
        return int((counts * (counts - 1)).sum()) // 2

    above = counts[::-1, ::-1].cumsum(0).cumsum(1)[::-1, ::-1]  # in this row and column, or later
    concordant = int((counts[:-1, :-1] * above[1:, 1:]).sum())
    total, in_rows, in_columns = (pairs(counts.sum(axis)) for axis in ((0, 1), 1, 0))
    ordered = total - in_rows - in_columns + pairs(counts)
    most = math.sqrt((total - in_rows) * (total - in_columns))
    return (2 * concordant - ordered) / most if most else None
