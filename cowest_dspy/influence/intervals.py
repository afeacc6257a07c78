"""Confidence intervals: of a proportion, of a paired difference, of a mean over examples; each with
its source."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


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
    if not 0 <= successes <= n:
        raise ValueError(f"successes must be in [0, n], got {successes} of {n}")
    if n == 0:
        return Interval(0.0, 1.0)
    z = _normal_quantile(level)
    share = successes / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Interval(
        0.0 if successes == 0 else middle - half, 1.0 if successes == n else middle + half
    )


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
        return bootstrap_mean_interval(
            [[float(value) for value in group] for group in groups],
            level=level,
            seed=seed,
            repeats=repeats,
        )
    return wilson_interval(len(groups) if any(map(any, groups)) else 0, len(groups), level)


def _normal_quantile(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    return statistics.NormalDist().inv_cdf((1 + level) / 2)
