"""From a program's answer to OpenAI's answer: whole, or as chunks of a stream."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import dspy

from cowest_dspy.program.adapters import LineAdapter, escape_field_marks, escape_value
from cowest_dspy.serve.asking import Answer
from cowest_dspy.serve.protocol import ChatCompletion, Choice, Failing, Said, Told, Usage
from cowest_dspy.serve.reading import Asked, Task, only
from cowest_dspy.serve.refusals import Refused
from cowest_dspy.utils.jsonable import plain
from cowest_dspy.utils.safe_text import without_half_pairs

UNREFINED = "Unrefined draft (the strong model did not answer):\n"
"""How the text of the fallback "draft" begins, for a client that sees nothing but the text."""
_PIECES = re.compile(r"\S+\s*|\s+")
MOST_PIECES = 256
DONE = "data: [DONE]\n\n"


@dataclass(frozen=True)
class Head:
    """What every object about one answer says: its id, when (in Unix seconds), and the model's
    name."""

    id: str
    created: int
    model: str


def content_of(answer: Answer, asked: Asked, task: Task) -> str:
    """The answer's text in the form that is wanted.

    Raises:
        Refused: 502: the draft would be the answer, and has not the fields that a program expects.
    """
    return without_half_pairs(_said(answer, asked, task))


def _said(answer: Answer, asked: Asked, task: Task) -> str:
    outputs = answer.outputs
    if answer.fallback == "draft":
        whole = set(asked.fields) <= outputs.keys()
        if asked.form == "text":
            return UNREFINED + (_text(outputs, asked, task) if whole else answer.draft or "")
        if not whole:
            raise Refused(
                502,
                "The strong model gave no usable answer, and the draft is none.",
                "strong_model_failed",
            )
    if asked.form == "json":
        return json.dumps({name: plain(outputs[name]) for name in asked.fields}, ensure_ascii=False)
    if asked.form == "marks":
        # A value must not end where another one would begin.
        safe = {name: escape_value(outputs[name], escape_field_marks) for name in asked.fields}
        return dspy.ChatAdapter().format_assistant_message_content(
            only(task.signature, asked.fields), safe
        )
    return _text(outputs, asked, task)


def _text(outputs: dict[str, Any], asked: Asked, task: Task) -> str:
    return LineAdapter().format_assistant_message_content(
        only(task.signature, asked.fields), outputs
    )


def told(answer: Answer, asked: Asked, models: Mapping[Failing, str]) -> Told:
    """How an answer came about, for whoever wants to know."""
    return Told(
        route=answer.route,
        fallback=answer.fallback,
        failed=answer.failed,
        models=models,
        tokens=answer.tokens,
        ignored=list(asked.ignored),
    )


def usage(answer: Answer) -> Usage:
    """The tokens of both models together."""
    tokens = answer.tokens
    given, made = tokens["weak_in"] + tokens["strong_in"], tokens["weak_out"] + tokens["strong_out"]
    return Usage(prompt_tokens=given, completion_tokens=made, total_tokens=given + made)


def whole(
    head: Head, content: str, draft: str | None, answer: Answer, about: Told
) -> ChatCompletion:
    """The answer as one object; ``draft``: shown as reasoning_content."""
    said = Said(
        content=content, reasoning_content=None if draft is None else without_half_pairs(draft)
    )
    return ChatCompletion(
        id=head.id,
        created=head.created,
        model=head.model,
        choices=[Choice(message=said)],
        usage=usage(answer),
        cowest=about,
    )


class Chunks:
    """The chunks of one stream, as server-sent events. ``with_usage``: every chunk says "usage",
    and the last one what it is."""

    def __init__(self, head: Head, *, with_usage: bool) -> None:
        self._head, self._usage = head, with_usage

    def opening(self) -> str:
        """The first: who speaks."""
        return self._chunk({"role": "assistant", "content": ""})

    def reasoning(self, draft: str) -> str:
        """The draft."""
        return self._chunk({"reasoning_content": without_half_pairs(draft)})

    def content(self, text: str) -> Iterator[str]:
        """The answer's text in pieces that are together the text: word by word, or some words at
        once where there are many."""
        words = _PIECES.findall(text)
        step = -(-len(words) // MOST_PIECES) or 1
        for place in range(0, len(words), step):
            yield self._chunk({"content": "".join(words[place : place + step])})

    def closing(self, answer: Answer, about: Told) -> Iterator[str]:
        """The end, with how the answer came about, and the tokens where they are wanted."""
        yield self._chunk({}, finish_reason="stop", cowest=about.model_dump())
        if self._usage:
            yield _event({**self._facts(), "choices": [], "usage": usage(answer).model_dump()})
        yield DONE

    def failing(self, error: Refused) -> str:
        """An error after the stream has begun, as OpenAI's SDKs understand it."""
        return _event(error.body)

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return _event(
            {
                **self._facts(),
                "choices": [choice],
                **({"usage": None} if self._usage else {}),
                **more,
            }
        )

    def _facts(self) -> dict[str, Any]:
        head = self._head
        return {
            "id": head.id,
            "object": "chat.completion.chunk",
            "created": head.created,
            "model": head.model,
        }


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"
