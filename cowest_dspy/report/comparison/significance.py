"""Tests of one arm against another on the same examples, over seeds, and the correction for many of
them; each with its source."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cowest_dspy.influence.statistics import Interval, bootstrap_mean_interval
from cowest_dspy.report.comparison.model import ComparedArm
from cowest_dspy.report.numbers import SAME, paired_exact_test

if TYPE_CHECKING:
    import numpy as np

REPEATS = 10_000
ALPHA = 0.05


@dataclass(frozen=True)
class Paired:
    """One arm against another on the same examples; ``p`` is two-sided, in (0, 1].

    ``method`` is "mcnemar" or "bootstrap". ``n`` counts examples, ``answers`` the pairs of answers
    (examples times seeds), ``higher`` and ``lower`` those where this arm scores more or less;
    ``left_out`` those that one of the two has no score for. ``difference`` is this arm's mean less
    the other's, in [-1, 1]; None without a single pair. ``interval`` is its 95 % interval, not
    corrected for the number of tests.
    """

    method: str
    n: int
    answers: int
    higher: int
    lower: int
    left_out: int
    difference: float | None
    interval: Interval | None
    p: float


def holm(ps: Sequence[float]) -> list[float]:
    """p values corrected for their number, in the order given: the step-down method of Holm (1979,
    Scand. J. Statistics 6:65).

    The i-th smallest of m is multiplied by m - i + 1, never falls below a smaller one's, and ends
    at 1.

    >>> holm([0.01, 0.04, 0.03, 0.005])
    [0.03, 0.06, 0.06, 0.02]
    """
    corrected, highest = [1.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=lambda index: ps[index])):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[index]))
        corrected[index] = highest
    return corrected


def paired_test(
    arm: Sequence[ComparedArm],
    other: Sequence[ComparedArm],
    *,
    strict: bool = False,
    repeats: int = REPEATS,
) -> Paired:
    """One arm (its seeds) against another on the examples that both have a score for; ``strict``
    scores a failure 0.

    Seeds: the same ones are paired; a single seed of one side goes with every seed of the other;
        seeds that share none go each with each. For scores of 0 and 1 under one seed: the exact
        McNemar test (McNemar 1947, Psychometrika 12:153, as a two-sided binomial test) with
        Newcombe's interval. Otherwise ``bootstrap_test``, all seeds of an example drawn together.
    """
    scores, others = (
        [scores_of(run, strict=strict) for run in arm],
        [scores_of(run, strict=strict) for run in other],
    )
    matched = [
        (scores[i], others[j])
        for i, j in _matched([run.seed for run in arm], [run.seed for run in other])
    ]
    groups: dict[str, list[float]] = defaultdict(list)
    asked, binary = 0, True
    for mine, theirs in matched:
        asked += len(mine.keys() | theirs.keys())
        for example in mine.keys() & theirs.keys():
            one, two = mine[example], theirs[example]
            if one is not None and two is not None:
                groups[example].append(one - two)
                binary = binary and one in (0, 1) and two in (0, 1)
    differences = [value for group in groups.values() for value in group]
    counts = {
        "n": len(groups),
        "answers": len(differences),
        "higher": sum(value > SAME for value in differences),
        "lower": sum(value < -SAME for value in differences),
        "left_out": asked - len(differences),
    }
    if not differences:
        return Paired(method="bootstrap", **counts, difference=None, interval=None, p=1.0)
    if binary and len(matched) == 1:
        exact = paired_exact_test(matched[0][1], matched[0][0])
        return Paired(
            method="mcnemar",
            **counts,
            difference=exact.difference,
            interval=exact.interval,
            p=exact.p,
        )
    ordered = [groups[example] for example in sorted(groups)]
    mean, interval = math.fsum(differences) / len(differences), bootstrap_mean_interval(ordered)
    return Paired(
        method="bootstrap",
        **counts,
        difference=mean,
        interval=interval,
        p=bootstrap_test(ordered, repeats=repeats),
    )


def bootstrap_test(
    groups: Sequence[Sequence[float]], *, repeats: int = REPEATS, seed: int = 0
) -> float:
    """A two-sided p that the mean of all differences is 0; one group per example, drawn whole.

    Efron and Tibshirani 1993, algorithm 16.2: under the null the differences are shifted to mean 0;
    p is the share of samples whose studentised mean (the mean over its standard error) is at least
    as far from 0 as the observed one's, the observed sample counted among the ``repeats`` + 1
    (Davison and Hinkley 1997, section 4.2). The standard error of the mean of groups of different
    sizes is that of a ratio (Cochran 1977, section 2.11). p is never below 2 to the power 1 - d
    with d examples that
    differ: the least that exchanging the arms within examples, an exact test, could give. The same
        seed gives the same p.
    """
    import numpy as np

    differing = sum(abs(math.fsum(group)) > SAME for group in groups)
    sums = np.array([math.fsum(group) for group in groups])
    sizes = np.array([len(group) for group in groups])
    if differing < 2 or abs(sums.sum()) <= SAME * sizes.sum():
        return 1.0
    total = math.fsum(sums)
    sums = sums - sizes * (total / sizes.sum())  # the null: mean 0
    observed = float(_studentised(np.array([total]), sums[None, :])[0])
    generator = np.random.default_rng(seed)
    as_far, left, at_once = 0, repeats, max(1, 200_000 // len(groups))
    while left > 0:
        drawn = generator.integers(len(groups), size=(min(left, at_once), len(groups)))
        totals, counts = sums[drawn].sum(axis=1), sizes[drawn].sum(axis=1)
        residuals = sums[drawn] - sizes[drawn] * (totals / counts)[:, None]
        as_far += int((_studentised(totals, residuals) >= observed - SAME).sum())
        left -= len(drawn)
    return max((1 + as_far) / (1 + repeats), 2.0 ** (1 - differing))


def _studentised(totals: np.ndarray, residuals: np.ndarray) -> np.ndarray:
    """The size of means over their standard errors, from the sums, shape (s,), and the residuals,
    (s, groups).

    The numbers of values cancel. Without spread it is 0 for a sum of 0, else infinite.
    """
    import numpy as np

    spread, size = np.sqrt((residuals * residuals).sum(axis=1)), np.abs(totals)
    return np.where(
        spread > SAME, size / np.maximum(spread, SAME), np.where(size > SAME, np.inf, 0.0)
    )


def found(test: Paired | None, corrected: float | None) -> int | None:
    """1 for a gain at the corrected level 0.05, -1 for a loss, 0 when chance explains it, None
    without a test."""
    if test is None or test.difference is None or corrected is None:
        return None
    return 0 if corrected >= ALPHA else 1 if test.difference > 0 else -1


def scores_of(run: ComparedArm, *, strict: bool) -> dict[str, float | None]:
    """Score by example id; where the arm failed None, or 0 if ``strict``."""
    return {
        answer.example_id: 0.0 if strict and answer.score is None else answer.score
        for answer in run.arm.answers
    }


def _matched(seeds: Sequence[int], others: Sequence[int]) -> list[tuple[int, int]]:
    """Which run of one arm goes with which of the other, as positions."""
    common = [(seeds.index(seed), others.index(seed)) for seed in seeds if seed in others]
    if len(seeds) > 1 and len(others) > 1 and common:
        return common
    return [(i, j) for i in range(len(seeds)) for j in range(len(others))]
