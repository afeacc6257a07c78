"""Scripted models, questions and metrics that tests of collection, influence and optimisers
share."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import dspy

from cowest_dspy import (
    Collaboration,
    Judge,
)
from cowest_dspy.influence.trace import Sampling, Trace
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.testing import ScriptedEngine


def match(example: dspy.Example, prediction: Any, trace: Any = None) -> float:
    return float(prediction.answer == example.answer)


def questions(count: int) -> list[dspy.Example]:
    rows = [
        {"id": f"q{i}", "question": f"Question number {i}?", "answer": str(i)} for i in range(count)
    ]
    return [dspy.Example(**row).with_inputs("question") for row in rows]


def strong_that_reads() -> ScriptedEngine:
    """Answers what the background says; without one, "none"."""

    def answer(request: dict[str, Any]) -> str:
        lines = dict(
            line.split(": ", 1) for line in request["messages"][-1]["content"].splitlines()
        )
        return lines.get("Background", "none")

    return ScriptedEngine(answer, model="scripted/strong")


def weak_that_varies(texts: list[str]) -> ScriptedEngine:
    """Gives each seed of a question one of the texts ("{n}" is the question's number), in turn."""

    def answer(request: dict[str, Any]) -> str:
        number = request["messages"][-1]["content"].split()[-1].rstrip("?")
        seed = request["config"].get("seed", 0)
        order = sorted(
            Sampling(drafts=len(texts)).seed_of(f"q{number}", i) for i in range(len(texts))
        )
        return texts[order.index(seed) if seed in order else 0].format(n=number)

    return ScriptedEngine(answer, model="scripted/weak")


def together(weak: ScriptedEngine, strong: ScriptedEngine) -> Collaboration:
    return Collaboration("question -> answer", draft="knowledge").bind(
        weak=weak.lm(), strong=strong.lm()
    )


def made_trace(index: int, influence: float | None, text: str, example: str = "e") -> Trace:
    prompt = ({"role": "user", "content": f"prompt of {example}"},)
    error = None if influence is not None else "timeout: too slow"
    return Trace(
        example,
        index,
        1,
        {},
        {},
        prompt,
        text,
        text,
        None,
        None,
        None,
        None,
        influence,
        None,
        "weak",
        "strong",
        {},
        error,
    )


HINT = "Write the number of the question."


def weak_that_obeys(*, every: int = 0) -> ScriptedEngine:
    """Names the number of the question once its instructions ask for it, or an example shows it; by
    chance every n-th time."""
    asked = itertools.count(1)

    def answer(request: dict[str, Any]) -> str:
        lucky = every and next(asked) % every == 0
        told = any(HINT in message["content"] for message in request["messages"][:-1])
        number = request["messages"][-1]["content"].split("Question number ")[-1].split("?")[0]
        return number if told or lucky or len(request["messages"]) > 2 else "I do not know."

    return ScriptedEngine(answer, model="scripted/weak")


def proposer(seen: list[str]) -> dspy.LM:
    """Whatever it is asked, its answer holds the hint, in each form that an optimiser reads."""

    def answer(request: dict[str, Any]) -> str:
        text = request["messages"][-1]["content"]
        seen.append(text)
        asked = text[text.rindex("Respond with") :] if "Respond with" in text else ""
        if "JSON object" in asked:
            return json.dumps(dict.fromkeys(re.findall(r"`(\w+)`", asked), HINT))
        wanted = re.findall(r"\[\[ ## (\w+) ## \]\]", asked)
        return (
            "\n".join(f"[[ ## {name} ## ]]\n{HINT}" for name in wanted)
            if wanted
            else f"```\n{HINT}\n```"
        )

    return ScriptedEngine(answer, model="scripted/proposer").lm(temperature=1.0, max_tokens=500)


def instructions(module: dspy.Module) -> list[str]:
    predictors: list[Any] = module.predictors()
    return [str(dspy.ensure_signature(one.signature).instructions) for one in predictors]  # pyright: ignore[reportOptionalMemberAccess]


def miprov2(metric: Any, lm: dspy.LM, *, candidates: int = 3, threads: int = 1) -> dspy.MIPROv2:
    """MIPROv2 over instructions alone, with as little as it takes."""
    return dspy.MIPROv2(
        metric=metric,
        auto=None,
        num_candidates=candidates,
        prompt_model=lm,
        task_model=lm,
        max_bootstrapped_demos=0,
        max_labeled_demos=0,
        num_threads=threads,
    )


def judge_of(answer: Any, **settings: Any) -> tuple[Judge, ScriptedEngine]:
    script: Any = answer if callable(answer) else lambda request: answer
    engine = ScriptedEngine(script, model="scripted/judge")
    lm_settings = {"temperature": settings.pop("temperature", 0.0)}
    return Judge(engine.lm(**lm_settings), **settings), engine


def grading(
    example: dspy.Example,
    prediction: Any,
    trace: Any = None,
    pred_name: Any = None,
    pred_trace: Any = None,
) -> Any:
    score = match(example, prediction)
    return score if pred_name is None else dspy.Prediction(score=score, feedback="Say more vowels.")


GOOD = "Reason: it follows.\nCoherence: 5\nConsistency: 3"


def example(**fields: Any) -> dspy.Example:
    return dspy.Example(
        **{"id": "q1", "question": "How hot?", "answer": "180", **fields}
    ).with_inputs("question")
