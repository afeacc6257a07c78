"""Streams of a LineAdapter's answers as DSPy's ``StreamListener`` reads them.

    listeners = [dspy.streaming.StreamListener(name) for name in ("background", "answer")]
    async for piece in dspy.streamify(program, stream_listeners=listeners)(question="..."):
        ...

A listener finds its field between the marks of DSPy's ChatAdapter. A LineAdapter's answers are
bare, or have a label at the beginning of a line; on their way to listeners they get the marks in
the place of the labels.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import dspy


@contextmanager
def marking_fields(names: Sequence[str], labels: re.Pattern[str]) -> Iterator[None]:
    """Mark the fields in answers that are streamed to listeners inside this context.

    Args:
        names: the output fields, in their order.
        labels: finds a label at the beginning of a line; its group ``2 + n`` is of the n-th name.
    """
    stream = dspy.settings.send_stream
    if stream is None or not dspy.settings.stream_listeners:
        yield
        return
    with dspy.context(send_stream=_MarkedStream(stream, FieldMarks(names, labels))):
        yield


class _MarkedStream:
    """A stream of chunks whose text gets marks before it is sent on."""

    def __init__(self, stream: Any, marks: FieldMarks) -> None:
        self._stream, self._marks = stream, marks

    async def send(self, chunk: Any) -> None:
        """Send a chunk, its text in as many pieces as its fields need."""
        choice = chunk.choices[0]
        text, ends = choice.delta.content, choice.finish_reason is not None
        pieces = [*(self._marks.add(text) if text else ()), *(self._marks.end() if ends else ())]
        for piece in pieces:
            await self._stream.send(_with_text(chunk, piece))
        if not text:
            await self._stream.send(chunk)


class FieldMarks:
    """Turns a text that comes in pieces, with labels or bare, into one with ChatAdapter's marks.

    ``add`` gives what can be passed on: the beginning of a line is held back for as long as it may
    become a label. Text before the first label is of the first field.
    """

    def __init__(self, names: Sequence[str], labels: re.Pattern[str]) -> None:
        self._names, self._labels = list(names), labels
        self._words = [_words(name) for name in names]
        self._line, self._line_begins, self._begun = "", True, False

    def add(self, text: str) -> list[str]:
        """The pieces that can be passed on now."""
        made: list[str] = []
        for part in text.splitlines(keepends=True):
            self._line += part
            if self._may_become_label():
                continue
            made += self._flush()
            self._line_begins = part.endswith("\n")
        return made

    def end(self) -> list[str]:
        """The rest, and the mark behind the last field."""
        return [*self._flush(), "\n\n[[ ## completed ## ]]"]

    def _may_become_label(self) -> bool:
        """Whether it is not known yet if the line has a label, or what stands behind it."""
        alone = len(self._names) == 1
        if not self._line_begins or (alone and self._begun) or "\n" in self._line:
            return False
        found = self._labels.match(self._line)
        if found is not None:
            return found.end() == len(self._line)
        return any(words.startswith(_words(self._line)) for words in self._words)

    def _flush(self) -> list[str]:
        line, self._line = self._line, ""
        begins = self._line_begins and not (len(self._names) == 1 and self._begun)
        found = self._labels.match(line) if begins else None
        if found is None and self._begun:
            return [line] if line else []
        if found is None and not line.strip():
            return []
        self._begun, place, after = True, 0, 0
        if found is not None:
            place = next(n for n, _ in enumerate(self._names) if found.group(n + 2) is not None)
            after = found.end()
        return [f"\n\n[[ ## {self._names[place]} ## ]]\n", line[after:]]


def _words(text: str) -> str:
    """The words of a name or a line, in lower case, without the signs around them."""
    return " ".join(re.findall(r"[^\W_]+", text.casefold()))


def _with_text(chunk: Any, text: str) -> Any:
    """A chunk of the same call with this text, which does not end it."""
    made = copy.deepcopy(chunk)
    choice = made.choices[0]
    if isinstance(choice, dict):  # of DSPy's own engines
        choice["delta"]["content"], choice["finish_reason"] = text, None
    else:  # of LiteLLM
        choice.delta.content, choice.finish_reason = text, None
    return made
