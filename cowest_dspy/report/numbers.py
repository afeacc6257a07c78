"""The numbers that follow from the arms and drafts of a report or a comparison: scores, intervals,
tests, costs, influences.

A failure is not a score: each arm has a score over what it answered and a strict one that counts
failures as wrong, and each test is made both ways. Tests are paired by example id, and say how many
examples they had to leave out. The answers to one example under several seeds are not independent:
they are drawn together, never apart.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, TypeVar

from cowest_dspy.influence.report import InfluenceReport
from cowest_dspy.influence.statistics import Interval, bootstrap_mean_interval, wilson_interval
from cowest_dspy.influence.trace import Trace
from cowest_dspy.pairs.texts import plain
from cowest_dspy.report.compared import ComparedArm, paired_test
from cowest_dspy.report.facts import Arm, RunReport, Stage
from cowest_dspy.report.significance import (
    REPEATS,
    PairedTest,
    compare_scores,
    finding,
    is_binary,
)
from cowest_dspy.store.usage import add_usd

T = TypeVar("T")
SHARE, LEAST = 0.75, 20  # of an arm's drafts that are one text; fewer drafts say nothing


@dataclass(frozen=True)
class Spread:
    """Means of single seeds: their mean, the lowest, the highest, and the sample standard deviation
    (n - 1)."""

    mean: float
    low: float
    high: float
    sd: float


@dataclass(frozen=True)
class Extra:
    """A further score over the corpus: one value per seed that has it, and their mean. ``interval``
    only for a single seed."""

    values: tuple[float, ...]
    mean: float | None
    interval: Interval | None


@dataclass(frozen=True)
class Cost:
    """Summed over seeds. ``calls`` were made, ``calls_in_all`` are these and those that a store
    answered; None: not known."""

    calls: int | None
    calls_in_all: int | None
    tokens_in: int | None
    tokens_out: int | None
    usd: float | None
    seconds: float | None


@dataclass(frozen=True)
class ArmNumbers:
    """One arm over its seeds. ``n`` counts different examples; ``asked``, ``answered`` and
    ``failed`` count answers of all seeds.

    ``failures`` counts the failed by kind. ``binary``: every score is 0 or 1, and then ``correct``
    of them are 1. ``score`` (0 to 1) is over the answered, ``strict_score`` counts failures as
    wrong, both with 95 % intervals; ``seed_scores`` are over the answered of single seeds, in the
    order of ``seeds``; ``spread`` is theirs, None for fewer than two. ``test`` and ``strict_test``
    go from ``against`` to this arm, ``holm`` and ``strict_holm`` are their p corrected over all
    arms of a comparison; None for ``against`` itself, and while there is nothing to test.
    """

    name: str
    title: str
    note: str
    seeds: tuple[int, ...]
    n: int
    asked: int
    answered: int
    failed: int
    binary: bool
    correct: int | None
    score: float | None
    interval: Interval | None
    strict_score: float | None
    strict_interval: Interval | None
    seed_scores: tuple[float | None, ...]
    spread: Spread | None
    extra: dict[str, Extra]
    cost: Cost
    is_against: bool
    test: PairedTest | None
    strict_test: PairedTest | None
    holm: float | None = None
    strict_holm: float | None = None
    failures: dict[str, int] = field(default_factory=dict)

    @property
    def finding(self) -> int | None:
        """1: better than ``against`` after correction, -1: worse, 0: not distinguishable; None: not
        tested."""
        return finding(self.test, self.holm)


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


def arm_table(report: RunReport) -> list[ArmNumbers]:
    """One line per arm, in the report's order, each tested against the main arm."""
    runs = {arm.name: [ComparedArm(arm, report.seed)] for arm in report.arms}
    main = report.main_arm
    return [arm_numbers(run, main, runs.get(main)) for run in runs.values()]


def compare_arms(report: RunReport, first: str | None, second: str | None) -> PairedTest | None:
    """The paired test of the second arm against the first, by name; None while either is
    missing."""
    one, other = report.arm(first), report.arm(second)
    return compare_scores(other.scores(), one.scores()) if one and other else None


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
    """The bound that a mean influence over the run's examples stays below, in 97.5 % of cases, when
    drafts do nothing; None where the noise floor was not measured."""
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


def arm_numbers(
    runs: Sequence[ComparedArm],
    against_name: str | None,
    against: Sequence[ComparedArm] | None,
    repeats: int = REPEATS,
) -> ArmNumbers:
    """One arm over its seeds, tested against the arm named ``against_name``, which has the seeds
    ``against``."""
    first = runs[0].arm
    by_seed = [run.arm.scores() for run in runs]
    known = [[score for score in scores.values() if score is not None] for scores in by_seed]
    asked, answered = sum(map(len, by_seed)), sum(map(len, known))
    binary = is_binary(value for scores in known for value in scores)
    score, interval = _mean(by_seed)
    strict_score, strict_interval = _mean([run.arm.scores(strict=True) for run in runs])
    seed_scores = tuple(math.fsum(scores) / len(scores) if scores else None for scores in known)
    is_against = first.name == against_name
    test = strict_test = None
    if against is not None and not is_against:
        test = paired_test(runs, against, repeats=repeats)
        failures = answered < asked or any(
            answer.score is None for run in against for answer in run.arm.answers
        )
        strict_test = paired_test(runs, against, strict=True, repeats=repeats) if failures else test
    return ArmNumbers(
        name=first.name,
        title=first.title,
        note=first.note,
        seeds=tuple(run.seed for run in runs),
        n=len(set[str]().union(*by_seed)),
        asked=asked,
        answered=answered,
        failed=asked - answered,
        binary=binary,
        correct=round(sum(map(math.fsum, known))) if binary else None,
        score=score,
        interval=interval,
        strict_score=strict_score,
        strict_interval=strict_interval,
        seed_scores=seed_scores,
        spread=_spread([value for value in seed_scores if value is not None]),
        extra={
            name: _extra(name, runs)
            for name in dict.fromkeys(name for run in runs for name in run.extra)
        },
        cost=_cost(runs),
        is_against=is_against,
        test=test,
        strict_test=strict_test,
        failures=dict(reduce(Counter.__add__, (Counter(run.arm.failures) for run in runs))),
    )


def _mean(by_seed: Sequence[Mapping[str, float | None]]) -> tuple[float | None, Interval | None]:
    """The mean of all scores, with Wilson's interval for 0 and 1 of one seed, else a bootstrap over
    examples."""
    groups: dict[str, list[float]] = defaultdict(list)
    for scores in by_seed:
        for example, score in scores.items():
            if score is not None:
                groups[example].append(score)
    values = [value for group in groups.values() for value in group]
    if not values:
        return None, None
    mean = math.fsum(values) / len(values)
    if len(by_seed) == 1 and is_binary(values):
        return mean, wilson_interval(round(sum(values)), len(values))
    return mean, bootstrap_mean_interval([groups[example] for example in sorted(groups)])


def _spread(values: Sequence[float]) -> Spread | None:
    if len(values) < 2:
        return None
    return Spread(statistics.fmean(values), min(values), max(values), statistics.stdev(values))


def _extra(name: str, runs: Sequence[ComparedArm]) -> Extra:
    values = tuple(value for run in runs if (value := run.extra.get(name)) is not None)
    ends = runs[0].extra_intervals.get(name) if len(runs) == 1 else None
    return Extra(
        values, statistics.fmean(values) if values else None, Interval(*ends) if ends else None
    )


def _cost(runs: Sequence[ComparedArm]) -> Cost:
    def total(field: str) -> Any:
        return reduce(add_usd, (getattr(run.cost, field) if run.cost else None for run in runs))

    def in_all(cost: Stage | None) -> Any:
        return add_usd(cost.calls, cost.cached_calls) if cost else None

    one = {field: total(field) for field in ("calls", "tokens_in", "tokens_out", "usd", "seconds")}
    calls_in_all: Any = reduce(add_usd, (in_all(run.cost) for run in runs))
    return Cost(**one, calls_in_all=calls_in_all)


def describe_alike_drafts(arms: Iterable[Arm]) -> str | None:
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
        f"{'; '.join(named)}. A gain or loss of such an arm may be no more than how often that "
        "text is right in these examples."
    )


def sample_evenly(items: Sequence[T], most: int) -> list[T]:
    """At most ``most`` of the items, evenly spaced and in order: a sample that keeps the mix of
    early and late."""
    if len(items) <= most:
        return list(items)
    return [items[index * len(items) // most] for index in range(most)]
