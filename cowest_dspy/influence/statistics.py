"""Confidence intervals (of a proportion, of a paired difference, of a mean over examples), what
difference so many examples can show, and how far two evaluators agree; each with its source."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

ALPHA, POWER = 0.05, 0.8
"""The two-sided level of a test, and its power: the chance of p < ``ALPHA``."""
LEAST_CHANGED = next(count for count in range(1, 99) if 2.0 ** (1 - count) < ALPHA)
"""Fewer answers that change give an exact two-sided test no chance of p < ``ALPHA``: 6."""
SMALLEST = 5.0
"""The smallest difference worth finding, in points, where [compare] names no other."""


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
    z, share = NormalDist().inv_cdf((1 + level) / 2), successes / n
    middle = successes + z * z / 2
    reach = z * math.sqrt(successes * (1 - share) + z * z / 4)
    low, high = ((middle + side * reach) / (n + z * z) for side in (-1, 1))
    return Interval(low if successes else 0.0, high if successes < n else 1.0)


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


def questions_needed(difference: float, discordance: float) -> int:
    """The number of questions on which a paired test of right and wrong finds a true ``difference``
    of two shares, in (0, 1], with 80 % power at the two-sided level 0.05.

    ``discordance`` is the share of questions that one arm alone gets right, in [0, 1]; below
    ``difference`` it cannot be, and counts as that. Connor 1987, Biometrics 43:207, for McNemar's
    test by its normal approximation: the exact test has 76 to 79 % at these numbers.

    >>> [questions_needed(points / 100, 0.15) for points in (2.0, 4.0, 6.1)]
    [2941, 734, 315]
    """
    level, power = _quantiles()
    apart = max(discordance, difference)
    spread = level * math.sqrt(apart) + power * math.sqrt(apart - difference**2)
    return math.ceil((spread / difference) ** 2)


def detectable_difference(n: int, discordance: float) -> float | None:
    """The smallest true difference of two shares, in (0, 1], that ``n`` questions show with 80 %
    power: :func:`questions_needed`, solved for the difference. None for fewer questions than an
    exact test needs.

    >>> round(100 * detectable_difference(310, 0.15), 1)
    6.1
    """
    if n < LEAST_CHANGED:
        return None
    level, power = _quantiles()
    total = n + power**2
    found = level * math.sqrt(n) + power * math.sqrt(total - level**2)
    found *= math.sqrt(discordance) / total
    if 0 < found <= discordance:
        return found
    # So few that all which differ would have to do so in one direction: discordance = difference.
    cross = level * power
    rest = (math.sqrt(cross**2 + total * (n - level**2)) - cross) / total
    return 1 - rest**2


def detectable_mean(groups: Sequence[Sequence[float]]) -> float | None:
    """The smallest true mean that a z test, two-sided at 0.05, tells from 0 with 80 % power, from
    the spread seen: 2.8 standard errors of the mean of all values.

    One group per example, as in :func:`bootstrap_mean_interval`; the standard error is that of a
    ratio (Cochran 1977, section 2.11). None where fewer groups differ from 0 than an exact test
    needs: they say too little about spread.
    """
    sums, sizes = [math.fsum(group) for group in groups], [len(group) for group in groups]
    if sum(abs(total) > 1e-9 for total in sums) < LEAST_CHANGED:
        return None
    n, mean = len(groups), math.fsum(sums) / sum(sizes)
    squares = math.fsum((total - size * mean) ** 2 for total, size in zip(sums, sizes, strict=True))
    return sum(_quantiles()) * math.sqrt(squares * n / (n - 1)) / sum(sizes)


def _quantiles() -> tuple[float, float]:
    """Quantiles of the normal distribution for ``ALPHA``, two-sided, and for ``POWER``."""
    return NormalDist().inv_cdf(1 - ALPHA / 2), NormalDist().inv_cdf(POWER)


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
    scores = np.round([first, second], 3)

    def tau(places: slice | np.ndarray) -> float | None:
        return kendall_tau_b(*scores[:, places])

    whole = tau(slice(None))
    drawn: list[float] = []
    groups: dict[object, list[int]] = {}
    for place, name in enumerate(examples or range(len(first))):
        groups.setdefault(name, []).append(place)
    if whole is not None and len(groups) > 1:
        generator, places = np.random.default_rng(seed), [np.array(one) for one in groups.values()]
        for _ in range(repeats):
            chosen = generator.integers(len(places), size=len(places))
            one = tau(np.concatenate([places[index] for index in chosen]))
            drawn += [] if one is None else [one]
    ends = np.quantile(drawn, [0.025, 0.975]) if drawn else ()
    return Agreement(whole, Interval(*map(float, ends)) if drawn else None, len(first))


def kendall_tau_b(first: np.ndarray, second: np.ndarray) -> float | None:
    """Tau-b from the table of how often each two values meet (Agresti 2010, Analysis of Ordinal
    Categorical Data, section 7.1); None where one of the lists has all values alike."""
    import numpy as np

    (rows, row), (columns, column) = (
        np.unique(one, return_inverse=True) for one in (first, second)
    )
    if len(rows) < 2 or len(columns) < 2:
        return None
    table = np.zeros((len(rows), len(columns)))
    np.add.at(table, (row, column), 1)

    def agreeing(table: np.ndarray) -> float:
        """The pairs of which one is above the other in both lists."""
        below = table.cumsum(0).cumsum(1)
        return float((table[1:, 1:] * below[:-1, :-1]).sum())

    apart = [(len(first) ** 2 - float((table.sum(side) ** 2).sum())) / 2 for side in (0, 1)]
    return (agreeing(table) - agreeing(table[:, ::-1])) / math.sqrt(apart[0] * apart[1])
