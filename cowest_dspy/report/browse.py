"""Answers and traces as lists to search and read: what the page's script pages through, cut to a size a browser likes.

A list is plain JSON: ``columns``, ``filters`` (a label and the tags that it offers), ``rows`` with ``tags``, ``cells``
(``[text, kind]``) and ``steps`` (``[label, text]``; with a kind it is a heading), and ``total``, how many there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from cowest_dspy.report.model import Answer, RunReport, TraceRow
from cowest_dspy.report.numbers import SAME

MAX_ROWS = 2000
MAX_TEXT = 4000
T = TypeVar("T")


def answer_list(report: RunReport, max_rows: int = MAX_ROWS) -> dict[str, Any]:
    """The held-out examples, one row each, with every arm's answer; tags: what tuning fixed, which arm was right."""
    by_id = [{answer.example_id: answer for answer in arm.answers} for arm in report.arms]
    ids = list(dict.fromkeys(example_id for answers in by_id for example_id in answers))
    rows = []
    for example_id in evenly(ids, max_rows):
        found = {arm.name: answers.get(example_id) for arm, answers in zip(report.arms, by_id, strict=True)}
        rows.append(_answer_row(report, found))
    return {
        "columns": ["Example", "Expected", *(arm.title for arm in report.arms)],
        "filters": [_used({"label": "Show", "options": _answer_options(report)}, rows)],
        "rows": rows,
        "total": len(ids),
    }


def trace_list(report: RunReport, max_rows: int = MAX_ROWS) -> dict[str, Any]:
    """The drafts, one row each, with every step from input to influence."""
    rows = [_trace_row(trace) for trace in evenly(report.traces, max_rows)]
    effects = [["helped", "helped"], ["hurt", "hurt"], ["same", "same"], ["failed", "failed"]]
    rounds = [[f"round {number}", f"round {number}"] for number in sorted({trace.round for trace in report.traces})]
    filters = [_used({"label": "Effect", "options": effects}, rows)]
    if len(rounds) > 1:
        filters.append(_used({"label": "Round", "options": rounds}, rows))
    return {
        "columns": ["Example", "Draft", "Alone", "With draft", "Influence"],
        "filters": filters,
        "rows": rows,
        "total": len(report.traces),
    }


def evenly(items: Sequence[T], most: int) -> list[T]:
    """At most ``most`` of the items, evenly spaced and in order: a sample that keeps the mix of early and late."""
    if len(items) <= most:
        return list(items)
    return [items[index * len(items) // most] for index in range(most)]


def labelled(values: Mapping[str, Any] | None) -> str:
    """Fields as readable lines: the bare value of a single field, else one "Label: value" line per field."""
    if not values:
        return ""
    if len(values) == 1:
        return str(next(iter(values.values())))
    return "\n".join(f"{key.replace('_', ' ').capitalize()}: {value}" for key, value in values.items())


def outcome(answer: Answer | None) -> str:
    """One word or number for an answer: right, wrong, a graded score, failed, or not asked."""
    if answer is None:
        return "not asked"
    if answer.score is None:
        return "failed"
    return {1.0: "right", 0.0: "wrong"}.get(answer.score, f"{answer.score:.2f}")


def change(before: Answer | None, after: Answer | None) -> float:
    """The second score less the first, in [-1, 1]; 0 where one is missing, or where they differ only by rounding."""
    if before is None or after is None or before.score is None or after.score is None:
        return 0.0
    gain = after.score - before.score
    return gain if abs(gain) > SAME else 0.0


def effect(influence: float | None) -> str:
    """helped, hurt, same or failed."""
    if influence is None:
        return "failed"
    return "helped" if influence > SAME else "hurt" if influence < -SAME else "same"


def clipped(text: str, most: int = MAX_TEXT) -> str:
    """The text, cut where it is longer than a page can carry, and saying so."""
    return text if len(text) <= most else f"{text[:most]} ... [{len(text) - most:,} more characters in report.json]"


def _answer_options(report: RunReport) -> list[list[str]]:
    options = [["fixed", "fixed by tuning"], ["broken", "broken by tuning"]]
    reference = report.arm(report.reference)
    for arm in report.arms:
        if reference and arm.name != reference.name:
            options.append([f"lost:{arm.name}", f"only {reference.title} right, not {arm.title}"])
            options.append([f"won:{arm.name}", f"only {arm.title} right, not {reference.title}"])
    return [*options, ["failed", "failed in some arm"]]


def _answer_row(report: RunReport, found: dict[str, Answer | None]) -> dict[str, Any]:
    known = next(answer for answer in found.values() if answer is not None)
    tags = _change_tag(found.get(report.before or ""), found.get(report.after or ""), "fixed", "broken")
    reference = found.get(report.reference)
    for name, answer in found.items():
        tags += _change_tag(reference, answer, f"won:{name}", f"lost:{name}")
    if any(outcome(answer) == "failed" for answer in found.values()):
        tags.append("failed")
    steps = [["Example", known.example_id], ["Input", labelled(known.inputs)], ["Expected", known.gold]]
    for arm in report.arms:
        answer = found[arm.name]
        if answer is not None:
            steps += _answer_steps(arm.title, answer)
    cells = [[clipped(labelled(known.inputs), 300), ""], [clipped(known.gold, 120), ""]]
    cells += [[outcome(answer), outcome(answer)] for answer in found.values()]
    return {"tags": tags, "cells": cells, "steps": _shown(steps)}


def _shown(steps: list[list[str]]) -> list[list[str]]:
    """The steps that have a text, each cut to size."""
    return [[label, clipped(text), *kind] for label, text, *kind in steps if text]


def _change_tag(before: Answer | None, after: Answer | None, better: str, worse: str) -> list[str]:
    gain = change(before, after)
    return [better] if gain > 0 else [worse] if gain < 0 else []


def _answer_steps(title: str, answer: Answer) -> list[list[str]]:
    steps = [[title, outcome(answer), outcome(answer)], ["draft", answer.draft or ""]]
    steps += [[name, text] for name, text in answer.steps.items()]
    if answer.error is not None:
        return [*steps, ["answer", answer.answer or ""], ["error", answer.error]]
    return [*steps, ["answer", answer.answer or "(empty)"]]


def _trace_row(trace: TraceRow) -> dict[str, Any]:
    kind = effect(trace.influence)
    shown = "failed" if trace.influence is None else f"{trace.influence:+.2f}"
    steps = [
        ["Example", f"{trace.example_id}, draft {trace.draft_index}, round {trace.round}"],
        ["Input", labelled(trace.inputs)],
        ["Expected", labelled(trace.gold)],
        [_scored("Draft", trace.draft_score), trace.draft],
        ["Raw completion", trace.completion if trace.completion.strip() != trace.draft.strip() else ""],
        [_scored("Alone", trace.alone_score), labelled(trace.alone)],
        [_scored("With draft", trace.refined_score), labelled(trace.refined)],
        ["Error", trace.error or ""],
        ["Models", " -> ".join(model for model in (trace.weak_model, trace.strong_model) if model)],
    ]
    cells = [labelled(trace.inputs), trace.draft or trace.completion, labelled(trace.alone), labelled(trace.refined)]
    return {
        "tags": [kind, f"round {trace.round}"],
        "cells": [*([clipped(text, 300), ""] for text in cells), [shown, kind]],
        "steps": _shown(steps),
    }


def _scored(label: str, score: float | None) -> str:
    return label if score is None else f"{label} (score {score:g})"


def _used(one_filter: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The filter with the count of each option, and without the options that would show nothing."""
    counts: dict[str, int] = {}
    for row in rows:
        for name in row["tags"]:
            counts[name] = counts.get(name, 0) + 1
    options = [[name, f"{label} ({counts[name]})"] for name, label in one_filter["options"] if name in counts]
    return {**one_filter, "options": options}
