"""From reports to what stands side by side: pure functions. What is compared is compared on the
same examples, by a paired test."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import PurePath
from typing import Any

from cowest_dspy.report import Arm, RunReport, arm_table, verdict
from cowest_dspy.report.comparison import ComparedArm, holm, paired_test
from cowest_dspy.report.comparison.significance import ALPHA, found
from cowest_dspy.report.comparison.verdict import format_difference
from cowest_dspy.report.masking import mask_document
from cowest_dspy.report.numbers import compare
from cowest_dspy.report.page import flat
from cowest_dspy.report.side_by_side.model import ArmCell, RunColumn, RunTest, SideBySide
from cowest_dspy.report.verdict import format_p
from cowest_dspy.store.usage import total_usd

ROLES = ("weak", "strong", "judge")
LACKING = "-"


def side_by_side(reports: Mapping[str, RunReport]) -> SideBySide:
    """The view of several runs, by name and in order. Every two runs are tested on the arm that
    both are about (``reference``), where they have test examples and a metric in common; p are
    corrected over all these tests (Holm). Secrets are masked."""
    masked = {name: _masked(report) for name, report in reports.items()}
    tests = _corrected([_test(masked, *two) for two in combinations(masked, 2)])
    return SideBySide(
        runs=tuple(_column(name, report) for name, report in masked.items()),
        tests=tuple(tests),
        settings=_differing([dict(flat(report.config)) for report in masked.values()]),
        versions=_differing([report.versions for report in masked.values()]),
        sentences=tuple(
            _sentence(test, sum(one.test is not None for one in tests)) for test in tests
        ),
    )


def _masked(report: RunReport) -> RunReport:
    return RunReport.from_json(mask_document(report.to_json()))


def _column(name: str, report: RunReport) -> RunColumn:
    told = verdict(report)
    stages = report.stages
    return RunColumn(
        name=name,
        title=report.title,
        created=report.created,
        seed=report.seed,
        verdict=told.sentences,
        good=told.good,
        warnings=report.warnings,
        examples=len(_examples(report)),
        arms=tuple(
            ArmCell(line.name, line.title, line.answered, line.failed, line.accuracy, line.interval)
            for line in arm_table(report)
        ),
        tuning=compare(report, report.before, report.after),
        rounds=tuple(
            f"{row.number}: {row.outcome}, gain {row.gain}, {row.pairs:,} pairs"
            for row in report.rounds
        ),
        pairs=report.pairs.kept if report.pairs else None,
        calls=sum(stage.calls or 0 for stage in stages),
        cached=sum(stage.cached_calls or 0 for stage in stages),
        tokens=sum((stage.tokens_in or 0) + (stage.tokens_out or 0) for stage in stages),
        usd=total_usd(stage.usd for stage in stages if stage.calls),
        seconds=sum(stage.seconds for stage in stages),
        models={role: _model(report.config.get(role)) for role in ROLES if report.config.get(role)},
    )


def _model(settings: Any) -> str:
    """A model for people: its id, of a folder its name, with the precision where that is part of
    what it is."""
    if not isinstance(settings, Mapping):
        return str(settings)
    model = str(settings.get("model", "?"))
    local = PurePath(model).name if PurePath(model).is_absolute() else model
    return f"{local} ({settings['dtype']})" if settings.get("dtype", "auto") != "auto" else local


def _examples(report: RunReport) -> dict[str, str]:
    """Each test example by id, as what makes it the same one: its inputs and its expected
    answer."""
    made: dict[str, str] = {}
    for arm in report.arms:
        for answer in arm.answers:
            made.setdefault(
                answer.example_id,
                json.dumps([answer.inputs, answer.gold], sort_keys=True, default=str),
            )
    return made


def _test(reports: Mapping[str, RunReport], first: str, second: str) -> RunTest:
    one, two = reports[first], reports[second]
    arms = [report.arm(report.reference) for report in (one, two)]
    title = next((arm.title for arm in arms if arm), one.reference)
    missing = [name for name, arm in zip((first, second), arms, strict=True) if arm is None]
    if missing:
        return _refused(
            first, second, title, f"{' and '.join(missing)} has not evaluated that arm yet"
        )
    metrics = [_metric(report) for report in (one, two)]
    if metrics[0] != metrics[1]:
        return _refused(
            first,
            second,
            title,
            f"they are scored by different metrics, {metrics[0]} and {metrics[1]}",
        )
    mine, theirs = _examples(one), _examples(two)
    shared = {
        example for example in mine.keys() & theirs.keys() if mine[example] == theirs[example]
    }
    if not shared:
        return _refused(first, second, title, "they have no test example in common")
    before, after = (ComparedArm(_only(arm, shared)) for arm in arms if arm)
    return RunTest(first, second, title, len(shared), paired_test([after], [before]), None, None)


def _refused(first: str, second: str, title: str, why: str) -> RunTest:
    return RunTest(first, second, title, 0, None, None, None, why)


def _metric(report: RunReport) -> str:
    """The metric's file and name, wherever the file is; "" where the report does not say."""
    return PurePath(str(report.config.get("metric", ""))).name


def _only(arm: Arm, examples: set[str]) -> Arm:
    return dataclasses.replace(
        arm, answers=tuple(answer for answer in arm.answers if answer.example_id in examples)
    )


def _corrected(tests: Sequence[RunTest]) -> list[RunTest]:
    made = [test.test for test in tests]
    known = [one.p for one in made if one is not None]
    corrected = iter(holm(known))
    changed = []
    for test in tests:
        if test.test is None:
            changed.append(test)
            continue
        p = next(corrected)
        changed.append(dataclasses.replace(test, holm=p, finding=found(test.test, p)))
    return changed


def _sentence(made: RunTest, tests: int) -> str:
    if made.test is None or made.holm is None:
        return f"{made.first} and {made.second} are not comparable: {made.why}."
    words = {
        1: "is better than",
        -1: "is WORSE than",
        0: "cannot be told from",
        None: "cannot be told from",
    }[made.finding]
    over = f"Holm over {tests} {'test' if tests == 1 else 'tests'}, two-sided {ALPHA:g}"
    left = f", {made.test.left_out} left out because an answer failed" if made.test.left_out else ""
    return (
        f"{made.second} {words} {made.first} ({made.arm}): {format_difference(made.test)} points "
        f"on the {made.test.n} test "
        f"examples that they share{left}, {format_p(made.holm)} ({over})."
    )


def _differing(tables: Sequence[Mapping[str, str]]) -> dict[str, tuple[str, ...]]:
    """The keys whose values are not the same in all tables, in order of appearance."""
    keys = dict.fromkeys(key for table in tables for key in table)
    rows = {key: tuple(table.get(key, LACKING) for table in tables) for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}
