"""A text in pieces, as it comes into being."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dspy.lm15 import Response, StreamDeltaEvent, StreamEndEvent, StreamStartEvent, TextDelta

# What a tokenizer writes for a character of which it has seen only some bytes.
_UNFINISHED = "\ufffd"


class Watch:
    """Who looks on while a row is generated: is told its tokens after each one, in the thread that
    computes.

    Only what is certain is passed on: no half characters, and nothing that may turn out to be the
    beginning of a stop string.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._held = max((len(stop) - 1 for stop in stops), default=0)
        self._tokens: queue.SimpleQueue[tuple[int, ...] | None] = queue.SimpleQueue()

    def __call__(self, tokens: Sequence[int]) -> None:
        """Another token has come."""
        self._tokens.put(tuple(tokens))

    def end(self) -> None:
        """Nothing more will come."""
        self._tokens.put(None)

    def texts(self) -> Iterator[str]:
        """The text so far, again and again, each time longer; ends with :meth:`end`."""
        while (tokens := self._tokens.get()) is not None:
            text = self._tokenizer.decode(tokens, skip_special_tokens=True)
            certain = text[: len(text) - self._held]
            if certain and not certain.endswith(_UNFINISHED):
                yield certain


def events(model: str, watch: Watch, result: Callable[[], Response]) -> Iterator[Any]:
    """The events of one answer: its beginning, its text in pieces, and its end with the tokens
    used. ``result`` gives the whole answer, or raises why there is none."""
    yield StreamStartEvent(model=model)
    said = ""
    for text in watch.texts():
        if text.startswith(said) and len(text) > len(said):
            yield StreamDeltaEvent(delta=TextDelta(text=text[len(said) :]))
            said = text
    response = result()
    rest = (response.message.text or "")[len(said) :]
    if rest or response.logprobs:
        yield StreamDeltaEvent(delta=TextDelta(text=rest, logprobs=response.logprobs or ()))
    yield StreamEndEvent(finish_reason=response.finish_reason, usage=response.usage)
