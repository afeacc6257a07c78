"""Paired tests of two arms on the same examples, and the correction for many of them; each with its
source."""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cowest_dspy.influence.report import SAME
from cowest_dspy.influence.statistics import (
    ALPHA,
    Interval,
    bootstrap_mean_interval,
    detectable_difference,
    detectable_mean,
    paired_difference_interval,
    questions_needed,
)

if TYPE_CHECKING:
    import numpy as np

REPEATS = 10_000


@dataclass(frozen=True)
class PairedTest:
    """One arm against another on the same examples; ``p`` is two-sided, in (0, 1].

    ``method`` is "mcnemar" or "bootstrap". ``n`` counts examples, ``answers`` the pairs of answers
    (examples times seeds), ``higher`` and ``lower`` those where this arm scores more or less;
    ``left_out`` those that one of the two has no score for. ``difference`` is this arm's mean less
    the other's, in [-1, 1]; None without a single pair. ``interval`` is its 95 % interval, not
    corrected for the number of tests. ``detectable`` is the smallest true difference, in (0, 1],
    that ``n`` examples show with 80 % power at the two-sided level 0.05 of one test, from the
    answers that differ (McNemar) or the spread of the differences (bootstrap); None for too few.
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
    detectable: float | None = None

    def needed(self, difference: float) -> int | None:
        """About how many examples show a true ``difference``, in (0, 1], with 80 % power; None
        where ``detectable`` is."""
        if self.detectable is None:
            return None
        if self.method == "mcnemar":
            return questions_needed(difference, (self.higher + self.lower) / self.n)
        return math.ceil(self.n * (self.detectable / difference) ** 2)


def exact_sign_p(higher: int, lower: int) -> float:
    """Two-sided exact binomial p at 1/2: the chance of a split at least this uneven when neither
    arm is better; 1 when nothing differs. Below the least float, that float stands in."""
    if abs(higher - lower) <= 1:
        return 1.0
    n = higher + lower
    splits = tail = 1
    for place in range(min(higher, lower)):
        splits = splits * (n - place) // (place + 1)
        tail += splits
    return max(tail / 2 ** (n - 1), sys.float_info.min)


def holm(ps: Sequence[float]) -> list[float]:
    """The p values, corrected for their number, in the order given: the step-down method of Holm
    (1979, Scand. J. Statistics 6:65).

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


def correct_tests(tests: Sequence[PairedTest | None]) -> list[float | None]:
    """Holm's p of each test that has examples to compare; None for the others."""
    corrected = iter(holm([test.p for test in tests if test and test.n]))
    return [next(corrected) if test and test.n else None for test in tests]


Scores = Mapping[str, float | None]
"""By example id; None is a failure."""


def compare_scores(arm: Scores, other: Scores, *, repeats: int = REPEATS) -> PairedTest:
    """One arm against another under one seed; see :func:`compare_seeds`."""
    return compare_seeds([(0, arm)], [(0, other)], repeats=repeats)


def compare_seeds(
    arm: Sequence[tuple[int, Scores]],
    other: Sequence[tuple[int, Scores]],
    *,
    repeats: int = REPEATS,
) -> PairedTest:
    """One arm (its seeds, each with its scores) against another on the examples that both have a
    score for.

    Seeds: the same ones are paired; a single seed of one side goes with every seed of the other;
    seeds that share none go each with each. For scores of 0 and 1 under one seed: the exact McNemar
    test (McNemar 1947, Psychometrika 12:153, as a two-sided binomial test) with Newcombe's
    interval. Otherwise ``bootstrap_test``, all seeds of an example drawn together.
    """
    places = _matched([seed for seed, _ in arm], [seed for seed, _ in other])
    both: dict[str, list[tuple[float, float]]] = defaultdict(list)
    asked = 0
    for mine, theirs in ((arm[i][1], other[j][1]) for i, j in places):
        asked += len(mine.keys() | theirs.keys())
        for example in mine.keys() & theirs.keys():
            one, two = mine[example], theirs[example]
            if one is not None and two is not None:
                both[example].append((one, two))
    pairs = [pair for example in sorted(both) for pair in both[example]]
    higher = sum(one - two > SAME for one, two in pairs)
    lower = sum(two - one > SAME for one, two in pairs)
    interval, p, method, detectable = None, 1.0, "bootstrap", None
    if len(places) == 1 and pairs and is_binary(score for pair in pairs for score in pair):
        right = sum(one == two == 1 for one, two in pairs)
        wrong = len(pairs) - right - higher - lower
        interval = paired_difference_interval(right, higher, lower, wrong)
        p, method = exact_sign_p(higher, lower), "mcnemar"
        detectable = detectable_difference(len(pairs), (higher + lower) / len(pairs))
    elif pairs:
        groups = [[one - two for one, two in both[example]] for example in sorted(both)]
        interval, p = bootstrap_mean_interval(groups), bootstrap_test(groups, repeats=repeats)
        detectable = detectable_mean(groups)
    return PairedTest(
        method=method,
        n=len(both),
        answers=len(pairs),
        higher=higher,
        lower=lower,
        left_out=asked - len(pairs),
        difference=math.fsum(one - two for one, two in pairs) / len(pairs) if pairs else None,
        interval=interval,
        p=p,
        detectable=detectable,
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
    with d examples that differ: the least that exchanging the arms within examples, an exact test,
    could give. The same seed gives the same p.
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


def finding(test: PairedTest | None, corrected: float | None) -> int | None:
    """1 for a gain at the corrected level 0.05, -1 for a loss, 0 when chance explains it, None
    without a test."""
    if test is None or test.difference is None or corrected is None:
        return None
    return 0 if corrected >= ALPHA else 1 if test.difference > 0 else -1


def _matched(seeds: Sequence[int], others: Sequence[int]) -> list[tuple[int, int]]:
    """The runs of two arms that go together, as positions."""
    common = [(seeds.index(seed), others.index(seed)) for seed in seeds if seed in others]
    if len(seeds) > 1 and len(others) > 1 and common:
        return common
    return [(i, j) for i in range(len(seeds)) for j in range(len(others))]


def is_binary(scores: Iterable[float]) -> bool:
    """Whether every score is 0 or 1."""
    return all(score in (0, 1) for score in scores)
