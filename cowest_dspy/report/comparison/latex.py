"""The results as LaTeX tables that need booktabs and nothing else; every text is escaped."""

from __future__ import annotations

import re

from cowest_dspy.influence.statistics import Interval
from cowest_dspy.report.comparison.model import Comparison
from cowest_dspy.report.comparison.numbers import ArmNumbers, Extra, Numbers
from cowest_dspy.report.comparison.tables import (
    format_count,
    format_number,
    format_percent,
    interval_kinds,
    sweep_table,
    test_kinds,
)
from cowest_dspy.report.verdict import bare_p

_WORDS = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"{\char34}",
    "[": "{[}",  # after the end of a row it would begin an option of it
    "]": "{]}",
    "*": "{*}",
    "`": r"\`{}",
} | {character: f"\\{character}" for character in "{}$&#_%"}


_LONG = 36  # characters
_CORE = ("Failed", r"Score, \%", r"95 \%", r"Strict, \%")
_TESTED = ("Difference", r"$p_{\mathrm{Holm}}$")


def to_latex(comparison: Comparison, numbers: Numbers) -> str:
    r"""A ``table*`` with one row per arm: n, failures, score, interval, difference, corrected p, further scores, calls per answer;
    and one of the sweep, if there is any.

    It needs ``\usepackage{booktabs}``. Letters that the document's font lacks, such as those of other scripts under pdfLaTeX,
    need XeLaTeX or LuaLaTeX; control characters become spaces.
    """
    label = re.sub(r"[^a-z0-9]+", "-", comparison.title.lower()).strip("-") or "comparison"
    tested = numbers.tests > 0
    heads = [
        "Arm",
        "$n$",
        *_CORE,
        *(_TESTED if tested else []),
        *map(escape_latex, numbers.extras),
        "Calls",
    ]
    arms = _table(
        heads,
        [_row(line, numbers, tested) for line in numbers.arms],
        _caption(comparison, numbers),
        label,
    )
    if not numbers.sweep:
        return arms
    table = sweep_table(numbers)
    tested = any(point.arm.holm is not None for point in numbers.sweep)
    heads = ["Settings", "Pairs", "$n$", *_CORE, *(_TESTED if tested else [])]
    rows = [
        [
            escape_latex(row[0]),
            escape_latex(row[2]),
            _grouped(point.arm.n),
            *_core(point.arm, tested),
        ]
        for row, point in zip(table.rows, numbers.sweep, strict=True)
    ]
    return (
        arms
        + "\n"
        + _table(
            heads,
            rows,
            escape_latex(f"{comparison.title}, sweep. {table.caption}"),
            f"{label}-sweep",
        )
    )


def escape_latex(text: str) -> str:
    r"""One line that LaTeX sets as it stands.

    >>> print(escape_latex("50 % of a_b & {c}"))
    50 \% of a\_b \& \{c\}
    """
    one_line = re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", text).strip()
    escaped = "".join(_WORDS.get(character, character) for character in one_line)
    return re.sub(r"-(?=-)", "-{}", escaped)  # two hyphens would join to a dash


def _table(heads: list[str], rows: list[list[str]], caption: str, label: str) -> str:
    first, begin = (
        ("l", "")
        if all(len(row[0]) <= _LONG for row in rows)
        else (r"p{0.2\linewidth}", r"\raggedright ")
    )
    lines = [
        r"% needs \usepackage{booktabs}",
        r"\begin{table*}",
        r"\centering",
        r"\footnotesize",
        r"\setlength{\tabcolsep}{4pt}",
        f"\\caption{{{caption}}}",
        f"\\label{{tab:{label}}}",
        f"\\begin{{tabular}}{{{first}{'r' * (len(heads) - 1)}}}",
        r"\toprule",
        f"{' & '.join(heads)} \\\\",
        r"\midrule",
        *(f"{begin}{' & '.join(row)} \\\\" for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table*}",
    ]
    return "\n".join(lines) + "\n"


def _row(line: ArmNumbers, numbers: Numbers, tested: bool) -> list[str]:
    per_answer = (
        "-"
        if line.cost.calls_in_all is None or not line.asked
        else f"{line.cost.calls_in_all / line.asked:.1f}"
    )
    extras = (_extra(line.extra.get(name)) for name in numbers.extras)
    return [escape_latex(line.title), _grouped(line.n), *_core(line, tested), *extras, per_answer]


def _extra(extra: Extra | None) -> str:
    """The mean over seeds; a range would make the table too wide for a page."""
    return "-" if extra is None else format_number(extra.mean)


def _core(line: ArmNumbers, tested: bool) -> list[str]:
    cells = [
        _grouped(line.failed),
        format_percent(line.score),
        _span(line.interval),
        format_percent(line.strict_score),
    ]
    if not tested:
        return cells
    p = "-" if line.holm is None else _p(line.holm)
    return [*cells, *(("reference", "") if line.is_against else (_difference(line), p))]


def _caption(comparison: Comparison, numbers: Numbers) -> str:
    """Title, what was measured on how many examples, intervals and test."""
    counts = sorted({line.n for line in numbers.arms})
    examples = (
        ""
        if not counts
        else f"{counts[0]:,}"
        if len(counts) == 1
        else f"{counts[0]:,} to {counts[-1]:,}"
    )
    seeds = max((len(line.seeds) for line in numbers.arms), default=1)
    parts = [f"{comparison.title}."]
    if examples:
        over = f", over up to {seeds} seeds" if seeds > 1 else ""
        parts.append(
            f"Score: {comparison.metric}, on {examples} examples{over}; strict: failures as wrong."
        )
    parts.append(interval_kinds(numbers) if numbers.arms else "")
    against = numbers.arm(comparison.against)
    if against is not None and numbers.tests:
        parts.append(
            f"Difference: points over {against.title}, where both answered, with its 95 % "
            f"interval. {test_kinds(numbers)}"
        )
    parts.append("Calls: per answer, those answered from a store among them.")
    return escape_latex(" ".join(part for part in parts if part))


def _grouped(count: int) -> str:
    return format_count(count).replace(",", "{,}")


def _span(interval: Interval | None) -> str:
    return "-" if interval is None else f"{100 * interval.low:.1f}--{100 * interval.high:.1f}"


def _difference(line: ArmNumbers) -> str:
    if line.test is None or line.test.difference is None:
        return "-"
    text = f"${100 * line.test.difference:+.1f}$"
    ends = line.test.interval
    return (
        text
        if ends is None
        else f"{text} {{[}}${100 * ends.low:+.1f}$, ${100 * ends.high:+.1f}${{]}}"
    )


def _p(p: float) -> str:
    said = bare_p(p)
    return f"${said}$" if said.startswith("<") else said
