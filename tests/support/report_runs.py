"""Small runs for the tests of the report: arms from strings of marks, and one run that has every
part."""

from __future__ import annotations

import dataclasses
from typing import Any

from cowest_dspy.influence.arms import Answer
from cowest_dspy.influence.trace import Trace
from cowest_dspy.optimizers.rounds import Gain, Outcome, Round
from cowest_dspy.pairs import Pair
from cowest_dspy.pairs.dataset import Message
from cowest_dspy.report import (
    Arm,
    PairsSummary,
    RunReport,
    Stage,
)

HOSTILE = (
    '</script><script>document.title="owned"</script><img src=x onerror=alert(1)> & "quoted" \u2028'
)


def arm(name: str, marks: str, *, draft: str | None = None) -> Arm:
    """An arm from a string: + is right, - is wrong, ! is a failure."""
    scores = {"+": 1.0, "-": 0.0, "!": None}
    answers = (
        Answer(
            example_id=f"q{index}",
            inputs={"question": f"How much is {index}?"},
            gold=str(index),
            answer=None if mark == "!" else f"answer {index}",
            score=scores[mark],
            error="timeout: 60 s" if mark == "!" else None,
            draft=draft,
            steps={"working": "one step"},
        )
        for index, mark in enumerate(marks)
    )
    return Arm(name, f"The {name} arm", tuple(answers))


def run(*arms: Arm, **changes) -> RunReport:
    facts: dict[str, Any] = {
        "title": "A run",
        "created": "2025-01-01T00:00:00Z",
        "seed": 0,
        "arms": arms,
    }
    names = {"reference": "both", "rivals": ("strong",), "before": "sft", "after": "both"}
    return RunReport(**(facts | names | changes))


def trace(index: int, influence: float | None = 1.0, text: str = "a draft") -> Trace:
    return Trace(
        example_id=f"t{index}",
        draft_index=0,
        round=1,
        inputs={"question": "why?", "options": "a or b"},
        gold={"answer": "a"},
        prompt=(),
        completion=text,
        draft=text,
        refined={"answer": "a"},
        alone={"answer": "b"},
        refined_score=None if influence is None else 1.0,
        alone_score=0.0,
        influence=influence,
        draft_score=None,
        error="parse: no answer" if influence is None else None,
        weak_model="small",
        strong_model="large",
    )


def draft(
    example_id: str,
    index: int,
    influence: float | None,
    error: str | None = None,
    draft_score: float | None = None,
    round: int = 0,
    text: str = "a draft",
) -> Trace:
    """A draft of which only these facts matter."""
    return dataclasses.replace(
        trace(0, text=text),
        example_id=example_id,
        draft_index=index,
        influence=influence,
        refined_score=None if influence is None else max(influence, 0.0),
        alone_score=max(-(influence or 0.0), 0.0),
        error=error,
        draft_score=draft_score,
        round=round,
    )


def pair(
    example_id: str,
    prompt: str,
    chosen: str,
    rejected: str,
    rejected_influence: float | None = -1.0,
) -> Pair:
    """A pair of round 0 as a report has it."""
    asked, better, worse = (
        (Message(role=role, content=text),)
        for role, text in (("user", prompt), ("assistant", chosen), ("assistant", rejected))
    )
    return Pair(
        asked, better, worse, example_id, 0, 1, 1.0, rejected_influence, "small", "large", 0
    )


def gain(mean: float, low: float, high: float, n: int = 30) -> Gain:
    """A gain on the dev split of which only its interval matters."""
    return Gain(n, n, 0.5, 0.5 + mean, mean, low, high, 0.95, 0, 0, 0, 0)


def made_round(
    number: int, pairs: int, outcome: Outcome, reason: str, found: Gain | None = None
) -> Round:
    """A round without replayed pairs."""
    return Round(number, "small", None, pairs, 0, outcome, reason, found)


def full_run(text: str = "a draft") -> RunReport:
    return run(
        arm("strong", "+-!-----"),
        arm("sft", "++------", draft=text),
        arm("both", "+++++++!", draft=text),
        pairs=PairsSummary(1, 1, {"no margin": 3}, (pair("t0", "why?", text, "worse"),)),
        curves={
            "dpo": tuple(
                {"step": float(i), "loss": 0.7 / i, "rewards/margins": i / 10} for i in range(1, 9)
            )
        },
        stages=(Stage("collect", 12.5, 9, 100, 50, 3, 2**30), Stage("dpo", 3.0)),
        traces=(
            draft("t0", 0, 1.0, None, 1.0, 1, text),
            draft("t0", 1, -1.0, None, 0.0, 1, text),
            draft("t1", 0, 0.0, None, 1.0, 2, text),
            draft("t1", 1, None, "truncated: 64 tokens", None, 2, text),
        ),
        config={
            "strong": {"model": "m", "api_key": "plain-words", "api_base": "https://me:pw@host/v1"}
        },
        versions={"dspy": "3.4.1"},
        warnings=("one draft was truncated",),
    )
