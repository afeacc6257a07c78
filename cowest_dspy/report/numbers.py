"""The statistics of a report: pure functions from scores to named numbers, each with its source.

A failure is not a score: what failed is counted beside the scores, never among them. Tests are
paired by example id, and say how many examples they had to leave out.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from cowest_dspy.influence.report import failure_kind
from cowest_dspy.influence.statistics import (
    Interval,
    bootstrap_mean_interval,
    share_interval,
    wilson_interval,
)
from cowest_dspy.influence.trace import Trace
from cowest_dspy.pairs.texts import plain
from cowest_dspy.report.facts import Arm, RunReport, TraceRow
from cowest_dspy.report.significance import SAME, PairedTest, is_binary, paired_exact_test

T = TypeVar("T")
SHARE, LEAST = 0.75, 20  # of an arm's drafts that are one text; fewer drafts say nothing


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
    return [_arm_line(arm, report.arm(report.main_arm)) for arm in report.arms]


def compare(report: RunReport, first: str | None, second: str | None) -> PairedTest | None:
    """The paired test from one arm to another by name; None while either is missing."""
    one, other = report.arm(first), report.arm(second)
    return paired_exact_test(scores_of(one), scores_of(other)) if one and other else None


def influence_counts(rows: Iterable[TraceRow | Trace], *, seed: int = 0) -> InfluenceCounts:
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


def influence_by_round(rows: Iterable[TraceRow | Trace]) -> dict[int, InfluenceCounts]:
    """``influence_counts`` of each round, in order."""
    rounds: dict[int, list[TraceRow | Trace]] = defaultdict(list)
    for row in rows:
        rounds[row.round].append(row)
    return {number: influence_counts(rounds[number]) for number in sorted(rounds)}


def _arm_line(arm: Arm, reference: Arm | None) -> ArmLine:
    scores = [answer.score for answer in arm.answers if answer.score is not None]
    asked, answered = len(arm.answers), len(scores)
    binary = is_binary(scores)
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


def alike_drafts(arms: Iterable[Arm]) -> str | None:
    """A warning that names the arms of which at least three in four drafts (of 20 or more) are one
    text, up to case and spaces.

    Such a drafter has learned which answer is common. A small held-out split then takes or rolls
    back a tuned model by how often the one text is right in it, whatever the drafts are worth. The
    text itself is not quoted, since a page may hide it.
    """
    named: list[str] = []
    for arm in arms:
        drafts = Counter(plain(answer.draft) for answer in arm.answers if answer.draft is not None)
        most, n = max(drafts.values(), default=0), drafts.total()
        if n >= LEAST and most >= SHARE * n:
            named.append(f"{arm.title} ({most:,} of {n:,})")
    if not named:
        return None
    return (
        "Drafts hardly depend on their inputs; nearly all of an arm are one and the same text: "
        f"{'; '.join(named)}. A gain or loss "
        "of such an arm may be no more than how often that text is right in these examples."
    )


def evenly(items: Sequence[T], most: int) -> list[T]:
    """At most ``most`` of the items, evenly spaced and in order: a sample that keeps the mix of
    early and late."""
    if len(items) <= most:
        return list(items)
    return [items[index * len(items) // most] for index in range(most)]
