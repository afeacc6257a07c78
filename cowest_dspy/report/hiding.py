"""The report as it may be shown: without the inputs that ``[report] hide`` names
(``cowest_dspy.utils.hiding``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from cowest_dspy.influence.arms import Answer
from cowest_dspy.report.model import PairRow, RunReport, TraceRow
from cowest_dspy.utils.hiding import hidden_names, hide_inputs, mark, without


def hidden(report: RunReport) -> RunReport:
    """The report as it may be shown: the same one where its configuration hides nothing."""
    names = hidden_names(report.config)
    if not names:
        return report
    said: dict[str, dict[str, None]] = {}
    for row in (*(answer for arm in report.arms for answer in arm.answers), *report.traces):
        said.setdefault(row.example_id, {}).update(
            dict.fromkeys(str(row.inputs[name]) for name in names if name in row.inputs)
        )

    def masking(example_id: str) -> Callable[[Any], Any]:
        return lambda value: without(value, said.get(example_id, {}))

    def answer_shown(answer: Answer) -> Answer:
        return _changed(
            answer, masking(answer.example_id), inputs=hide_inputs(answer.inputs, names)
        )

    def trace_shown(trace: TraceRow) -> TraceRow:
        return _changed(trace, masking(trace.example_id), inputs=hide_inputs(trace.inputs, names))

    def pair_shown(pair: PairRow) -> PairRow:
        # A prompt is inputs in some format, of which only the whole is known here.
        return _changed(pair, masking(pair.example_id), prompt=mark(pair.prompt))

    pairs = report.pairs and dataclasses.replace(
        report.pairs, rows=tuple(map(pair_shown, report.pairs.rows))
    )
    arms = tuple(
        dataclasses.replace(arm, answers=tuple(map(answer_shown, arm.answers)))
        for arm in report.arms
    )
    return dataclasses.replace(
        report, arms=arms, traces=tuple(map(trace_shown, report.traces)), pairs=pairs
    )


def _changed(row: Any, change: Callable[[Any], Any], **given: Any) -> Any:
    """A copy of a row with these fields, and all others but its id changed."""
    names = (
        field.name for field in dataclasses.fields(row) if field.name not in ("example_id", *given)
    )
    return dataclasses.replace(row, **{name: change(getattr(row, name)) for name in names}, **given)
