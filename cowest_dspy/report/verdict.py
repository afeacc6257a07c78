"""The report in words: whether the collaboration pays, which rounds were taken, what tuning did; plain about a loss too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cowest_dspy.budget import format_usd as format_usd
from cowest_dspy.report.model import RoundRow, RunReport
from cowest_dspy.report.numbers import Interval, PairedTest, compare, influence_counts

ALPHA = 0.05
# Arms as a sentence names them; others by their titles.
_SPOKEN = {"collaboration": "the collaboration", "strong": "the strong model alone", "weak": "the weak model alone"}


@dataclass(frozen=True)
class Verdict:
    """The first of the ``sentences`` is the verdict, the others are further claims, one each. ``good`` is True when every claim
    holds, False when one does not, None without claims."""

    sentences: tuple[str, ...]
    good: bool | None


def verdict(report: RunReport) -> Verdict:
    """What the run shows, from the paired tests of its arms. A claim holds for a gain with a two-sided p < 0.05.

    The verdict is one sentence: the collaboration against its first rival, by points with a 95 % interval, n and p; the rounds
    that were taken or rolled back; what tuning did. Before the tuned one is evaluated, it speaks of the one before tuning.
    """
    claims = [_rival_claim(report, rival) for rival in report.rivals]
    main, tuning = next(iter(claims), None), _tuning_claim(report)
    others = [claim for claim in claims[1:] if claim is not None]
    made = [claim for claim in (main, tuning, *others) if claim is not None]
    if not made:
        return Verdict((_open_text(report),), None)
    parts = [main[0]] if main else []
    parts += _rounds_text(report.rounds)
    parts += [tuning[0]] if tuning else []
    sentences = (["; ".join(parts)] if parts else []) + [text for text, _ in others]
    return Verdict(tuple(_sentence(text) for text in sentences), all(good for _, good in made))


def format_p(p: float) -> str:
    """
    >>> format_p(0.00001), format_p(0.0312), format_p(1.0)
    ('p < 0.001', 'p = 0.031', 'p = 1')
    """
    if p < 0.001:
        return "p < 0.001"
    return "p = 1" if p >= 0.9995 else f"p = {p:.3f}"


def bare_p(p: float) -> str:
    """p for the column of a table that is headed "p": ``< 0.001``, ``0.031``."""
    return format_p(p).removeprefix("p ").removeprefix("= ")


def format_share(share: float | None) -> str:
    """A share as a percentage with one decimal; a dash when there is none."""
    return "-" if share is None else f"{100 * share:.1f} %"


def format_interval(interval: Interval | None) -> str:
    """A 95 % interval of a share, in percent; a dash when there is none."""
    return "-" if interval is None else f"{100 * interval.low:.1f} to {100 * interval.high:.1f}"


def format_gain(test: PairedTest, sign: int = 1) -> str:
    """A difference in points with its interval, as a sentence has it: ``41.0 points [33.0, 49.0]``; ``sign`` -1 turns it round."""
    if test.difference is None:
        return "-"
    text = f"{sign * 100 * test.difference:.1f} points"
    if test.interval is not None:
        low, high = sorted((sign * 100 * test.interval.low, sign * 100 * test.interval.high))
        text += f" [{low:.1f}, {high:.1f}]"
    return text


def format_points(test: PairedTest) -> str:
    """A signed difference in points with its interval: ``+41.0 points [+33.0, +49.0]``."""
    if test.difference is None:
        return "-"
    text = f"{100 * test.difference:+.1f} points"
    if test.interval is not None:
        text += f" [{100 * test.interval.low:+.1f}, {100 * test.interval.high:+.1f}]"
    return text


def influence_notes(report: RunReport) -> list[str]:
    """What belongs beside the influences, one line each: harm, draft quality, the noise floor, agreement of evaluators."""
    counts, lines = influence_counts(report.influence), list[str]()
    if counts.harm_rate is not None and counts.harm is not None:
        lines.append(f"Harm rate {format_share(counts.harm_rate)} (95 % {format_interval(counts.harm)}).")
    if counts.draft_quality is not None:
        lines.append(f"Drafts by themselves score {counts.draft_quality:.2f} on average.")
    if report.noise is not None and report.noise.n:
        noise = report.noise
        lines.append(
            f"Noise floor: asked again, the strong model alone scored otherwise on {noise.changed} of {noise.n} examples, by "
            f"{noise.mean_change:.2f} on average; by that alone a mean influence may be {noise.of_mean:.3f}."
        )
    elif report.noise is not None:
        lines.append("Noise floor 0: the strong model does not sample.")
    for row in report.agreement:
        if row.tau is None:
            lines.append(f"Agreement of {row.evaluator} and metric: not defined, one of them scored all {row.n} answers alike.")
        else:
            spread = "" if row.low is None or row.high is None else f" (95 % {row.low:+.2f} to {row.high:+.2f})"
            lines.append(f"Agreement of {row.evaluator} and metric: Kendall's tau-b {row.tau:+.2f}{spread}, {row.n} answers.")
    return lines


def _rival_claim(report: RunReport, rival: str) -> tuple[str, bool] | None:
    test = compare(report, rival, report.judged)
    if test is None or test.difference is None:
        return None
    direction = _direction(test)
    ours, theirs = spoken(report, report.judged), spoken(report, rival)
    told = {
        1: f"{ours} beats {theirs} by {format_gain(test)}",
        -1: f"{ours} is WORSE than {theirs} by {format_gain(test, -1)}",
        0: f"{ours} does NOT reliably beat {theirs}: {format_points(test)}",
    }[direction]
    left = f" ({test.left_out:,} left out, failed or missing)" if test.left_out else ""
    return f"{told}, n {test.n:,}{left}, {format_p(test.p)}", direction > 0


def _tuning_claim(report: RunReport) -> tuple[str, bool] | None:
    test = compare(report, report.before, report.after)
    if test is None or test.difference is None:
        return None
    counts = f"it fixed {test.fixed:,} and broke {test.broken:,} of {test.n:,} ({format_p(test.p)})"
    words = {1: "tuning helped", -1: "tuning did HARM", 0: "tuning made NO reliable difference"}
    direction = _direction(test)
    return f"{words[direction]}: {counts}", direction > 0


def _rounds_text(rounds: Sequence[RoundRow]) -> list[str]:
    """``["round 1 was taken, rounds 2 and 3 were rolled back"]``; nothing where there was no round."""
    parts = list[str]()
    for taken, word in ((True, "taken"), (False, "rolled back")):
        numbers = [str(row.number) for row in rounds if row.accepted == taken]
        if numbers:
            named = " and ".join((", ".join(numbers[:-1]), numbers[-1])) if len(numbers) > 1 else numbers[0]
            parts.append(f"round{'s' * (len(numbers) > 1)} {named} {'were' if len(numbers) > 1 else 'was'} {word}")
    return [", ".join(parts)] if parts else []


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _direction(test: PairedTest) -> int:
    """1 for a gain, -1 for a loss, 0 when chance explains it, or when graded scores rise in number but fall in mean."""
    if test.p >= ALPHA or test.difference is None:
        return 0
    if test.fixed > test.broken and test.difference > 0:
        return 1
    return -1 if test.fixed < test.broken and test.difference < 0 else 0


def _open_text(report: RunReport) -> str:
    if not report.arms:
        return "No verdict yet: no arm has been evaluated."
    have = ", ".join(arm.title for arm in report.arms)
    return f"No verdict yet: there is nothing to compare. Evaluated so far: {have}."


def spoken(report: RunReport, name: str) -> str:
    """An arm as a sentence names it: "the strong model alone"."""
    arm = report.arm(name)
    return _SPOKEN.get(name) or (arm.title if arm else name)
