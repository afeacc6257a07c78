"""The numbers that follow from a comparison: scores, intervals, tests and costs of each arm.

Three rules hold everywhere. A failure is not a score: each arm has a score over what it answered
and a strict one that counts failures as wrong, and each test is made both ways. What is compared is
compared on the same examples. The answers to one example under several seeds are not independent:
they are drawn together, never apart.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from typing import Any

from cowest_dspy.influence.statistics import Interval, bootstrap_mean_interval, wilson_interval
from cowest_dspy.report.compared import ComparedArm, Comparison, paired_test, scores_of_run
from cowest_dspy.report.facts import Stage
from cowest_dspy.report.numbers import failures_of
from cowest_dspy.report.significance import (
    REPEATS,
    Paired,
    finding,
    holm,
    is_binary,
)
from cowest_dspy.store.usage import add_usd


@dataclasses.dataclass(frozen=True)
class Spread:
    """Means of single seeds: their mean, the lowest, the highest, and the sample standard deviation
    (n - 1)."""

    mean: float
    low: float
    high: float
    sd: float


@dataclasses.dataclass(frozen=True)
class Extra:
    """A further score over the corpus: one value per seed that has it, and their mean. ``interval``
    only for a single seed."""

    values: tuple[float, ...]
    mean: float | None
    interval: Interval | None


@dataclasses.dataclass(frozen=True)
class Cost:
    """Summed over seeds. ``calls`` were made, ``calls_in_all`` are these and those that a store
    answered; None: not known."""

    calls: int | None
    calls_in_all: int | None
    tokens_in: int | None
    tokens_out: int | None
    usd: float | None
    seconds: float | None


@dataclasses.dataclass(frozen=True)
class ArmNumbers:
    """One arm over its seeds. ``n`` counts different examples; ``asked``, ``answered`` and
    ``failed`` count answers of all seeds.

    ``failures`` counts the failed by kind. ``binary``: every score is 0 or 1. ``score`` (0 to 1) is
    over the answered, ``strict_score`` counts failures as wrong, both with 95 % intervals;
    ``seed_scores`` are over the answered of single seeds, in the order of ``seeds``; ``spread`` is
    theirs, None for fewer than two. ``test`` and ``strict_test`` go from ``against`` to this arm,
    ``holm`` and ``strict_holm`` are their p corrected over all arms; None for ``against`` itself,
    and while there is nothing to test.
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
    score: float | None
    interval: Interval | None
    strict_score: float | None
    strict_interval: Interval | None
    seed_scores: tuple[float | None, ...]
    spread: Spread | None
    extra: dict[str, Extra]
    cost: Cost
    is_against: bool
    test: Paired | None
    strict_test: Paired | None
    holm: float | None = None
    strict_holm: float | None = None
    failures: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def finding(self) -> int | None:
        """1: better than ``against`` after correction, -1: worse, 0: not distinguishable; None: not
        tested."""
        return finding(self.test, self.holm)


@dataclasses.dataclass(frozen=True)
class ControlTest:
    """A tuned arm against one of its controls: above 0 the tuned arm is better. ``holm`` is
    corrected over this arm's controls."""

    name: str
    title: str
    test: Paired
    holm: float
    target: str


@dataclasses.dataclass(frozen=True)
class PointNumbers:
    """One setting of a sweep; ``pairs`` per seed. Its p is corrected over the sweep, apart from the
    arms."""

    settings: dict[str, Any]
    pairs: tuple[int | None, ...]
    arm: ArmNumbers


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Everything that follows from a comparison. ``tests`` is the number of arms that Holm's
    correction is over."""

    arms: tuple[ArmNumbers, ...]
    controls: tuple[ControlTest, ...]
    sweep: tuple[PointNumbers, ...]
    tests: int

    def arm(self, name: str) -> ArmNumbers | None:
        """The arm of that name, or None."""
        return next((arm for arm in self.arms if arm.name == name), None)

    @property
    def extras(self) -> tuple[str, ...]:
        """The names of further scores, in order of appearance."""
        lines = [*self.arms, *(point.arm for point in self.sweep)]
        return tuple(dict.fromkeys(name for line in lines for name in line.extra))


def numbers_of(comparison: Comparison, *, repeats: int = REPEATS) -> Numbers:
    """All numbers of the comparison; ``repeats`` bootstrap samples per test. The order of arms and
    answers changes nothing.

    Arms of the same title get their names into it, so that they can be told apart.
    """
    seeds = _titled(_by_name(comparison.arms))
    against = seeds.get(comparison.against)
    arms = [_arm_numbers(runs, comparison.against, against, repeats) for runs in seeds.values()]
    points = defaultdict(list)
    for point in comparison.sweep:
        points[point.key].append(point)
    measured = []
    for group in points.values():
        ordered = sorted(group, key=lambda point: point.arm.seed)
        line = _arm_numbers([point.arm for point in ordered], None, against, repeats)
        measured.append((ordered[0].settings, tuple(point.pairs for point in ordered), line))
    sweep = _corrected([line for _, _, line in measured])
    corrected = _corrected(arms)
    return Numbers(
        arms=tuple(corrected),
        controls=_controls(comparison, seeds, repeats),
        sweep=tuple(
            PointNumbers(at, pairs, line)
            for (at, pairs, _), line in zip(measured, sweep, strict=True)
        ),
        tests=sum(line.holm is not None for line in corrected),
    )


def is_control(run: ComparedArm) -> bool:
    """Whether the arm is a control: its name begins with "control", or its note has that word."""
    return (
        run.arm.name.lower().startswith("control")
        or re.search(r"\bcontrols?\b", run.arm.note, re.IGNORECASE) is not None
    )


def _by_name(arms: Iterable[ComparedArm]) -> dict[str, list[ComparedArm]]:
    """The seeds of each arm, ascending; names in order of appearance."""
    groups: dict[str, list[ComparedArm]] = defaultdict(list)
    for run in arms:
        groups[run.arm.name].append(run)
    return {name: sorted(runs, key=lambda run: run.seed) for name, runs in groups.items()}


def _arm_numbers(
    runs: Sequence[ComparedArm],
    against_name: str | None,
    against: Sequence[ComparedArm] | None,
    repeats: int,
) -> ArmNumbers:
    first = runs[0].arm
    by_seed = [scores_of_run(run, strict=False) for run in runs]
    known = [[score for score in scores.values() if score is not None] for scores in by_seed]
    asked, answered = sum(map(len, by_seed)), sum(map(len, known))
    score, interval = _mean(by_seed)
    strict_score, strict_interval = _mean([scores_of_run(run, strict=True) for run in runs])
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
        binary=is_binary(value for scores in known for value in scores),
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
        failures=dict(reduce(Counter.__add__, (Counter(failures_of(run.arm)) for run in runs))),
    )


def _titled(seeds: Mapping[str, list[ComparedArm]]) -> dict[str, list[ComparedArm]]:
    """The same with one title and one note for all seeds of an arm, and different titles for
    different arms. Where a seed's arm is something else, such as untuned since its round was rolled
    back, the title says of which seed."""
    texts = {
        name: [
            _of_seeds([(run.seed, getattr(run.arm, field)) for run in runs])
            for field in ("title", "note")
        ]
        for name, runs in seeds.items()
    }
    count = Counter(title for title, _ in texts.values())

    def renamed(run: ComparedArm) -> ComparedArm:
        title, note = texts[run.arm.name]
        title = title if count[title] == 1 else f"{title} ({run.arm.name})"
        return dataclasses.replace(run, arm=dataclasses.replace(run.arm, title=title, note=note))

    return {name: [renamed(run) for run in runs] for name, runs in seeds.items()}


def _of_seeds(texts: Sequence[tuple[int, str]]) -> str:
    """One text for all seeds: their own where they agree, otherwise each with its seeds.

    >>> _of_seeds([(0, "tuned"), (1, "tuned")]), _of_seeds([(0, "tuned"), (1, "untuned"), (2, "tuned")])
    ('tuned', 'seeds 0, 2: tuned; seed 1: untuned')
    """
    seeds: dict[str, list[str]] = defaultdict(list)
    for seed, text in texts:
        seeds[text].append(str(seed))
    if len(seeds) == 1:
        return texts[0][1]
    return "; ".join(
        f"seed{'s' * (len(of) > 1)} {', '.join(of)}: {text or 'no note'}"
        for text, of in seeds.items()
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


def _corrected(lines: Sequence[ArmNumbers]) -> list[ArmNumbers]:
    """The lines with Holm's p over those that have something to test."""
    changed = list(lines)
    for test, field in (("test", "holm"), ("strict_test", "strict_holm")):
        tested = [
            (index, made)
            for index, line in enumerate(lines)
            if (made := getattr(line, test)) is not None and made.n
        ]
        for (index, _), p in zip(tested, holm([made.p for _, made in tested]), strict=True):
            changed[index] = dataclasses.replace(changed[index], **{field: p})
    return changed


def controls_of(comparison: Comparison) -> dict[str, tuple[str, ...]]:
    """The controls of each tuned arm that has some, by name, whether or not it has been evaluated;
    the target's first."""
    there = dict.fromkeys(run.arm.name for run in comparison.arms if is_control(run))
    declared = comparison.controls or {comparison.target: tuple(there)}
    made = {
        target: tuple(name for name in names if name in there and name != target)
        for target, names in declared.items()
    }
    return {
        target: made[target]
        for target in sorted(made, key=lambda name: name != comparison.target)
        if made[target]
    }


def _controls(
    comparison: Comparison, seeds: Mapping[str, Sequence[ComparedArm]], repeats: int
) -> tuple[ControlTest, ...]:
    found = list[ControlTest]()
    for name, controls in controls_of(comparison).items():
        if name not in seeds:
            continue
        tests = [
            (control, paired_test(seeds[name], seeds[control], repeats=repeats))
            for control in controls
        ]
        made = [(control, test) for control, test in tests if test.n]
        corrected = holm([test.p for _, test in made])
        found += [
            ControlTest(control, seeds[control][0].arm.title, test, p, name)
            for (control, test), p in zip(made, corrected, strict=True)
        ]
    return tuple(found)


def varying(numbers: Numbers) -> list[str]:
    """The settings that differ between points of the sweep, in order of appearance."""
    keys = dict.fromkeys(key for point in numbers.sweep for key in point.settings)
    return [
        key for key in keys if len({_text(point.settings.get(key)) for point in numbers.sweep}) > 1
    ]


def settings_text(settings: dict[str, Any], keys: Sequence[str]) -> str:
    """``beta 0.1, format dpo``: the last part of each dotted key where that names only one of them,
    else the whole key."""
    last = [key.rpartition(".")[2] for key in keys]
    names = {
        key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)
    }
    return ", ".join(
        f"{name} {_text(settings[key])}" for key, name in names.items() if key in settings
    )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def difference_reach(numbers: Numbers) -> int:
    """How many points the axis of differences reaches to either side: a multiple of 10, at least
    10, at most 100."""
    tests = [line.test for line in numbers.arms if line.test and line.test.difference is not None]
    ends = [abs(test.difference or 0.0) for test in tests]
    ends += [abs(end) for test in tests if (one := test.interval) for end in (one.low, one.high)]
    return min(100, max(10, 10 * math.ceil(10 * max(ends, default=0.0) - 1e-9)))


def sweep_axis(numbers: Numbers) -> str | None:
    """The setting for the x axis: of those that vary, the one with most values, if they are
    numbers; None without one."""
    counts = {}
    for key in varying(numbers):
        values = [point.settings.get(key) for point in numbers.sweep]
        if all(
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            for value in values
        ):
            counts[key] = len(set(values))
    return max(counts, key=lambda key: counts[key]) if counts else None


def sweep_series(numbers: Numbers, axis: str) -> dict[str, list[PointNumbers]]:
    """The points of each combination of the other settings, ascending along the axis, under a name
    for the legend."""
    others = [key for key in varying(numbers) if key != axis]
    series: dict[str, list[PointNumbers]] = {}
    for point in sorted(numbers.sweep, key=lambda point: point.settings[axis]):
        name = settings_text(point.settings, others) or point.arm.title
        series.setdefault(name, []).append(point)
    return {name: series[name] for name in sorted(series)}
