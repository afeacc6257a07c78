"""The statistics of a report: pure functions from scores to named numbers, each with its source.

Two rules hold everywhere. A failure is not a score: what failed is counted beside the scores, never
among them. What is compared is compared on the same examples: tests are paired by example id, and
say how many they had to leave out.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cowest_dspy.influence.report import failure_kind
from cowest_dspy.influence.statistics import (
    Interval,
    bootstrap_mean_interval,
    paired_difference_interval,
    share_interval,
    wilson_interval,
)
from cowest_dspy.report.model import Arm, InfluenceRow, RunReport

SAME = 1e-9  # scores nearer than this are equal: means of judges' scores carry rounding


@dataclass(frozen=True)
class PairedTest:
    """Two arms on the same examples. ``fixed``: the second scores higher; ``broken``: lower; ``p``
    two-sided in (0, 1].

    ``difference`` is mean(second) - mean(first) over the ``n`` examples that both have a score for;
    ``left_out`` is the number of the others.
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
    """One arm in numbers. ``accuracy`` (0 to 1) is over the ``answered``; ``strict_accuracy``
    counts failures as wrong.

    ``failures`` counts the failed by kind. ``correct`` is None when scores are graded. ``test``
    goes from the reference to this arm: ``fixed`` is what only this arm gets right. It is None for
    the reference itself, and while the reference has not been evaluated.
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
    failures: dict[str, int]


@dataclass(frozen=True)
class InfluenceCounts:
    """Drafts that helped, hurt, changed nothing, or failed; the mean influence, in [-1, 1], of
    those that did not; ``failures`` counts the failed by kind.

    ``harm_rate`` is the share of drafts that hurt among those with an influence, in [0, 1],
    ``harm`` its 95 % interval; ``draft_quality`` the mean score of drafts as answers, where they
    hold one.
    """

    helped: int
    hurt: int
    same: int
    failed: int
    mean: float | None
    interval: Interval | None
    harm_rate: float | None
    harm: Interval | None
    draft_quality: float | None
    failures: dict[str, int]

    @property
    def n(self) -> int:
        """All drafts, failed ones included."""
        return self.helped + self.hurt + self.same + self.failed


def exact_sign_p(fixed: int, broken: int) -> float:
    """Two-sided exact binomial p at 1/2: the chance of a split at least this uneven when neither
    arm is better.

    Exact in integers, then one division; p = 1 when nothing differs. Below the least float, that
    float stands in.
    """
    n, fewer = fixed + broken, min(fixed, broken)
    term, tail = 1, 1
    for k in range(1, fewer + 1):
        term = term * (n - k + 1) // k
        tail += term
    return max(min(1.0, 2 * tail / 2**n), sys.float_info.min)


def paired_exact_test(
    first: Mapping[str, float | None], second: Mapping[str, float | None], *, level: float = 0.95
) -> PairedTest:
    """Does ``second`` do better than ``first`` on the same examples? Scores by example id; None is
    a failure.

    For right and wrong this is McNemar's test in its exact form (McNemar 1947, Psychometrika
    12:153); for graded scores the sign test, which asks how often and not how much. Examples
    without a score on both sides are left out and counted. The interval of the difference is
    Newcombe's for right and wrong, else a seeded bootstrap over examples.
    """
    both = [
        (a, b) for key, a in first.items() if a is not None and (b := second.get(key)) is not None
    ]
    fixed = sum(b - a > SAME for a, b in both)
    broken = sum(a - b > SAME for a, b in both)
    left_out = len(first.keys() | second.keys()) - len(both)
    if not both:
        return PairedTest(0, 0, 0, 1.0, left_out, None, None)
    difference = statistics.fmean(b - a for a, b in both)
    if _binary(score for pair in both for score in pair):
        both_right = sum(a == b == 1 for a, b in both)
        interval = paired_difference_interval(
            both_right, fixed, broken, len(both) - both_right - fixed - broken, level
        )
    else:
        interval = bootstrap_mean_interval([[b - a] for a, b in both], level=level)
    return PairedTest(
        len(both), fixed, broken, exact_sign_p(fixed, broken), left_out, difference, interval
    )


def failures_of(arm: Arm) -> dict[str, int]:
    """How many answers of the arm failed, by kind."""
    return dict(
        Counter(failure_kind(answer.error) for answer in arm.answers if answer.error is not None)
    )


def scores_of(arm: Arm) -> dict[str, float | None]:
    """Score by example id; None where the arm failed."""
    return {answer.example_id: answer.score for answer in arm.answers}


def arm_table(report: RunReport) -> list[ArmLine]:
    """One line per arm, in the report's order, each tested against the reference."""
    return [_arm_line(arm, report.arm(report.judged)) for arm in report.arms]


def compare(report: RunReport, first: str | None, second: str | None) -> PairedTest | None:
    """The paired test from one arm to another by name; None while either is missing."""
    one, other = report.arm(first), report.arm(second)
    return paired_exact_test(scores_of(one), scores_of(other)) if one and other else None


def influence_counts(rows: Iterable[InfluenceRow], *, seed: int = 0) -> InfluenceCounts:
    """Counts and mean influence of drafts, with a bootstrap interval over examples."""
    failures, groups, qualities = Counter[str](), defaultdict(list), list[float]()
    for row in rows:
        qualities += [] if row.draft_score is None else [row.draft_score]
        if row.influence is None:
            failures[failure_kind(row.error or "error")] += 1
        else:
            groups[row.example_id].append(row.influence)
    values = [value for group in groups.values() for value in group]
    helped, hurt = sum(value > SAME for value in values), sum(value < -SAME for value in values)
    mean = statistics.fmean(values) if values else None
    interval = bootstrap_mean_interval(list(groups.values()), seed=seed)
    harm = share_interval(
        [[value < -SAME for value in group] for group in groups.values()], seed=seed
    )
    quality = statistics.fmean(qualities) if qualities else None
    rate = hurt / len(values) if values else None
    same, failed = len(values) - helped - hurt, failures.total()
    return InfluenceCounts(
        helped, hurt, same, failed, mean, interval, rate, harm, quality, dict(failures)
    )


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
    test = (
        paired_exact_test(scores_of(reference), scores_of(arm))
        if reference and not is_reference
        else None
    )
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
        failures=failures_of(arm),
    )


def _binary(scores: Iterable[float]) -> bool:
    return all(score in (0, 1) for score in scores)
