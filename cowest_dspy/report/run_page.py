"""The page of a run: what is shown of it, examples to read, and lists of answers and traces to
search; report.json and report.html, written together.

A list is plain JSON, which the page's script pages through: ``columns``, ``filters`` (a label and
the tags that it offers), ``texts`` and ``rows``. A row has tags, cells, steps, the id under which a
link finds it, and prompts: a cell is the number of a text, or ``[text, kind]``; a step is the
numbers of its label and its text, and with a kind it is a heading; a prompt has a title, and its
messages as steps. Each text stands in the page once: drafts of one example share their input and
the answer without a draft.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table as RichTable

from cowest_dspy.influence.arms import Answer
from cowest_dspy.influence.report import SAME
from cowest_dspy.influence.trace import Trace
from cowest_dspy.report.facts import Arm, RunReport, redact
from cowest_dspy.report.figures import Figures, figures
from cowest_dspy.report.numbers import sample_evenly
from cowest_dspy.report.page import (
    Browser,
    WrittenPage,
    data_block,
    describe_outcome,
    format_fields,
    read_document,
    render_page,
    settings_section,
)
from cowest_dspy.report.run_view import run_view
from cowest_dspy.report.verdict import describe_arm, format_share, format_usd
from cowest_dspy.report.view import Section
from cowest_dspy.utils.masking import mask_document
from cowest_dspy.utils.notebook import clip, diff_words
from cowest_dspy.utils.safe_text import visible_text

MAX_PAIRS = 30
LONGEST_SHOWN = 600
MAX_CHANGES = 4
MAX_ROWS = 20_000
MAX_TEXT = 4000
# Bytes of the answers, and of both lists together. With charts, tables and pairs a page stays under
# 10 MB.
MAX_ANSWERS, MAX_BYTES = 2_500_000, 9_200_000
EFFECTS = ("helped", "hurt", "same", "failed")
T = TypeVar("T")
PROMPTS = {
    "draft": "Prompt of the draft",
    "alone": "Prompt of the strong model alone",
    "refine": "Prompt with the draft",
}
"""The requests of a trace, each with its title."""
Steps = list[list[str]]


@dataclass(frozen=True)
class ListRow:
    """A row of a list. ``id`` finds it from a link: rows that are alike up to its last "/" are of
    one example."""

    id: str
    tags: list[str]
    cells: list[Any]
    steps: Steps
    prompts: Sequence[tuple[str, Steps]] = ()


def report_files(folder: Path) -> WrittenPage:
    """The files of a report in a folder, written or not."""
    return WrittenPage(folder / "report.json", folder / "report.html")


def write_report(report: RunReport, folder: str | os.PathLike[str]) -> WrittenPage:
    """Writes report.json and report.html into the folder, whole or not at all. Secrets are masked
    in both.

    The JSON holds the report and, under "numbers", what follows from it. The HTML is drawn from the
    JSON as read back.

    Raises:
        ReportError: the folder cannot be written, or the disk is full; what was there before is as
            it was.
    """
    facts = mask_document(report.to_json())
    shown = RunReport.from_json(facts)
    numbers = figures(shown)
    written = report_files(Path(folder))
    written.write({**facts, "numbers": numbers.to_json()}, render_html(shown, numbers))
    return written


def read_report(path: str | os.PathLike[str]) -> RunReport:
    """The report in a run folder, or in a report.json.

    Raises:
        ReportError: there is none, or it is not one that this version reads.
    """
    return RunReport.from_json(read_document(path, "report", "cowest report RUN"))


def render_html(
    report: RunReport, numbers: Figures | None = None, *, max_rows: int = MAX_ROWS
) -> str:
    """The page of a run; ``numbers`` are those of ``figures(report)``, where they are at hand
    already.

    At most ``max_rows`` answers and as many traces go into it, fewer where they are long, and it
    says when there are more. Inputs that the report's configuration hides ([report] hide) are not
    in it.
    """
    numbers = numbers or figures(report)
    report = redact(report)
    view = run_view(report, numbers)
    extras = {"tuning": _changes(report), "pairs": _pairs(report)}
    answers = answer_list(report, max_rows)
    traces = trace_list(report, max_rows, MAX_BYTES - len(answers.json.encode(errors="replace")))
    traces_lead = (
        "Every draft, of training rounds and of held-out arms: what went in, what the strong model "
        "answered with and without it, and what that was worth."
    )
    sections = (
        *(replace(one, extra=extras.get(one.name)) for one in view.sections),
        Section("answers-section", "Answers", missing="No answers yet.", extra=answers),
        Section(
            "traces-section",
            "Traces",
            notes=_prompts_note(report),
            lead=traces_lead,
            missing="No traces yet.",
            extra=traces,
        ),
        settings_section(report.config, report.versions),
    )
    return render_page(replace(view, sections=sections, tiles=tuple(_tiles(report, numbers))))


def _tiles(report: RunReport, numbers: Figures) -> list[tuple[str, str, str]]:
    """The few numbers that one looks for first: a name, the number, a remark."""
    lines = {line.name: line for line in numbers.arms}
    tiles = []
    for name in (report.main_arm, *report.rivals[:1]):
        if (line := lines.get(name)) and line.score is not None:
            title = describe_arm(report, name).removeprefix("the ")
            tiles.append((title, format_share(line.score), f"n {line.answered:,}"))
    if numbers.influence:
        helped, hurt, drafts = (
            sum(getattr(counts, kind) for counts in numbers.influence.values())
            for kind in ("helped", "hurt", "n")
        )
        tiles.append(("drafts that helped", f"{helped:,}", f"{hurt:,} hurt, of {drafts:,}"))
    if report.pairs:
        tiles.append(("pairs", f"{report.pairs.kept:,}", f"{report.pairs.examples:,} examples"))
    if report.stages:
        usd = f"USD {format_usd(numbers.totals.usd)}"
        tiles.append(("time", format_duration(numbers.totals.seconds), usd))
    return tiles


def format_duration(seconds: float) -> str:
    """Seconds in words, without decimals.

    >>> format_duration(90), format_duration(5400)
    ('90 s', '1 h 30 min')
    """
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min"


def _changes(report: RunReport) -> list[tuple[str, list[Any], int]]:
    """A sample of the answers that tuning fixed and broke: a word, pairs of answers, their number
    in all."""
    before, after = report.arm(report.before), report.arm(report.after)
    if before is None or after is None:
        return []
    earlier = {answer.example_id: answer for answer in before.answers}
    both = [(earlier.get(answer.example_id), answer) for answer in after.answers]
    kinds = (
        ("Fixed", [pair for pair in both if score_change(*pair) > 0]),
        ("Broken", [pair for pair in both if score_change(*pair) < 0]),
    )
    return [(word, sample_evenly(pairs, MAX_CHANGES), len(pairs)) for word, pairs in kinds if pairs]


def print_change(report: RunReport, console: Console) -> None:
    """Print one answer that tuning fixed by another draft, before and after; nothing where none is
    in the report's sample. Inputs that the configuration hides are not shown."""
    for word, pairs, _ in _changes(redact(report)):
        for before, after in pairs if word == "Fixed" else ():
            if before and before.draft and after.draft and before.draft != after.draft:
                _print_before_and_after(before, after, console)
                return


def _print_before_and_after(before: Answer, after: Answer, console: Console) -> None:
    shown = RichTable(title="For example", title_justify="left", show_header=False)
    rows = [("input", format_fields(after.inputs))]
    for when, one in (("before", before), ("after", after)):
        score = "failed" if one.score is None else f"score {one.score:g}"
        rows.append((f"draft {when} tuning", one.draft or ""))
        rows.append((f"answer, {score}", one.answer or ""))
    for name, text in rows:
        shown.add_row(name, visible_text(clip(text, LONGEST_SHOWN)))
    console.print()
    console.print(shown)


def _pairs(report: RunReport) -> list[Any]:
    """A sample of pairs, each with its prompt and the parts of its rejected and of its chosen
    draft."""
    rows = sample_evenly(report.pairs.rows, MAX_PAIRS) if report.pairs else []
    texts = [
        [side[-1]["content"] if side else "" for side in (row.prompt, row.rejected, row.chosen)]
        for row in rows
    ]
    return [
        (row, prompt, *diff_words(clip(rejected, 1200), clip(chosen, 1200)))
        for row, (prompt, rejected, chosen) in zip(rows, texts, strict=True)
    ]


def answer_list(report: RunReport, max_rows: int) -> Browser:
    """The held-out examples, one row each, with every arm's answer; tags: what tuning fixed, which
    arm was right."""
    by_id = [{answer.example_id: answer for answer in arm.answers} for arm in report.arms]
    ids = list(dict.fromkeys(example_id for answers in by_id for example_id in answers))

    def row(example_id: str) -> ListRow:
        found = {
            arm.name: answers.get(example_id)
            for arm, answers in zip(report.arms, by_id, strict=True)
        }
        return _answer_row(report, example_id, found)

    columns = ["Example", "Expected", *(arm.title for arm in report.arms)]
    filters = [("Show", _answer_options(report))]
    return _fit_rows("answers", ids, row, columns, filters, max_rows, MAX_ANSWERS)


def trace_list(report: RunReport, max_rows: int, max_bytes: int) -> Browser:
    """The drafts, one row each, with every step from input to influence: those of training rounds,
    then those of held-out arms, beside what the first rival answered without them."""
    rows = [
        (f"trace-{trace.key}", f"round {trace.round}", trace, _prompts(report, trace))
        for trace in report.traces
    ]
    rows += [
        (f"trace-{arm.name}/{trace.example_id}/0", arm.title, trace, [])
        for arm in report.arms
        for trace in _held_out_traces(report, arm)
    ]
    rounds = sorted({trace.round for trace in report.traces})
    arms = [arm.title for arm in report.arms]
    filters = [
        ("Effect", [[effect, effect] for effect in EFFECTS]),
        ("Round", [[f"round {number}", f"round {number}, training"] for number in rounds]),
        ("Arm", [[title, f"{title}, held out"] for title in arms]),
    ]
    columns = ["Example", "Where", "Draft", "Alone", "With draft", "Influence"]
    return _fit_rows(
        "traces", rows, lambda item: _trace_row(*item), columns, filters, max_rows, max_bytes
    )


def _prompts(report: RunReport, trace: Trace) -> list[tuple[str, Steps]]:
    """The prompts of a trace that the report has: a title, and the role and text of each
    message."""
    messages, requests = report.prompts.messages, report.prompts.requests
    return [
        (title, [[messages[place][part] for part in ("role", "content")] for place in places])
        for name, title in PROMPTS.items()
        if (places := requests.get(trace.requests.get(name, "")))
    ]


def _prompts_note(report: RunReport) -> tuple[str, ...]:
    """A remark where the report has the prompts of the first traces only."""
    known = sum(bool(_prompts(report, trace)) for trace in report.traces)
    if known in (0, len(report.traces)):
        return ()
    return (
        f"With the prompts of {known:,} of {len(report.traces):,} drafts of training rounds; the "
        "others are in run.sqlite, so that the report stays small.",
    )


def score_change(before: Answer | None, after: Answer | None) -> float:
    """The second score less the first, in [-1, 1]; 0 where one is missing, or where they differ
    only by rounding."""
    if before is None or after is None or before.score is None or after.score is None:
        return 0.0
    gain = after.score - before.score
    return gain if abs(gain) > SAME else 0.0


def describe_effect(influence: float | None) -> str:
    """helped, hurt, same or failed."""
    if influence is None:
        return "failed"
    return "helped" if influence > SAME else "hurt" if influence < -SAME else "same"


def clip_for_page(text: str) -> str:
    """The text, cut where it is longer than a page can carry."""
    return clip(text, MAX_TEXT, " in report.json")


def _fit_rows(
    name: str,
    items: Sequence[T],
    row: Callable[[T], ListRow],
    columns: list[str],
    filters: Sequence[tuple[str, list[list[str]]]],
    max_rows: int,
    max_bytes: int,
) -> Browser:
    """The list of these items, or of as many of them, evenly spaced, as go into so many rows and
    bytes."""
    made = [row(item) for item in sample_evenly(items, max_rows)]
    most = len(made)
    while True:
        texts, counts = dict[str, int](), dict[str, int]()
        rows = [_number_texts(one, texts, counts) for one in sample_evenly(made, most)]
        used = [
            {"label": label, "options": _count_options(options, counts)}
            for label, options in filters
        ]
        text = data_block({"columns": columns, "filters": used, "texts": list(texts), "rows": rows})
        size = len(text.encode("utf-8", errors="replace"))
        if size <= max_bytes or most <= 1:
            return Browser(name, text, most, len(items))
        most = max(1, min(most - 1, int(0.99 * most * max_bytes / size)))


def _number_texts(row: ListRow, texts: dict[str, int], counts: dict[str, int]) -> list[Any]:
    """The row with numbers for its texts, the same for the same text, each cut to size; its empty
    steps left out, its tags counted."""

    def number(text: str) -> int:
        return texts.setdefault(text, len(texts))

    def numbered(steps: Steps) -> list[Any]:
        return [
            [number(label), number(clip_for_page(text)), *kind]
            for label, text, *kind in steps
            if text
        ]

    for name in row.tags:
        counts[name] = counts.get(name, 0) + 1
    cells = [cell if isinstance(cell, list) else number(clip_for_page(cell)) for cell in row.cells]
    prompts = [[number(title), numbered(messages)] for title, messages in row.prompts]
    return [row.tags, cells, numbered(row.steps), row.id, prompts]


def _count_options(options: Iterable[list[str]], counts: Mapping[str, int]) -> list[list[str]]:
    """The options with their counts, without those that would show nothing."""
    return [[name, f"{label} ({counts[name]:,})"] for name, label in options if name in counts]


def _answer_options(report: RunReport) -> list[list[str]]:
    options = [["fixed", "fixed by tuning"], ["broken", "broken by tuning"]]
    reference = report.arm(report.main_arm)
    for arm in report.arms:
        if reference and arm.name != reference.name:
            options.append([f"lost:{arm.name}", f"only {reference.title} right, not {arm.title}"])
            options.append([f"won:{arm.name}", f"only {arm.title} right, not {reference.title}"])
    return [*options, ["failed", "failed in some arm"]]


def _answer_row(report: RunReport, example_id: str, found: dict[str, Answer | None]) -> ListRow:
    known = next(answer for answer in found.values() if answer is not None)
    tags = _change_tag(
        found.get(report.before or ""), found.get(report.after or ""), "fixed", "broken"
    )
    reference = found.get(report.main_arm)
    for name, answer in found.items():
        tags += _change_tag(reference, answer, f"won:{name}", f"lost:{name}")
    if any(describe_outcome(answer) == "failed" for answer in found.values()):
        tags.append("failed")
    steps = [
        ["Example", example_id],
        ["Input", format_fields(known.inputs)],
        ["Expected", known.gold],
    ]
    for arm in report.arms:
        answer = found[arm.name]
        if answer is not None:
            steps += _answer_steps(arm.title, answer)
    cells: list[Any] = [format_fields(known.inputs), known.gold]
    cells += [[describe_outcome(answer), describe_outcome(answer)] for answer in found.values()]
    return ListRow(f"answer-{example_id}/", tags, cells, steps)


def _change_tag(before: Answer | None, after: Answer | None, better: str, worse: str) -> list[str]:
    gain = score_change(before, after)
    return [better] if gain > 0 else [worse] if gain < 0 else []


def _answer_steps(title: str, answer: Answer) -> list[list[str]]:
    words = describe_outcome(answer)
    steps = [[title, words, words], ["draft", answer.draft or ""]]
    steps += [[name, text] for name, text in answer.steps.items()]
    if answer.error is not None:
        return [*steps, ["answer", answer.answer or ""], ["error", answer.error]]
    return [*steps, ["answer", answer.answer or "(empty)"]]


def _held_out_traces(report: RunReport, arm: Arm) -> Iterable[Trace]:
    """The arm's answers that had a draft, as traces: beside them the answer of the first rival, the
    strong model alone."""
    rival = report.arm(next(iter(report.rivals), None))
    alone = (
        {answer.example_id: answer for answer in rival.answers}
        if rival and rival.name != arm.name
        else {}
    )
    for answer in arm.answers:
        if answer.draft is None:
            continue
        other = alone.get(answer.example_id)
        both = (
            None
            if other is None or other.score is None or answer.score is None
            else answer.score - other.score
        )
        error = answer.error or ("no answer without a draft" if other is None else other.error)
        yield Trace(
            example_id=answer.example_id,
            draft_index=0,
            round=0,
            inputs=answer.inputs,
            gold={"answer": answer.gold},
            prompt=(),
            completion="",
            draft=answer.draft,
            refined=_fields(answer),
            alone=_fields(other) if other else None,
            refined_score=answer.score,
            alone_score=other.score if other else None,
            influence=both,
            draft_score=None,
            weak_model="",
            strong_model="",
            error=error if both is None else None,
        )


def _fields(answer: Answer) -> dict[str, Any]:
    return {**answer.steps, "answer": "" if answer.answer is None else answer.answer}


def _trace_row(
    row_id: str, where: str, trace: Trace, prompts: Sequence[tuple[str, Steps]]
) -> ListRow:
    kind = describe_effect(trace.influence)
    shown = "failed" if trace.influence is None else f"{trace.influence:+.2f}"
    refined = {name: text for name, text in (trace.refined or {}).items() if name != "draft"}
    steps = [
        ["Example", f"{trace.example_id}, draft {trace.draft_index}, {where}"],
        ["Input", format_fields(trace.inputs)],
        ["Expected", format_fields(trace.gold)],
        [_label_score("Draft", trace.draft_score), trace.draft],
        [
            "Raw completion",
            trace.completion if trace.completion.strip() != trace.draft.strip() else "",
        ],
        [_label_score("Alone", trace.alone_score), format_fields(trace.alone)],
        [_label_score("With draft", trace.refined_score), format_fields(refined)],
        ["Influence", "" if trace.influence is None else f"{trace.influence:+.2f}, {kind}"],
        ["Error", trace.error or ""],
        ["Models", " -> ".join(model for model in (trace.weak_model, trace.strong_model) if model)],
    ]
    texts = [
        format_fields(trace.inputs),
        where,
        trace.draft or trace.completion,
        format_fields(trace.alone),
        format_fields(refined),
    ]
    return ListRow(row_id, [kind, where], [*texts, [shown, kind]], steps, prompts)


def _label_score(label: str, score: float | None) -> str:
    return label if score is None else f"{label} (score {score:g})"
