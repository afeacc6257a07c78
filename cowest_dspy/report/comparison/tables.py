"""The numbers of a comparison as tables of text, the same ones in a terminal, in Markdown and on
the page; and as CSV in full."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cowest_dspy.influence.intervals import Interval
from cowest_dspy.influence.report import format_kinds
from cowest_dspy.report.comparison.model import Comparison
from cowest_dspy.report.comparison.numbers import ArmNumbers, Extra, Numbers
from cowest_dspy.report.comparison.significance import Paired
from cowest_dspy.report.comparison.verdict import format_difference
from cowest_dspy.report.verdict import bare_p, format_interval, format_usd


@dataclass(frozen=True)
class TextTable:
    """A table of text: the first column names the row, the others hold numbers. ``marked``: the
    rows that stand out."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    marked: frozenset[int] = frozenset()
    caption: str = ""


def text_tables(comparison: Comparison, numbers: Numbers) -> list[TextTable]:
    """Results, further scores, costs and the sweep, as far as there is something to show in
    each."""
    tables = [results(comparison, numbers)] if numbers.arms else []
    if numbers.extras or any(line.spread for line in numbers.arms):
        tables.append(_further(numbers))
    if any(line.cost.seconds is not None or line.cost.calls is not None for line in numbers.arms):
        tables.append(_costs(numbers))
    if numbers.sweep:
        tables.append(sweep_table(numbers))
    return tables


def results(comparison: Comparison, numbers: Numbers) -> TextTable:
    """One line per arm: its score both ways, and its difference to ``against`` with the corrected
    p."""
    heads = ("arm", "n", "failed", "score, %", "95 %", "strict, %", "difference [95 %]", "p (Holm)")
    rows = tuple((line.title, *_core(line)) for line in numbers.arms)
    marked = frozenset(index for index, line in enumerate(numbers.arms) if line.is_against)
    return TextTable("Arms", heads, rows, marked, how_tested(comparison, numbers))


def how_tested(comparison: Comparison, numbers: Numbers) -> str:
    """What score, interval and p of the results are."""
    against = numbers.arm(comparison.against)
    text = (
        f"Score: {comparison.metric}, over answered; strict: failures as wrong. "
        f"{interval_kinds(numbers)}"
    )
    failed = "; ".join(
        f"{line.title}: {format_kinds(line.failures)}" for line in numbers.arms if line.failures
    )
    text += f" Failed: {failed}." if failed else ""
    if against is None or not numbers.tests:
        return text
    difference = (
        f"Difference: points over {against.title}, on examples that both answered; its "
        "interval is not corrected."
    )
    return f"{text} {difference} {test_kinds(numbers)}"


def interval_kinds(numbers: Numbers) -> str:
    """Which intervals the scores have."""
    lines = numbers.arms
    wilson, other = "Wilson", "bootstrap over examples, all seeds of one drawn together"
    if all(line.spread or not line.binary for line in lines):
        return f"95 %: {other}."
    if not any(line.spread or not line.binary for line in lines):
        return f"95 %: {wilson}."
    return f"95 %: {wilson} for right and wrong under one seed, else {other}."


def test_kinds(numbers: Numbers) -> str:
    """Which tests the p are of."""
    methods = {
        line.test.method for line in numbers.arms if line.test is not None and line.holm is not None
    }
    names = {
        "mcnemar": "exact McNemar test",
        "bootstrap": "paired studentised bootstrap over examples",
    }
    said = " or ".join(names[method] for method in sorted(methods, reverse=True))
    return (
        f"p: {said}, two-sided, Holm-corrected over {numbers.tests} "
        f"{'test' if numbers.tests == 1 else 'tests'}."
    )


def format_number(value: float | None) -> str:
    """A number of any size with three decimals; a dash for None.

    >>> format_number(0.41249), format_number(12.0), format_number(None)
    ('0.412', '12.000', '-')
    """
    return "-" if value is None else f"{value:.3f}"


def format_percent(share: float | None) -> str:
    """A share in percent, without the sign.

    >>> format_percent(0.875), format_percent(None)
    ('87.5', '-')
    """
    return "-" if share is None else f"{100 * share:.1f}"


def format_count(value: float | None) -> str:
    """A count with thousands set apart."""
    return "-" if value is None else f"{value:,}"


def format_extra(extra: Extra | None) -> str:
    """A further score with its interval, or the range over its seeds."""
    if extra is None or extra.mean is None:
        return "-"
    text = format_number(extra.mean)
    if extra.interval is not None:
        return f"{text} [{extra.interval.low:.3f}, {extra.interval.high:.3f}]"
    return (
        text
        if len(extra.values) < 2
        else f"{text} ({min(extra.values):.3f} to {max(extra.values):.3f})"
    )


def varying(numbers: Numbers) -> list[str]:
    """The settings that differ between points of the sweep, in order of appearance."""
    keys = dict.fromkeys(key for point in numbers.sweep for key in point.settings)
    return [
        key for key in keys if len({_said(point.settings.get(key)) for point in numbers.sweep}) > 1
    ]


def settings_text(settings: dict[str, Any], keys: Sequence[str]) -> str:
    """``beta 0.1, format dpo``: the last part of each dotted key where that names only one of them,
    else the whole key."""
    return ", ".join(
        f"{name} {_said(settings[key])}"
        for key, name in short_names(keys).items()
        if key in settings
    )


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Dotted keys by the last of their parts, where these differ.

    >>> short_names(["dpo.beta", "pairs.format"]), short_names(["sft.num_train_epochs", "dpo.num_train_epochs"])
    ({'dpo.beta': 'beta', 'pairs.format': 'format'}, {'sft.num_train_epochs': 'sft.num_train_epochs', 'dpo.num_train_epochs': 'dpo.num_train_epochs'})
    """
    last = [key.rpartition(".")[2] for key in keys]
    return {
        key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)
    }


def to_csv(comparison: Comparison, numbers: Numbers) -> str:
    """One line per arm and per point of the sweep, numbers in full precision, empty where there is
    none.

    A text that a spreadsheet would take for a formula has an apostrophe before it.
    """
    stream = io.StringIO()
    lines = [("arm", {}, (), line) for line in numbers.arms]
    lines += [("sweep", point.settings, point.pairs, point.arm) for point in numbers.sweep]
    rows = [
        _record(kind, settings, pairs, line, numbers.extras)
        for kind, settings, pairs, line in lines
    ]
    heads = list(rows[0]) if rows else ["kind", "name"]
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([_harmless(head) for head in heads])
    writer.writerows([_harmless(row[head]) for head in heads] for row in rows)
    return stream.getvalue()


def _core(line: ArmNumbers) -> tuple[str, ...]:
    difference = "-" if line.test is None else format_difference(line.test)
    p = "-" if line.holm is None else bare_p(line.holm)
    score = (
        format_percent(line.score),
        format_interval(line.interval),
        format_percent(line.strict_score),
    )
    return (format_count(line.n), format_count(line.failed), *score, difference, p)


def _further(numbers: Numbers) -> TextTable:
    heads, several = ("arm", "seeds"), any(line.spread for line in numbers.arms)
    heads += ("mean of seeds, %", "lowest", "highest", "sd") if several else ()
    rows = []
    for line in numbers.arms:
        spread = line.spread
        shares = (
            (spread.mean, spread.low, spread.high, spread.sd)
            if spread
            else (line.score, None, None, None)
        )
        cells = tuple(map(format_percent, shares)) if several else ()
        rows.append(
            (
                line.title,
                str(len(line.seeds)),
                *cells,
                *(format_extra(line.extra.get(name)) for name in numbers.extras),
            )
        )
    marked = frozenset(index for index, line in enumerate(numbers.arms) if line.is_against)
    caption = "[...]: 95 % interval; (...): lowest and highest seed." if numbers.extras else ""
    return TextTable(
        "Further scores and seeds", (*heads, *numbers.extras), tuple(rows), marked, caption
    )


def _costs(numbers: Numbers) -> TextTable:
    heads = (
        "arm",
        "answers",
        "calls made",
        "calls in all",
        "tokens in",
        "tokens out",
        "USD",
        "seconds",
    )
    rows = []
    for line in numbers.arms:
        cost = line.cost
        counts = (line.asked, cost.calls, cost.calls_in_all, cost.tokens_in, cost.tokens_out)
        seconds = "-" if cost.seconds is None else f"{cost.seconds:,.1f}"
        usd = "-" if cost.calls is None and cost.usd is None else format_usd(cost.usd)
        rows.append((line.title, *map(format_count, counts), usd, seconds))
    return TextTable(
        "Costs",
        heads,
        tuple(rows),
        caption="All seeds together. Calls in all: made, and answered from a store.",
    )


def sweep_table(numbers: Numbers) -> TextTable:
    """One line per point of the sweep, under the settings that vary; its caption has the others."""
    keys, rows = varying(numbers), []
    extras = tuple(
        name for name in numbers.extras if any(name in point.arm.extra for point in numbers.sweep)
    )
    for point in numbers.sweep:
        pairs = (
            "-"
            if None in point.pairs or not point.pairs
            else _span([pairs for pairs in point.pairs if pairs is not None])
        )
        name = settings_text(point.settings, keys) or point.arm.title
        scores = tuple(format_extra(point.arm.extra.get(extra)) for extra in extras)
        rows.append((name, str(len(point.arm.seeds)), pairs, *_core(point.arm), *scores))
    core = ("n", "failed", "score, %", "95 %", "strict, %", "difference [95 %]", "p (Holm)")
    same = settings_text(
        numbers.sweep[0].settings, [key for key in numbers.sweep[0].settings if key not in keys]
    )
    fixed = f"The same everywhere: {same}. " if same else ""
    caption = (
        f"{fixed}p is corrected over the sweep. The best of many settings owes a part of "
        "its lead to chance."
    )
    return TextTable(
        "Sweep", ("settings", "seeds", "pairs", *core, *extras), tuple(rows), caption=caption
    )


def _span(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return format_count(low) if low == high else f"{low:,} to {high:,}"


def _said(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _record(
    kind: str,
    settings: dict[str, Any],
    pairs: tuple[int | None, ...],
    line: ArmNumbers,
    extras: Sequence[str],
) -> dict[str, Any]:
    def ends(name: str, interval: Interval | None) -> dict[str, Any]:
        return {
            f"{name}_low": interval and interval.low,
            f"{name}_high": interval and interval.high,
        }

    def tested(prefix: str, test: Paired | None, corrected: float | None) -> dict[str, Any]:
        names = ("method", "n", "answers", "higher", "lower", "left_out", "difference")
        found = {f"{prefix}{name}": test and getattr(test, name) for name in names}
        found |= ends(f"{prefix}difference", test and test.interval)
        return found | {f"{prefix}p": test and test.p, f"{prefix}p_holm": corrected}

    spread, cost = line.spread, line.cost
    record: dict[str, Any] = {
        "kind": kind,
        "name": line.name,
        "title": line.title,
        "note": line.note,
    }
    record |= {
        "settings": json.dumps(settings, ensure_ascii=False, default=str) if settings else None
    }
    record |= {
        "pairs": " ".join(str(count) for count in pairs if count is not None),
        "seeds": " ".join(map(str, line.seeds)),
    }
    record |= {name: getattr(line, name) for name in ("n", "asked", "answered", "failed", "score")}
    record |= (
        ends("score", line.interval)
        | {"strict_score": line.strict_score}
        | ends("strict_score", line.strict_interval)
    )
    record |= {
        f"seed_{name}": spread and getattr(spread, name) for name in ("mean", "low", "high", "sd")
    }
    record |= tested("test_", line.test, line.holm) | tested(
        "strict_test_", line.strict_test, line.strict_holm
    )
    record |= {
        name: getattr(cost, name)
        for name in ("calls", "calls_in_all", "tokens_in", "tokens_out", "usd", "seconds")
    }
    for name in extras:
        extra = line.extra.get(name)
        record |= {f"extra.{name}": extra and extra.mean} | ends(
            f"extra.{name}", extra and extra.interval
        )
    return record


def _harmless(value: Any) -> Any:
    return (
        f"'{value}"
        if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
        else value
    )
