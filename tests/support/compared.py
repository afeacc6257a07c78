"""Small comparisons for the tests: arms from strings of marks or lists of scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cowest_dspy.influence.arms import Answer
from cowest_dspy.report import Arm, Stage
from cowest_dspy.report.compared import ComparedArm, Comparison, SweepPoint

MARKS = {"+": 1.0, "-": 0.0, "!": None}


def compared(
    name: str, scores: str | Sequence[float | None], seed: int = 0, **changes: Any
) -> ComparedArm:
    """An arm: + is right, - is wrong, ! is a failure; or scores, None for a failure."""
    values = [MARKS[mark] for mark in scores] if isinstance(scores, str) else list(scores)
    answers = tuple(
        Answer(
            f"q{i}",
            {"post": f"post {i}"},
            "gold",
            None if value is None else "text",
            value,
            "timeout" if value is None else None,
        )
        for i, value in enumerate(values)
    )
    arm = Arm(name, changes.pop("title", f"The {name} arm"), answers, changes.pop("note", ""))
    return ComparedArm(arm, seed, **changes)


def comparison(*arms: ComparedArm, **changes: Any) -> Comparison:
    """A comparison against "strong"."""
    facts: dict[str, Any] = {
        "title": "A comparison",
        "created": "2025-01-01T00:00:00Z",
        "against": "strong",
        "metric": "exact",
    }
    return Comparison(**(facts | changes), arms=arms)


def full(text: str = "plain") -> Comparison:
    """One that has every part; ``text`` stands wherever people write."""
    cost = Stage("strong", 12.5, 40, 4000, 800, 8, usd=0.0123)
    return comparison(
        compared(
            "strong", "+-!-----" * 5, title=f"Strong {text}", cost=cost, extra={"macro_f1": 0.41}
        ),
        compared(
            "control_shuffled", "+-------" * 5, note=text, cost=cost, extra={"macro_f1": None}
        ),
        compared(
            "collaboration",
            "+++++++!" * 5,
            0,
            cost=cost,
            extra={"macro_f1": 0.8},
            extra_intervals={"macro_f1": (0.7, 0.9)},
        ),
        compared("collaboration", "++++++-+" * 5, 1, cost=cost, extra={"macro_f1": 0.7}),
        sweep=tuple(
            SweepPoint(
                {"dpo.beta": beta, "pairs.format": kind},
                compared("tuned", marks * 5, seed),
                100 + seed,
            )
            for kind in ("dpo", text)
            for seed in (0, 1)
            for beta, marks in ((0.01, "++------"), (0.1, "+++++---"), (0.5, "+++-!---"))
        ),
        config={"strong": {"model": "m", "api_key": "plain-words"}, "title": text},
        versions={"dspy": "3.4.1"},
        warnings=(f"one warning: {text}",),
    )
