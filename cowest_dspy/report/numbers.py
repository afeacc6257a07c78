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

from cowest_dspy.influence.report import InfluenceReport, failure_kind
from cowest_dspy.influence.statistics import Interval, bootstrap_mean_interval, wilson_interval
from cowest_dspy.influence.trace import Trace
from cowest_dspy.pairs.filters import plain
from cowest_dspy.report.facts import Arm, RunReport
from cowest_dspy.report.significance import PairedTest, is_binary, paired_exact_test

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


def influence_counts(traces: Iterable[Trace], *, seed: int = 0) -> InfluenceCounts:
    """Counts and mean influence of drafts, with bootstrap intervals over examples."""
    traces = list(traces)
    found = InfluenceReport.from_traces(traces)
    qualities = [trace.draft_score for trace in traces if trace.draft_score is not None]
    return InfluenceCounts(
        **found.counts,
        mean=found.mean if found.scored else None,
        interval=found.interval(seed=seed),
        harm_rate=found.harm_rate if found.scored else None,
        harm=found.harm_interval(seed=seed),
        draft_quality=statistics.fmean(qualities) if qualities else None,
        failures=dict(found.failures),
    )


def mean_noise(report: RunReport) -> float | None:
    """What a mean influence over the run's examples stays below, in 97.5 % of cases, when drafts do
    nothing; None where the noise floor was not measured."""
    examples = {trace.example_id for trace in report.traces if trace.influence is not None}
    if report.noise is None or not examples:
        return None
    answers = max(len(trace.alone_scores) for trace in report.traces) or 1
    return report.noise.of_mean(len(examples), answers)


def influence_by_round(traces: Iterable[Trace]) -> dict[int, InfluenceCounts]:
    """``influence_counts`` of each round, in order."""
    rounds: dict[int, list[Trace]] = defaultdict(list)
    for trace in traces:
        rounds[trace.round].append(trace)
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
