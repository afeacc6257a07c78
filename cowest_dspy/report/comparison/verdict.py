"""The comparison in words: what is better than the arm to beat, what is not, and whether the method
beats its controls."""

from __future__ import annotations

from collections.abc import Sequence

from cowest_dspy.report.comparison.model import Comparison
from cowest_dspy.report.comparison.numbers import ArmNumbers, Numbers, controls_of
from cowest_dspy.report.comparison.significance import ALPHA, Paired, found
from cowest_dspy.report.verdict import Verdict, at_odds, format_p


def verdict(comparison: Comparison, numbers: Numbers) -> Verdict:
    """What the comparison shows after Holm's correction at the two-sided level 0.05.

    ``good`` is True when the target is better than ``against`` and than every control, as far as
    these are there; False when it is not; None when there is no such claim to judge.
    """
    sentences, claims = list[str](), list[bool]()
    against = numbers.arm(comparison.against)
    if against is not None and numbers.tests:
        sentences += _findings(against.title, numbers)
        target = numbers.arm(comparison.target)
        if target is not None and target.finding is not None:
            claims.append(target.finding > 0)
    elif against is None and numbers.arms:
        sentences.append(
            f'No arm is tested: "{comparison.against}", which they are to be tested against, has '
            "not been evaluated."
        )
    for name, controls in controls_of(comparison).items():
        sentence, beaten = _controls(name, len(controls), numbers)
        sentences.append(sentence)
        claims += [beaten] if name == comparison.target and beaten is not None else []
    if not sentences:
        return Verdict(("No verdict yet: there is nothing to compare.",), None)
    said = tuple(f"{sentence[0].upper()}{sentence[1:]}" for sentence in sentences)
    return Verdict(said, all(claims) if claims else None)


def format_difference(test: Paired) -> str:
    """A signed difference in points (hundredths of the score) with its 95 % interval, or a dash.

    >>> from cowest_dspy.influence.statistics import Interval
    >>> format_difference(Paired("mcnemar", 50, 50, 12, 2, 0, 0.2, Interval(0.0569, 0.3404), 0.013))
    '+20.0 [+5.7, +34.0]'
    """
    if test.difference is None:
        return "-"
    text = f"{100 * test.difference:+.1f}"
    return (
        text
        if test.interval is None
        else f"{text} [{100 * test.interval.low:+.1f}, {100 * test.interval.high:+.1f}]"
    )


def _findings(against: str, numbers: Numbers) -> list[str]:
    better, same, worse = (
        [line for line in numbers.arms if line.finding == sign] for sign in (1, 0, -1)
    )
    over = (
        f"Holm over {numbers.tests} {'test' if numbers.tests == 1 else 'tests'}, two-sided "
        f"{ALPHA:g}"
    )
    if better:
        sentences = [f"Better than {against} ({over}): {_listed(better)}."]
    else:
        sentences = [f"No arm is reliably better than {against} ({over})."]
    if same:
        sentences.append(f"Not distinguishable from {against}: {_listed(same)}.")
    if worse:
        sentences.append(f"WORSE than {against}: {_listed(worse)}.")
    turned = [
        line.title
        for line in numbers.arms
        if line.finding != found(line.strict_test, line.strict_holm)
    ]
    if turned:
        sentences.append(
            f"With failures counted as wrong the finding is another one for: {', '.join(turned)}."
        )
    return sentences


def _listed(lines: Sequence[ArmNumbers]) -> str:
    return "; ".join(
        (
            f"{line.title} ({format_difference(line.test)} points, "
            f"{format_p(line.holm)}{_doubt(line.test, line.holm)})"
        )
        for line in lines
        if line.test is not None and line.holm is not None
    )


def _doubt(test: Paired, corrected: float) -> str:
    """Why an interval leaves 0 out and the corrected p does not reach 5 %, as a clause; empty where
    the two agree."""
    if test.interval is None or corrected < ALPHA or test.interval.low <= 0 <= test.interval.high:
        return ""
    if test.p < ALPHA:
        return f"; {format_p(test.p)} before the correction, as the interval is"
    return f"; {at_odds(test.interval, test.p, test.n, test.higher, test.lower)}"


def _controls(name: str, count: int, numbers: Numbers) -> tuple[str, bool | None]:
    """Whether the arm of that name beats every one of its ``count`` controls, in a sentence; None
    where that cannot be said."""
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
    lost = [control for control in tests if found(control.test, control.holm) != 1]
    told = "; ".join(
        (
            f"{control.title} ({format_difference(control.test)} points, "
            f"{format_p(control.holm)}{_doubt(control.test, control.holm)})"
        )
        for control in lost or tests
    )
    over = f"(Holm over {len(tests)} {'test' if len(tests) == 1 else 'tests'})"
    if lost:
        return (
            f"{target.title} does NOT reliably beat its controls {over}: {told}. A method that "
            "cannot beat its controls is not "
            "shown to owe its score to what they leave out.",
            False,
        )
    missing = count - len(tests)
    left = f"; {missing} more could not be compared" if missing else ""
    return f"{target.title} beats its controls {over}: {told}{left}.", missing == 0
