"""The numbers that follow from a comparison: each arm over its seeds, corrected for the number of
tests; the tuned arms against their controls; the points of a sweep."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cowest_dspy.report.compared import ComparedArm, Comparison, paired_test
from cowest_dspy.report.numbers import ArmNumbers, arm_numbers
from cowest_dspy.report.significance import REPEATS, PairedTest, correct_tests


@dataclasses.dataclass(frozen=True)
class ControlTest:
    """A tuned arm against one of its controls: above 0 the tuned arm is better. ``holm`` is
    corrected over this arm's controls."""

    name: str
    title: str
    test: PairedTest
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


def compute_numbers(comparison: Comparison, *, repeats: int = REPEATS) -> Numbers:
    """All numbers of the comparison; ``repeats`` bootstrap samples per test. The order of arms and
    answers changes nothing.

    Arms of the same title get their names into it, so that they can be told apart.
    """
    seeds = _unite_titles(_group_seeds(comparison.arms))
    against = seeds.get(comparison.against)
    arms = [arm_numbers(runs, comparison.against, against, repeats) for runs in seeds.values()]
    points = defaultdict(list)
    for point in comparison.sweep:
        points[point.key].append(point)
    measured = []
    for group in points.values():
        ordered = sorted(group, key=lambda point: point.arm.seed)
        line = arm_numbers([point.arm for point in ordered], None, against, repeats)
        measured.append((ordered[0].settings, tuple(point.pairs for point in ordered), line))
    sweep = _correct_lines([line for _, _, line in measured])
    corrected = _correct_lines(arms)
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


def _group_seeds(arms: Iterable[ComparedArm]) -> dict[str, list[ComparedArm]]:
    """The seeds of each arm, ascending; names in order of appearance."""
    groups: dict[str, list[ComparedArm]] = defaultdict(list)
    for run in arms:
        groups[run.arm.name].append(run)
    return {name: sorted(runs, key=lambda run: run.seed) for name, runs in groups.items()}


def _unite_titles(seeds: Mapping[str, list[ComparedArm]]) -> dict[str, list[ComparedArm]]:
    """The same with one title and one note for all seeds of an arm, and different titles for
    different arms. Where a seed's arm is something else, such as untuned since its round was rolled
    back, the title says of which seed."""
    texts = {
        name: [
            _join_seeds([(run.seed, getattr(run.arm, field)) for run in runs])
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


def _join_seeds(texts: Sequence[tuple[int, str]]) -> str:
    """One text for all seeds: their own where they agree, otherwise each with its seeds.

    >>> _join_seeds([(0, "tuned"), (1, "tuned")])
    'tuned'
    >>> _join_seeds([(0, "tuned"), (1, "untuned"), (2, "tuned")])
    'seeds 0, 2: tuned; seed 1: untuned'
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


def _correct_lines(lines: Sequence[ArmNumbers]) -> list[ArmNumbers]:
    """The lines with Holm's p over those that have something to test."""
    ps = correct_tests([line.test for line in lines])
    strict = correct_tests([line.strict_test for line in lines])
    return [
        dataclasses.replace(line, holm=p, strict_holm=strict_p)
        for line, p, strict_p in zip(lines, ps, strict, strict=True)
    ]


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
        corrected = correct_tests([test for _, test in tests])
        found += [
            ControlTest(control, seeds[control][0].arm.title, test, p, name)
            for (control, test), p in zip(tests, corrected, strict=True)
            if p is not None
        ]
    return tuple(found)


def varying_settings(numbers: Numbers) -> list[str]:
    """The settings that differ between points of the sweep, in order of appearance."""
    keys = dict.fromkeys(key for point in numbers.sweep for key in point.settings)
    return [
        key for key in keys if len({_text(point.settings.get(key)) for point in numbers.sweep}) > 1
    ]


def format_settings(settings: dict[str, Any], keys: Sequence[str]) -> str:
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


def sweep_axis(numbers: Numbers) -> str | None:
    """The setting for the x axis: of those that vary, the one with most values, if they are
    numbers; None without one."""
    counts = {}
    for key in varying_settings(numbers):
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
    others = [key for key in varying_settings(numbers) if key != axis]
    series: dict[str, list[PointNumbers]] = {}
    for point in sorted(numbers.sweep, key=lambda point: point.settings[axis]):
        name = format_settings(point.settings, others) or point.arm.title
        series.setdefault(name, []).append(point)
    return {name: series[name] for name in sorted(series)}
