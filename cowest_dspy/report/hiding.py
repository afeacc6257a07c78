"""Texts that are not shown unasked: the inputs that ``[report] hide`` names, on pages and in a terminal.

[report]
hide = ["context"]        # report.html says "(hidden: 74 characters)"

The store and report.json keep them, since pages and tables are made from these. Where another text of the same example (a draft,
an answer) repeats such an input word for word, it is hidden there too; a draft that puts it into words of its own is shown.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from cowest_dspy.report.model import Answer, PairRow, RunReport, TraceRow


def hidden_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The inputs that a configuration, as a dictionary, hides; none where it does not say."""
    table = config.get("report")
    return tuple(table.get("hide") or ()) if isinstance(table, Mapping) else ()


def mark(value: Any) -> str:
    """``mark("Hello.")`` is ``"(hidden: 6 characters)"``."""
    return f"(hidden: {len(str(value)):,} characters)"


def hide_inputs(inputs: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The inputs with a mark in the place of those of these names."""
    hide = set(names)
    return {name: mark(value) if name in hide else value for name, value in inputs.items()}


def hidden(report: RunReport) -> RunReport:
    """The report as it may be shown: the same one where its configuration hides nothing."""
    names = hidden_names(report.config)
    if not names:
        return report
    said: dict[str, dict[str, None]] = {}
    for row in (*(answer for arm in report.arms for answer in arm.answers), *report.traces):
        said.setdefault(row.example_id, {}).update(dict.fromkeys(str(row.inputs[name]) for name in names if name in row.inputs))

    def masking(example_id: str) -> Callable[[Any], Any]:
        return lambda value: _masked(value, said.get(example_id, {}))

    def answer_shown(answer: Answer) -> Answer:
        return _changed(answer, masking(answer.example_id), inputs=hide_inputs(answer.inputs, names))

    def trace_shown(trace: TraceRow) -> TraceRow:
        return _changed(trace, masking(trace.example_id), inputs=hide_inputs(trace.inputs, names))

    def pair_shown(pair: PairRow) -> PairRow:
        # A prompt is inputs in some format, of which only the whole is known here.
        return _changed(pair, masking(pair.example_id), prompt=mark(pair.prompt))

    pairs = report.pairs and dataclasses.replace(report.pairs, rows=tuple(map(pair_shown, report.pairs.rows)))
    arms = tuple(dataclasses.replace(arm, answers=tuple(map(answer_shown, arm.answers))) for arm in report.arms)
    return dataclasses.replace(report, arms=arms, traces=tuple(map(trace_shown, report.traces)), pairs=pairs)


def _changed(row: Any, change: Callable[[Any], Any], **given: Any) -> Any:
    """A copy of a row with these fields, and all others but its id changed."""
    names = (field.name for field in dataclasses.fields(row) if field.name not in ("example_id", *given))
    return dataclasses.replace(row, **{name: change(getattr(row, name)) for name in names}, **given)


def _masked(value: Any, texts: Iterable[str]) -> Any:
    """JSON values with a mark in the place of each of the texts; one that is a single word is left, it may well be an answer."""
    if isinstance(value, dict):
        return {key: _masked(item, texts) for key, item in value.items()}
    if isinstance(value, list):
        return [_masked(item, texts) for item in value]
    if isinstance(value, str):
        for text in sorted((text for text in texts if len(text.split()) > 1), key=len, reverse=True):
            value = value.replace(text.strip(), mark(text))
    return value
