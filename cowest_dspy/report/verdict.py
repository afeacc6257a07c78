"""Results in words, plain about a loss too. Of a run: whether the collaboration pays, which rounds
were taken, what tuning did. Of a comparison: what is better than the arm to beat, and whether the
method beats its controls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from cowest_dspy.influence.report import format_kinds, remedy
from cowest_dspy.influence.statistics import ALPHA, LEAST_CHANGED, SMALLEST, Interval
from cowest_dspy.optimizers.rounds import Outcome, Round
from cowest_dspy.report.compare import ControlTest, Numbers, controls_of
from cowest_dspy.report.compared import Comparison
from cowest_dspy.report.facts import RunReport
from cowest_dspy.report.numbers import (
    ArmNumbers,
    compare_arms,
    influence_by_round,
    influence_counts,
    mean_noise,
)
from cowest_dspy.report.significance import PairedTest, finding
from cowest_dspy.report.view import Verdict
from cowest_dspy.store.usage import format_usd as format_usd
from cowest_dspy.utils import notebook

COULD_SHOW = (
    "Could show: the smallest true difference, in points, that these examples find with 80 % power "
    "(one test, two-sided 5 %), given how often their answers differ."
)
# Arms as a sentence names them; others by their titles.
_PHRASES = {
    "collaboration": "the collaboration",
    "strong": "the strong model alone",
    "weak": "the weak model alone",
}


def verdict(report: RunReport) -> Verdict:
    """Judge a run, the most important truth first. A claim holds for a gain that both the
    paired test (two-sided p < 0.05) and the 95 % interval show.

    The verdict is one sentence: the collaboration against its first rival, by points with a 95 %
    interval, n and p; the rounds that were accepted, rolled back or skipped; what tuning did.
    Before the tuned one is evaluated, it speaks of the one before tuning. Where drafts hurt (the
    interval of their mean influence lies below 0), that sentence comes before it, or after it where
    the collaboration beats its rival on held-out examples all the same. It is about the drafts of
    the last round, the newest ones.
    """
    claims = [_rival_claim(report, rival) for rival in report.rivals]
    main, tuning, harm = next(iter(claims), None), _tuning_claim(report), _harm_text(report)
    others = [claim for claim in claims[1:] if claim is not None]
    made = [claim for claim in (main, tuning, *others) if claim is not None]
    wins = main is not None and main[1]
    if not made:
        sentences = [_open_text(report)]
    else:
        parts = [main[0]] if main else []
        parts += [text] if (text := describe_rounds(report.rounds, why=True)) else []
        parts += [tuning[0]] if tuning else []
        sentences = [*(["; ".join(parts)] if parts else []), *(text for text, _ in others)]
    if harm:
        sentences.insert(1 if wins else 0, harm)
    good = all(holds for _, holds in made) and (wins or not harm) if made or harm else None
    return Verdict(tuple(f"{_capitalize(text)}." for text in sentences), good)


def format_p(p: float) -> str:
    """A p value for a sentence.

    >>> format_p(0.00001), format_p(0.0312), format_p(1.0)
    ('p < 0.001', 'p = 0.031', 'p = 1')
    """
    if p < 0.001:
        return "p < 0.001"
    return "p = 1" if p >= 0.9995 else f"p = {p:.3f}"


def bare_p(p: float) -> str:
    """A p value for the column of a table that is headed "p": ``< 0.001``, ``0.031``."""
    return format_p(p).removeprefix("p ").removeprefix("= ")


def format_share(share: float | None) -> str:
    """A share as a percentage with one decimal; a dash when there is none."""
    return "-" if share is None else f"{100 * share:.1f} %"


def format_count(value: float | None) -> str:
    """A count with thousands set apart; a dash when there is none."""
    return "-" if value is None else f"{value:,}"


def format_interval(interval: Interval | None) -> str:
    """A 95 % interval of a share, in percent; a dash when there is none."""
    return "-" if interval is None else f"{100 * interval.low:.1f} to {100 * interval.high:.1f}"


def format_gain(test: PairedTest, sign: int = 1) -> str:
    """A difference in points with its interval, as a sentence has it: ``41.0 points [33.0, 49.0]``;
    ``sign`` -1 turns it round."""
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


def format_correction(tests: int) -> str:
    """Name the correction: ``Holm over 3 tests, two-sided 0.05``."""
    return f"Holm over {notebook.format_plural(tests, 'test')}, two-sided {ALPHA:g}"


def describe_intervals(lines: Iterable[ArmNumbers]) -> str:
    """Name the intervals that the scores of arms have, for the caption of a table."""
    drawn = [bool(line.spread) or not line.binary for line in lines]
    other = "bootstrap over examples, all seeds of one drawn together"
    if all(drawn):
        return f"95 %: {other}."
    if any(drawn):
        return f"95 %: Wilson for right and wrong under one seed, else {other}."
    return "95 %: Wilson."


def describe_tests(lines: Iterable[ArmNumbers]) -> str:
    """Name the tests that the p of arms are of."""
    names = {
        "mcnemar": "exact McNemar test",
        "bootstrap": "paired studentised bootstrap over examples",
    }
    methods = {line.test.method for line in lines if line.test and line.test.n}
    return " or ".join(name for method, name in names.items() if method in methods)


def influence_notes(report: RunReport) -> list[str]:
    """Remarks on the influences, one line each: harm, draft quality, failures by kind, the
    noise floor, agreement of evaluators."""
    counts, lines = influence_counts(report.traces), list[str]()
    if counts.harm_rate is not None and counts.harm is not None:
        lines.append(
            f"Harm rate {format_share(counts.harm_rate)} (95 % {format_interval(counts.harm)})."
        )
    if counts.draft_quality is not None:
        lines.append(f"Drafts by themselves score {counts.draft_quality:.2f} on average.")
    if counts.failures:
        most = max(counts.failures, key=lambda kind: counts.failures[kind])
        lines.append(f"Failed drafts: {format_kinds(counts.failures)}. Of {most}: {remedy(most)}.")
    noise, bound = report.noise, mean_noise(report)
    if noise is not None and noise.n and bound is not None:
        lines.append(
            "Noise floor: asked again, the strong model alone scored otherwise on "
            f"{noise.changed} of {noise.n} examples, by "
            f"{noise.mean_change:.2f} on average; by that alone a mean influence may be "
            f"{bound:.3f}."
        )
    elif noise is not None and not noise.n:
        lines.append("Noise floor 0: the strong model does not sample.")
    for evaluator, found in report.agreement.items():
        if found.tau is None:
            words = f"not defined, one of them scored all {found.n} answers alike"
        else:
            span = found.interval
            spread = f" (95 % {span.low:+.2f} to {span.high:+.2f})" if span else ""
            words = f"Kendall's tau-b {found.tau:+.2f}{spread}, {found.n} answers"
        lines.append(f"Agreement of {evaluator} and metric: {words}.")
    return lines


def arm_notes(report: RunReport) -> list[str]:
    """Remarks on the arms, one line each: the failures of each arm by kind."""
    return [
        f"Failed answers of {arm.title}: {format_kinds(arm.failures)}."
        for arm in report.arms
        if arm.failures
    ]


def pairs_notes(report: RunReport) -> list[str]:
    """Remarks on the pairs, one line each: those of a round that was skipped, on which
    nothing was trained."""
    return [
        (
            f"Of these, {notebook.format_plural(row.pairs, 'pair')} of round {row.number}, which "
            "was skipped: not trained on."
        )
        for row in report.rounds
        if row.outcome == "skipped" and row.pairs
    ]


def _rival_claim(report: RunReport, rival: str) -> tuple[str, bool] | None:
    test = compare_arms(report, rival, report.main_arm)
    if test is None or test.difference is None:
        return None
    direction, why = _direction(test), explain_chance(test, smallest_difference(report.config))
    ours, theirs = describe_arm(report, report.main_arm), describe_arm(report, rival)
    claim = {
        1: f"{ours} beats {theirs} by {format_gain(test)}",
        -1: f"{ours} is WORSE than {theirs} by {format_gain(test, -1)}",
        0: (
            f"{ours} does NOT reliably beat {theirs}: "
            f"{f'{why}; ' if why else ''}{format_points(test)}"
        ),
    }[direction]
    left = f" ({test.left_out:,} left out, failed or missing)" if test.left_out else ""
    return f"{claim}, n {test.n:,}{left}, {format_p(test.p)}", direction > 0


def _tuning_claim(report: RunReport) -> tuple[str, bool] | None:
    test = compare_arms(report, report.before, report.after)
    if test is None or test.difference is None:
        return None
    if is_untuned(report):
        return "no tuned model was taken, so the weak model is the one from before", False
    what = "the cycle" if report.steps else "tuning"
    counts = f"it fixed {test.higher:,} and broke {test.lower:,} of {test.n:,} ({format_p(test.p)})"
    why = explain_chance(test, smallest_difference(report.config))
    words = {1: f"{what} helped", -1: f"{what} did HARM", 0: f"{what} made NO reliable difference"}
    direction = _direction(test)
    return (
        f"{words[direction]}: {counts}{f', {why}' if why and not direction else ''}",
        direction > 0,
    )


def _harm_text(report: RunReport) -> str | None:
    """Describe the harm of drafts, where the whole interval of the last round's mean influence lies
    below 0."""
    rounds = influence_by_round(report.traces)
    if not rounds:
        return None
    number, counts = list(rounds.items())[-1]
    if counts.mean is None or counts.interval is None or counts.interval.high >= 0:
        return None
    which = f" of round {number}" if len(rounds) > 1 else ""
    span = f"{counts.mean:+.2f} [{counts.interval.low:+.2f}, {counts.interval.high:+.2f}]"
    rate = (
        f"harm rate {100 * (counts.harm_rate or 0):.0f} % of "
        f"{notebook.format_plural(counts.n - counts.failed, 'draft')}"
    )
    return f"the drafts{which} HURT the strong model: mean influence {span}, {rate}"


def explain_doubt(test: PairedTest) -> str | None:
    """Explain why the interval of a difference says one thing and its test another; None where they
    agree.

    A test of few changed answers cannot fall below p = 0.05, whatever the interval, which is
    approximate.
    """
    if test.interval is None:
        return None
    apart = not test.interval.low <= 0 <= test.interval.high
    if apart == (test.p < ALPHA):
        return None
    changed = test.higher + test.lower
    if not apart:
        return f"the test finds a difference ({format_p(test.p)}), but its interval includes 0"
    if changed < LEAST_CHANGED:
        few = (
            f"{test.n:,} examples are too few"
            if changed == test.n
            else f"{changed:,} changed answers of {test.n:,} are too few"
        )
        return (
            f"{few}: the exact test needs at least {LEAST_CHANGED} that change, and the "
            "interval is only approximate there"
        )
    return (
        "the interval, which is approximate, leaves 0 out, but the test, which decides, does not "
        "reach 5 %"
    )


def smallest_difference(config: Mapping[str, Any]) -> float:
    """The smallest difference worth finding, in points: that of [compare], else 5."""
    rules = config.get("compare")
    value = rules.get("smallest") if isinstance(rules, dict) else None
    return float(value) if isinstance(value, int | float) and 0 < value < 100 else SMALLEST


def format_detectable(test: PairedTest) -> str:
    """The smallest difference that the examples could show, in points; a dash for too few."""
    return "-" if test.detectable is None else f"{100 * test.detectable:.1f}"


def explain_chance(test: PairedTest, smallest: float) -> str | None:
    """Explain what a test without a finding rules out: differences beyond the far end of its
    interval, where that end is at most ``smallest`` points or so few could have been shown; else
    how many questions could show ``smallest``. Where interval and test are at odds, explain that.
    None for a finding, and where too few answers change to say any of it."""
    doubt = explain_doubt(test)
    needed = test.needed(smallest / 100)
    if doubt or test.p < ALPHA or not (test.interval and test.detectable and needed):
        return doubt
    bound = 100 * max(-test.interval.low, test.interval.high)
    if min(bound, 100 * test.detectable) <= smallest:
        return f"no difference larger than {bound:.1f} points at 95 %"
    return f"not enough questions for {smallest:g} points, which need about {format_about(needed)}"


def format_about(count: int) -> str:
    """A count to two digits.

    >>> format_about(2941), format_about(315)
    ('2,900', '320')
    """
    return f"{float(f'{count:.2g}'):,.0f}"


def describe_rounds(rounds: Sequence[Round], *, why: bool = False) -> str:
    """``"round 1 was accepted, rounds 2 and 3 were rolled back"``; empty where there was no round.
    ``why``: with the reason of those that were skipped."""
    parts = list[str]()
    for outcome in get_args(Outcome):
        found = [row for row in rounds if row.outcome == outcome]
        if found:
            numbers = [str(row.number) for row in found]
            named = (
                " and ".join((", ".join(numbers[:-1]), numbers[-1]))
                if len(numbers) > 1
                else numbers[0]
            )
            reasons = (
                f" ({'; '.join(row.reason for row in found)})"
                if why and outcome == "skipped"
                else ""
            )
            parts.append(
                f"round{'s' * (len(found) > 1)} {named} {'were' if len(found) > 1 else 'was'} "
                f"{outcome}{reasons}"
            )
    return ", ".join(parts)


def is_untuned(report: RunReport) -> bool:
    """Whether no round's model was taken, so that what comes after tuning is what was before it; a
    cycle may change prompts."""
    return (
        bool(report.rounds) and not report.steps and not any(row.accepted for row in report.rounds)
    )


def _capitalize(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}"


def _direction(test: PairedTest) -> int:
    """1 for a gain, -1 for a loss, 0 when chance explains it, or when test and interval are at
    odds."""
    return 0 if explain_doubt(test) else finding(test, test.p) or 0


def _open_text(report: RunReport) -> str:
    if not report.arms:
        return "No verdict yet: no arm has been evaluated."
    have = ", ".join(arm.title for arm in report.arms)
    return f"No verdict yet: there is nothing to compare. Evaluated so far: {have}."


def describe_arm(report: RunReport, name: str) -> str:
    """An arm as a sentence names it: "the strong model alone"."""
    arm = report.arm(name)
    if name == report.after and name in _PHRASES and is_untuned(report):
        return f"the untuned {name}"
    return _PHRASES.get(name) or (arm.title if arm else name)


# A comparison


def comparison_verdict(comparison: Comparison, numbers: Numbers) -> Verdict:
    """Judge a comparison after Holm's correction at the two-sided level 0.05.

    ``good`` is True when the target is better than ``against`` and than every control, as far as
    these are there; False when it is not; None when there is no such claim to judge.
    """
    sentences, claims = list[str](), list[bool]()
    smallest = smallest_difference(comparison.config)
    against = numbers.arm(comparison.against)
    if against is not None and numbers.tests:
        sentences += _describe_findings(against.title, numbers, smallest)
        target = numbers.arm(comparison.target)
        if target is not None and target.finding is not None:
            claims.append(target.finding > 0)
    elif against is None and numbers.arms:
        sentences.append(
            f'No arm is tested: "{comparison.against}", which they are to be tested against, has '
            "not been evaluated."
        )
    for name, controls in controls_of(comparison).items():
        sentence, beaten = _controls_claim(name, len(controls), numbers, smallest)
        sentences.append(sentence)
        claims += [beaten] if name == comparison.target and beaten is not None else []
    if not sentences:
        return Verdict(("No verdict yet: there is nothing to compare.",), None)
    return Verdict(tuple(map(_capitalize, sentences)), all(claims) if claims else None)


def format_difference(test: PairedTest) -> str:
    """A signed difference in points (hundredths of the score) with its 95 % interval, or a dash.

    >>> from cowest_dspy.influence.statistics import Interval
    >>> interval = Interval(0.0569, 0.3404)
    >>> format_difference(PairedTest("mcnemar", 50, 50, 12, 2, 0, 0.2, interval, 0.013))
    '+20.0 [+5.7, +34.0]'
    """
    if test.difference is None:
        return "-"
    return format_points(test).replace(" points", "")


def _describe_findings(against: str, numbers: Numbers, smallest: float) -> list[str]:
    better, same, worse = (
        [line for line in numbers.arms if line.finding == sign] for sign in (1, 0, -1)
    )
    over = format_correction(numbers.tests)
    if better:
        sentences = [f"Better than {against} ({over}): {_join_findings(better, smallest)}."]
    else:
        sentences = [f"No arm is reliably better than {against} ({over})."]
    if same:
        sentences.append(f"Not distinguishable from {against}: {_join_findings(same, smallest)}.")
    if worse:
        sentences.append(f"WORSE than {against}: {_join_findings(worse, smallest)}.")
    turned = [
        line.title
        for line in numbers.arms
        if line.finding != finding(line.strict_test, line.strict_holm)
    ]
    if turned:
        sentences.append(
            f"With failures counted as wrong the finding is another one for: {', '.join(turned)}."
        )
    return sentences


def _join_findings(lines: Sequence[ArmNumbers | ControlTest], smallest: float) -> str:
    return "; ".join(
        (
            f"{line.title} ({format_difference(line.test)} points, "
            f"{format_p(line.holm)}{chance_clause(line.test, line.holm, smallest)})"
        )
        for line in lines
        if line.test is not None and line.holm is not None
    )


def chance_clause(test: PairedTest, corrected: float, smallest: float) -> str:
    """Explain, as a clause, a corrected p that does not reach 5 %: by the correction where the test
    alone does, else as ``explain_chance``; empty where there is nothing to explain."""
    if test.interval is None or corrected < ALPHA:
        return ""
    if test.p < ALPHA and not test.interval.low <= 0 <= test.interval.high:
        return f"; {format_p(test.p)} before the correction, as the interval is"
    why = explain_chance(test, smallest)
    return f"; {why}" if why else ""


def _controls_claim(
    name: str, count: int, numbers: Numbers, smallest: float
) -> tuple[str, bool | None]:
    """Whether the arm of that name beats every one of its ``count`` controls, in a sentence; None
    where that cannot be known."""
    target, tests = (
        numbers.arm(name),
        [control for control in numbers.controls if control.target == name],
    )
    if target is None:
        return (
            f'The controls are not judged: the arm "{name}", which has to beat them, has not been '
            "evaluated.",
            None,
        )
    if not tests:
        return (
            f"The controls are not judged: {target.title} shares no scored example with them.",
            None,
        )
    lost = [control for control in tests if finding(control.test, control.holm) != 1]
    arms = _join_findings(lost or tests, smallest)
    over = f"(Holm over {notebook.format_plural(len(tests), 'test')})"
    if lost:
        return (
            f"{target.title} does NOT reliably beat its controls {over}: {arms}. A method that "
            "cannot beat its controls is not "
            "shown to owe its score to what they leave out.",
            False,
        )
    missing = count - len(tests)
    left = f"; {missing} more could not be compared" if missing else ""
    return f"{target.title} beats its controls {over}: {arms}{left}.", missing == 0
