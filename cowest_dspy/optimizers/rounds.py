"""What a round did, and whether its tuned model is better: paired, on the same held-out examples,
by rules that were set before.

    found = gain({"q1": 0.0, "q2": 1.0}, {"q1": 1.0, "q2": 1.0})
    decide(found, RoundRules()).accepted      # False: two examples say too little

A failure is no score: an example counts where both programs have an answer, and failures are
compared apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cowest_dspy.influence.statistics import bootstrap_mean_interval
from cowest_dspy.optimizers.config import RoundRules
from cowest_dspy.utils import notebook

Scores = Mapping[str, float | None]
"""By example id, in [0, 1]; None where there is no answer."""
Outcome = Literal["accepted", "rolled back", "skipped"]
"""What became of a round: its tuned model was taken, its tuned model was not taken, or nothing was
tuned."""


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


@dataclass(frozen=True)
class Round:
    """What one round did. ``start`` and ``model`` are the ids of the weak model before and after
    tuning; ``model`` is None where nothing was tuned. ``pairs`` counts the rows of training (with
    KTO: labelled drafts), or those that were too few for it; ``replayed`` of them are of earlier
    rounds. ``reason`` says why it was accepted, rolled back or skipped."""

    number: int
    start: str
    model: str | None
    pairs: int
    replayed: int
    outcome: Outcome
    reason: str
    gain: Gain | None = None

    @property
    def accepted(self) -> bool:
        """Whether the next round, or the result, goes on from its model."""
        return self.outcome == "accepted"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Round:
        """The inverse of ``dataclasses.asdict``."""
        made = {**values, "gain": Gain(**values["gain"]) if values["gain"] else None}
        if "accepted" in made:  # a run's record from before outcomes had names
            accepted = made.pop("accepted")
            made["outcome"] = (
                "accepted" if accepted else "rolled back" if made["model"] else "skipped"
            )
        return cls(**made)

    def __str__(self) -> str:
        return f"round {self.number} {self.outcome}: {self.reason}"


class RoundHistory(tuple[Round, ...]):
    """Rounds in order: a tuple, which a notebook shows as a table."""

    def __repr__(self) -> str:
        return "\n".join(map(str, self)) or "no rounds"

    def _repr_html_(self) -> str:
        """One row for each round: what it was tuned on, what it gained on the dev split, its
        outcome, and why."""
        heads = ("round", "outcome", "why", "pairs", "replayed", "n", "gain")
        rows = [
            (str(one.number), one.outcome, notebook.format_text(one.reason), *_numbers(one))
            for one in self
        ]
        accepted = sum(one.accepted for one in self)
        return notebook.view(
            f"{notebook.format_plural(len(self), 'round')}, {accepted} accepted",
            notebook.table(heads, rows, texts=3, most=20) if rows else None,
        )


def _numbers(one: Round) -> tuple[str, str, str, str]:
    found = one.gain
    return (
        f"{one.pairs:,}",
        f"{one.replayed:,}",
        f"{found.n:,}" if found else "-",
        found.span if found else "-",
    )


def rows_file(run: Path, name: str, number: int) -> Path:
    """Where a run keeps the rows of a round, ``name`` being "pairs" or "drafts"."""
    return run / f"{step_name(name, number).replace(' ', '-')}.jsonl"


def step_name(name: str, number: int) -> str:
    """The name of a round's step: the first round's is the plain name."""
    return name if number == 1 else f"{name} {number}"
