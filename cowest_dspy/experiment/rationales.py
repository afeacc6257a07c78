"""Rationalisation: a strong model, told the right answer, writes what a weak model is to learn from
(Zelikman et al., STaR, 2022).

    made = rationales(examples, strong, task="Answer a question about biology.", draft="knowledge")
    made.examples[0].rationale, made.failures

The calls are recorded: in a run they are kept in its store, count in its budget, and cost nothing
the second time.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import dspy

from cowest_dspy.errors import DataError
from cowest_dspy.program.adapters import LineAdapter
from cowest_dspy.store.call_context import listening
from cowest_dspy.store.pool import map_in_threads
from cowest_dspy.store.record import EXPECTED_FAILURES, failure, recorded

Rationalised = Literal["knowledge", "chain_of_thought"]
_ASKED: dict[str, tuple[str, str]] = {
    "knowledge": (
        "background",
        "The right answer is given. Write, in one or two short sentences, background that helps "
        "to find it. "
        "Do not state the answer, and do not say that you know it.",
    ),
    "chain_of_thought": (
        "reasoning",
        "The right answer is given. Write, in one or two short sentences, the reasoning that "
        "leads to it, as if you had found "
        "it yourself.",
    ),
}


@dataclass(frozen=True)
class Rationales:
    """Written rationales. ``examples`` are copies of those that got one, in their order, with a
    field ``rationale``; ``failures`` counts the others by kind: "states the answer", "cut off", or
    a call's own, such as "timeout" and "parse"."""

    examples: list[dspy.Example]
    failures: dict[str, int] = field(default_factory=dict)


def rationales(
    examples: Sequence[dspy.Example],
    lm: dspy.LM,
    *,
    task: str,
    draft: Rationalised = "knowledge",
    answer: str = "answer",
    secret: Callable[[dspy.Example], Sequence[str]] | None = None,
    max_tokens: int = 128,
    num_threads: int = 4,
    on_progress: Callable[[int, int], None] | None = None,
) -> Rationales:
    """A rationale of each example, one call each, from its marked inputs and the gold answer in its
    field ``answer``.

    Args:
        examples: with marked inputs and the gold answer.
        lm: the strong model; recorded here if it is not yet.
        task: what is done with the inputs, in a sentence.
        draft: knowledge asks for background, which must not state the answer; chain_of_thought for
            reasoning that leads to it.
        answer: the field of the gold answer.
        secret: the texts that background must not contain, whatever their case; by default the
            answer. What stands in the inputs, and a single letter or digit, is no secret.
        max_tokens: of a rationale; a longer one is cut off, and dropped.
        num_threads: calls at once.
        on_progress: is told (done, in all).

    Raises:
        DataError: no examples, an example without the answer or with an input of that name; or not
            one rationale was had.
        BudgetError: a limit of the run's budget; what was answered is kept.
    """
    inputs = _inputs(examples, answer)
    output, wish = _ASKED[draft]
    signature = dspy.make_signature(
        f"{', '.join([*inputs, answer])} -> {output}", f"{task.strip()}\n{wish}"
    )
    predictor = dspy.Predict(signature, max_tokens=max_tokens)
    predictor.set_lm(recorded(lm))

    def one(example: dspy.Example) -> tuple[str, str]:
        """``(rationale, "")`` or ``("", kind of failure)``."""
        try:
            with dspy.context(adapter=LineAdapter()), listening() as calls:
                text = str(
                    predictor(**{name: example[name] for name in [*inputs, answer]})[output]
                ).strip()
        except EXPECTED_FAILURES as error:
            return "", failure(error).partition(":")[0]
        if calls and calls[-1].finish_reason == "length":
            return "", "cut off"
        kept = secret(example) if secret else [str(example[answer])]
        if draft == "knowledge" and _states(
            text, kept, " ".join(str(example[name]) for name in inputs)
        ):
            return "", "states the answer"
        return text, ""

    made = map_in_threads(one, examples, num_threads=num_threads, on_progress=on_progress)
    failures = dict(Counter(kind for _, kind in made if kind))
    if len(made) == sum(failures.values()):
        raise DataError(
            f"Not one of {len(made)} rationales was had: {_format_failures(failures)}. Is the "
            "strong model up to the task?"
        )
    written = zip(examples, made, strict=True)
    return Rationales(
        [example.copy(rationale=text) for example, (text, _) in written if text], failures
    )


def _inputs(examples: Sequence[dspy.Example], answer: str) -> list[str]:
    if not examples:
        raise DataError("There are no examples to rationalise.")
    inputs = list(examples[0].inputs().keys())
    for example in examples:
        if (
            set(example.inputs().keys()) != set(inputs)
            or answer in inputs
            or example.get(answer) in (None, "")
        ):
            raise DataError(
                f'Each example needs the same marked inputs, and the right answer in "{answer}", '
                "which is none of them."
            )
    return inputs


def _states(text: str, secrets: Sequence[str], inputs: str) -> bool:
    """Whether the text holds one of the secrets as whole words that the inputs do not hold."""
    texts = [
        " ".join(re.findall(r"\w+", said.lower().replace("_", " "))) for said in (text, inputs)
    ]
    for secret in secrets:
        words = " ".join(re.findall(r"\w+", str(secret).lower().replace("_", " ")))
        if (
            len(words) > 1
            and f" {words} " in f" {texts[0]} "
            and f" {words} " not in f" {texts[1]} "
        ):
            return True
    return False


def _format_failures(failures: dict[str, int]) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in sorted(failures.items()))
