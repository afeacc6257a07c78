"""Every number that a page shows, from a report's facts: "numbers" in report.json, what charts and
tables are drawn from, and the JSON Schema of both.

    cowest report --schema        # prints it; docs/report.schema.json is what it printed last
"""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from pydantic import TypeAdapter

from cowest_dspy.influence.trace import Trace
from cowest_dspy.report.facts import SCHEMA_VERSION, RunReport, Stage
from cowest_dspy.report.numbers import (
    ArmNumbers,
    InfluenceCounts,
    arm_table,
    compare_arms,
    influence_by_round,
    influence_counts,
    mean_noise,
)
from cowest_dspy.report.significance import PairedTest
from cowest_dspy.report.verdict import verdict
from cowest_dspy.report.view import Verdict
from cowest_dspy.store.usage import total_usd

BINS = 21


@dataclasses.dataclass(frozen=True)
class Bin:
    """The number of drafts (``count``) with an influence from ``low`` up to, but not with,
    ``high``; the last bin has its end too."""

    low: float
    high: float
    count: int


@dataclasses.dataclass(frozen=True)
class Figures:
    """All numbers of a report. ``influence`` and ``distribution`` are by the number of the round,
    ``by_draft`` is by how right the drafts were themselves; ``graded`` says whether influences have
    more than the three values -1, 0 and +1. ``mean_noise`` is what a mean influence stays below
    when drafts do nothing. ``right_both`` counts what was right before tuning and after."""

    verdict: Verdict
    arms: tuple[ArmNumbers, ...]
    tuning: PairedTest | None
    right_both: int
    influence: dict[str, InfluenceCounts]
    distribution: dict[str, tuple[Bin, ...]]
    graded: bool
    mean_noise: float | None
    by_draft: dict[str, InfluenceCounts]
    totals: Stage

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return _ADAPTER.dump_python(self, mode="json")


def figures(report: RunReport) -> Figures:
    """All numbers of a report; the same report gives the same numbers."""
    rounds = influence_by_round(report.traces)
    values: dict[str, list[float]] = defaultdict(list)
    for row in report.traces:
        if row.influence is not None:
            values[str(row.round)].append(row.influence)
    return Figures(
        verdict=verdict(report),
        arms=tuple(arm_table(report)),
        tuning=compare_arms(report, report.before, report.after),
        right_both=_right_both(report),
        influence={str(number): counts for number, counts in rounds.items()},
        distribution={str(number): bins(values[str(number)]) for number in rounds},
        graded=len({round(value, 6) for known in values.values() for value in known}) > 3,
        mean_noise=mean_noise(report),
        by_draft=_by_draft(report.traces),
        totals=_totals(report),
    )


def bins(values: Sequence[float], count: int = BINS) -> tuple[Bin, ...]:
    """Equal bins over [-1, 1]; of an odd number of them the middle one is centred on 0.

    >>> [found.count for found in bins([-1.0, 0.0, 0.01, 1.0], 3)]
    [1, 2, 1]
    """
    import numpy as np

    counts, edges = np.histogram(values, count, (-1.0, 1.0))
    ends = [round(float(edge), 6) for edge in edges]
    return tuple(map(Bin, ends, ends[1:], map(int, counts)))


def _by_draft(traces: Sequence[Trace]) -> dict[str, InfluenceCounts]:
    """The influences of drafts by their own score: wrong and right, or in quarters where scores are
    graded; the lowest first."""
    scored = sorted(
        (trace.draft_score, place)
        for place, trace in enumerate(traces)
        if trace.draft_score is not None
    )
    binary = all(score in (0, 1) for score, _ in scored)
    groups: dict[str, list[Trace]] = defaultdict(list)
    for score, place in scored:
        low = min(0.75, int(4 * score) / 4)
        title = f"drafts that score {low:g} to {low + 0.25:g}"
        if binary:
            title = f"{'right' if score else 'wrong'} drafts"
        groups[title].append(traces[place])
    return {title: influence_counts(group) for title, group in groups.items()}


def _right_both(report: RunReport) -> int:
    before, after = report.arm(report.before), report.arm(report.after)
    if before is None or after is None:
        return 0
    right = {answer.example_id for answer in before.answers if answer.score == 1}
    return sum(answer.score == 1 and answer.example_id in right for answer in after.answers)


def _totals(report: RunReport) -> Stage:
    """Over all stages. A count is over the stages that measured it, None where none did; ``usd``
    None where a price is unknown."""

    def total(field: str) -> int | None:
        known = [value for stage in report.stages if (value := getattr(stage, field)) is not None]
        return sum(known) if known else None

    return Stage(
        name="total",
        seconds=sum(stage.seconds for stage in report.stages),
        calls=total("calls"),
        cached_calls=total("cached_calls"),
        tokens_in=total("tokens_in"),
        tokens_out=total("tokens_out"),
        usd=total_usd(stage.usd for stage in report.stages if stage.calls),
        peak_memory_bytes=max(
            (stage.peak_memory_bytes for stage in report.stages if stage.peak_memory_bytes),
            default=None,
        ),
    )


def report_schema() -> dict[str, Any]:
    """The schema, in the dialect 2020-12: facts of a ``RunReport``, their version, and under
    "numbers" what follows from them."""
    facts = TypeAdapter(RunReport).json_schema(mode="serialization", ref_template="#/$defs/{model}")
    numbers = TypeAdapter(Figures).json_schema(mode="serialization", ref_template="#/$defs/{model}")
    definitions = {**numbers.pop("$defs", {}), **facts.pop("$defs", {}), "Figures": numbers}
    properties = {
        "schema_version": {"const": SCHEMA_VERSION},
        **facts["properties"],
        "numbers": {"$ref": "#/$defs/Figures"},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "report.json of cowest_dspy",
        "description": facts.get("description", ""),
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
        "$defs": dict(sorted(definitions.items())),
    }


def schema_text() -> str:
    """The schema as a file has it."""
    return json.dumps(report_schema(), ensure_ascii=False, indent=1) + "\n"


_ADAPTER = TypeAdapter(Figures)
