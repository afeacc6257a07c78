"""Whether a tuned model is better: paired, on the same held-out examples, by rules that were set
before.

    found = gain({"q1": 0.0, "q2": 1.0}, {"q1": 1.0, "q2": 1.0})
    decide(found, RoundRules()).accepted      # False: two examples say too little

A failure is no score: an example counts where both programs have an answer, and failures are
compared apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from cowest_dspy.influence.statistics import bootstrap_mean_interval
from cowest_dspy.optimizers.config import RoundRules

Scores = Mapping[str, float | None]
"""By example id, in [0, 1]; None where there is no answer."""


@dataclass(frozen=True)
class Gain:
    """How much better ``after`` is than ``before``, on the ``n`` examples that both have answered.

    ``mean``, ``low`` and ``high`` are of the paired difference of scores, in [-1, 1]: its mean and
    the ends of its percentile bootstrap over examples at ``confidence``; None where there are fewer
    than 2 examples. ``better`` and ``worse`` count examples. ``failed_before`` and ``failed_after``
    count the examples without an answer, of ``examples`` in all.
    """

    examples: int
    n: int
    before: float | None
    after: float | None
    mean: float | None
    low: float | None
    high: float | None
    confidence: float
    better: int
    worse: int
    failed_before: int
    failed_after: int

    @property
    def span(self) -> str:
        """The mean and its interval, or "-"."""
        if self.mean is None or self.low is None or self.high is None:
            return "-"
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"

    def __str__(self) -> str:
        if self.span == "-":
            return f"not known: {self.n} of {self.examples} examples were answered by both"
        return f"{self.span} on {self.n} examples ({self.better} better, {self.worse} worse)"


@dataclass(frozen=True)
class Decision:
    """Whether a round's model is taken, and why, in one sentence."""

    accepted: bool
    reason: str


def gain(before: Scores, after: Scores, *, confidence: float = 0.9, seed: int = 0) -> Gain:
    """The paired gain of ``after`` over ``before``; both have the same examples."""
    # By name: the bootstrap draws by place, and scores that were kept come back in another order.
    both = [
        (one, other)
        for name, one in sorted(before.items())
        if one is not None and (other := after.get(name)) is not None
    ]
    changes = [other - one for one, other in both]
    span = bootstrap_mean_interval([[change] for change in changes], level=confidence, seed=seed)
    return Gain(
        examples=len(before),
        n=len(both),
        before=math.fsum(one for one, _ in both) / len(both) if both else None,
        after=math.fsum(other for _, other in both) / len(both) if both else None,
        mean=math.fsum(changes) / len(changes) if span else None,
        low=span.low if span else None,
        high=span.high if span else None,
        confidence=confidence,
        better=sum(change > 0 for change in changes),
        worse=sum(change < 0 for change in changes),
        failed_before=sum(score is None for score in before.values()),
        failed_after=sum(after.get(name) is None for name in before),
    )


def decide(found: Gain, rules: RoundRules) -> Decision:
    """The rules applied to a gain: taken when the lower end of its interval is above
    ``least_gain``, and failures did not rise."""
    more = found.failed_after - found.failed_before
    if found.low is None:
        return Decision(False, f"the gain is {found}")
    if more > rules.more_failures * found.examples:
        return Decision(
            False,
            (
                f"it fails on {found.failed_after} of {found.examples} examples, {more} more than "
                f"before; gain {found}"
            ),
        )
    sure = f"{found.confidence:.0%} interval"
    if found.low > rules.least_gain:
        return Decision(True, f"gain {found}: the {sure} is above {rules.least_gain:g}")
    if found.high is not None and found.high < rules.least_gain:
        return Decision(False, f"gain {found}: the {sure} is below {rules.least_gain:g}")
    return Decision(False, f"gain {found}: the {sure} does not lie above {rules.least_gain:g}")
