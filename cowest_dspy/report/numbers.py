"""The statistics of a report: pure functions from scores to named numbers, each with its source.

Two rules hold everywhere. A failure is not a score: what failed is counted beside the scores, never among them. What is
compared is compared on the same examples: tests are paired by example id, and say how many they had to leave out.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cowest_dspy.report.model import Arm, InfluenceRow, RunReport

SAME = 1e-9  # scores nearer than this are equal: means of judges' scores carry rounding


@dataclass(frozen=True)
class Interval:
    """A confidence interval with both ends included."""

    low: float
    high: float


@dataclass(frozen=True)
class PairedTest:
    """Two arms on the same examples. ``fixed``: the second scores higher; ``broken``: lower; ``p`` two-sided in (0, 1].

    ``difference`` is mean(second) - mean(first) over the ``n`` examples that both have a score for; ``left_out`` is
    the number of the others.
    """

    n: int
    fixed: int
    broken: int
    p: float
    left_out: int
    difference: float | None
    interval: Interval | None


@dataclass(frozen=True)
class ArmLine:
    """One arm in numbers. ``accuracy`` (0 to 1) is over the ``answered``; ``strict_accuracy`` counts failures as wrong.

    ``correct`` is None when scores are graded. ``test`` goes from the reference to this arm: ``fixed`` is what only
    this arm gets right. It is None for the reference itself, and while the reference has not been evaluated.
    """

    name: str
    title: str
    note: str
    asked: int
    answered: int
    failed: int
    correct: int | None
    accuracy: float | None
    interval: Interval | None
    strict_accuracy: float | None
    is_reference: bool
    test: PairedTest | None


@dataclass(frozen=True)
class InfluenceCounts:
    """Drafts that helped, hurt, changed nothing, or failed; the mean influence, in [-1, 1], of those that did not."""

    helped: int
    hurt: int
    same: int
    failed: int
    mean: float | None
    interval: Interval | None

    @property
    def n(self) -> int:
        """All drafts, failed ones included."""
        return self.helped + self.hurt + self.same + self.failed


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
    return Interval(0.0 if successes == 0 else middle - half, 1.0 if successes == n else middle + half)


def exact_sign_p(fixed: int, broken: int) -> float:
    """Two-sided exact binomial p at 1/2: the chance of a split at least this uneven when neither arm is better.

    Exact in integers, then one division; p = 1 when nothing differs. Below the least float, that float stands in.
    """
    n, fewer = fixed + broken, min(fixed, broken)
    term, tail = 1, 1
    for k in range(1, fewer + 1):
        term = term * (n - k + 1) // k
        tail += term
    return max(min(1.0, 2 * tail / 2**n), sys.float_info.min)


def paired_exact_test(first: Mapping[str, float | None], second: Mapping[str, float | None], *, level: float = 0.95) -> PairedTest:
    """Does ``second`` do better than ``first`` on the same examples? Scores by example id; None is a failure.

    For right and wrong this is McNemar's test in its exact form (McNemar 1947, Psychometrika 12:153); for graded scores
    the sign test, which asks how often and not how much. Examples without a score on both sides are left out and
    counted. The interval of the difference is Newcombe's for right and wrong, else a seeded bootstrap over examples.
    """
    both = [(a, b) for key, a in first.items() if a is not None and (b := second.get(key)) is not None]
    fixed = sum(b - a > SAME for a, b in both)
    broken = sum(a - b > SAME for a, b in both)
    left_out = len(first.keys() | second.keys()) - len(both)
    if not both:
        return PairedTest(0, 0, 0, 1.0, left_out, None, None)
    difference = statistics.fmean(b - a for a, b in both)
    if _binary(score for pair in both for score in pair):
        both_right = sum(a == b == 1 for a, b in both)
        interval = paired_difference_interval(both_right, fixed, broken, len(both) - both_right - fixed - broken, level)
    else:
        interval = bootstrap_mean_interval([[b - a] for a, b in both], level=level)
    return PairedTest(len(both), fixed, broken, exact_sign_p(fixed, broken), left_out, difference, interval)


def paired_difference_interval(both_right: int, fixed: int, broken: int, both_wrong: int, level: float = 0.95) -> Interval:
    """The interval of share(second) - share(first) for paired right and wrong.

    Newcombe 1998, Statistics in Medicine 17:2635, method 10 (Wilson limits, correlation corrected for continuity).


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
    """The percentile bootstrap of the mean of all values (Efron and Tibshirani 1993, chapter 13), drawing whole groups.

    One group per example: drafts of one example are not independent. The same seed gives the same interval. None for
    fewer than two groups, which say nothing about spread.
    """
    if len(groups) < 2:
        return None
    sums = np.array([math.fsum(group) for group in groups])
    sizes = np.array([len(group) for group in groups])
    generator = np.random.default_rng(seed)
    means = np.empty(repeats)
    for index in range(repeats):
        drawn = generator.integers(len(groups), size=len(groups))
        means[index] = sums[drawn].sum() / sizes[drawn].sum()
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def scores_of(arm: Arm) -> dict[str, float | None]:
    """Score by example id; None where the arm failed."""
    return {answer.example_id: answer.score for answer in arm.answers}


def arm_table(report: RunReport) -> list[ArmLine]:
    """One line per arm, in the report's order, each tested against the reference."""
    return [_arm_line(arm, report.arm(report.reference)) for arm in report.arms]


def compare(report: RunReport, first: str | None, second: str | None) -> PairedTest | None:
    """The paired test from one arm to another by name; None while either is missing."""
    one, other = report.arm(first), report.arm(second)
    return paired_exact_test(scores_of(one), scores_of(other)) if one and other else None


def influence_counts(rows: Iterable[InfluenceRow], *, seed: int = 0) -> InfluenceCounts:
    """Counts and mean influence of drafts, with a bootstrap interval over examples."""
    failed, groups = 0, defaultdict(list)
    for row in rows:
        if row.influence is None:
            failed += 1
        else:
            groups[row.example_id].append(row.influence)
    values = [value for group in groups.values() for value in group]
    helped, hurt = sum(value > SAME for value in values), sum(value < -SAME for value in values)
    mean = statistics.fmean(values) if values else None
    interval = bootstrap_mean_interval(list(groups.values()), seed=seed)
    return InfluenceCounts(helped, hurt, len(values) - helped - hurt, failed, mean, interval)


def influence_by_round(rows: Iterable[InfluenceRow]) -> dict[int, InfluenceCounts]:
    """``influence_counts`` of each round, in order."""
    rounds: dict[int, list[InfluenceRow]] = defaultdict(list)
    for row in rows:
        rounds[row.round].append(row)
    return {number: influence_counts(rounds[number]) for number in sorted(rounds)}


def _arm_line(arm: Arm, reference: Arm | None) -> ArmLine:
    scores = [answer.score for answer in arm.answers if answer.score is not None]
    asked, answered = len(arm.answers), len(scores)
    binary = _binary(scores)
    correct = round(sum(scores)) if binary else None
    if correct is not None:
        interval = wilson_interval(correct, answered) if answered else None
    else:
        interval = bootstrap_mean_interval([[score] for score in scores])
    is_reference = reference is not None and arm.name == reference.name
    test = paired_exact_test(scores_of(reference), scores_of(arm)) if reference and not is_reference else None
    return ArmLine(
        name=arm.name,
        title=arm.title,
        note=arm.note,
        asked=asked,
        answered=answered,
        failed=asked - answered,
        correct=correct,
        accuracy=math.fsum(scores) / answered if answered else None,
        interval=interval,
        strict_accuracy=math.fsum(scores) / asked if asked else None,
        is_reference=is_reference,
        test=test,
    )


def _binary(scores: Iterable[float]) -> bool:
    return all(score in (0, 1) for score in scores)


def _normal_quantile(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    return statistics.NormalDist().inv_cdf((1 + level) / 2)
