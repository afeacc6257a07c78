"""Two rules in the place of models, so that the path from a TOML to a report can be tried in
seconds, without any weights.

Neither knows anything: the drafter guesses and says so, the solver calculates with whatever numbers
it is given. What a run with them measures means nothing.
"""

from __future__ import annotations

import random
import re
from typing import Any

from cowest_dspy.testing import ScriptedEngine

LABEL = re.compile(r"^([A-Z][a-z ]*):", re.MULTILINE)
# A word with a capital that does not begin a sentence.
NAME = re.compile(r"(?<![.?!] )(?<!: )\b[A-Z][a-z]+\b(?!:)")


def drafter() -> ScriptedEngine:
    """Guesses a number for each name in the question; another seed, another guess, now and then
    none."""
    return ScriptedEngine(_guess, model="scripted/drafter")


def solver() -> ScriptedEngine:
    """Compares or subtracts the first two numbers of the last message; answers in the form of the
    worked examples."""
    return ScriptedEngine(_solve, model="scripted/solver")


def _guess(request: dict[str, Any]) -> str:
    question = request["messages"][-1]["content"]
    draw = random.Random(f"{request['config'].get('seed', 0)} {question}")
    names = dict.fromkeys(NAME.findall(question))
    if not names or draw.random() < 0.25:
        return "Nothing is known about that."
    return " ".join(f"{name} {draw.randint(12, 48)}, a guess." for name in names)


def _solve(request: dict[str, Any]) -> str:
    messages = request["messages"]
    answer, working = _answer(messages[-1]["content"])
    labels = _labels(messages)
    return (
        "\n".join(f"{label}: {answer if label == labels[-1] else working}" for label in labels)
        or answer
    )


def _answer(asked: str) -> tuple[str, str]:
    """The answer and the working: a name where there is a choice, yes or no where that is asked,
    otherwise a number."""
    question = asked.partition("\n")[0]
    numbers = [int(number) for number in re.findall(r"\d+", asked)[:2]]
    if len(numbers) < 2:
        return "unknown", "there are no two numbers."
    if " or " in question:
        names = NAME.findall(question)
        return (names[0] if numbers[0] > numbers[1] else names[-1]), f"{max(numbers)} is more."
    if re.search(r"(?:^Question:|[.?!]) (?:Is|May|Do|Does|Are) ", question):
        return ("yes" if numbers[0] <= numbers[1] else "no"), f"{numbers[0]} beside {numbers[1]}."
    return str(abs(numbers[0] - numbers[1])), f"from {min(numbers)} to {max(numbers)}."


def _labels(messages: list[dict[str, str]]) -> list[str]:
    """The labels of the last worked example: none when there is none, or when it is bare."""
    examples = [message["content"] for message in messages if message["role"] == "assistant"]
    return LABEL.findall(examples[-1]) if examples else []
