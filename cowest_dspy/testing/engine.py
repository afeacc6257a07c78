"""Scripts that say what a fake answers, and an engine that answers from one, inside the process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import dspy
from dspy.lm15 import InvalidRequestError, Request, Response, response_to_events

from cowest_dspy.store import serialize

Answer = TypeVar("Answer")
Script = Mapping[str, Answer] | Callable[[dict[str, Any]], Answer]
"""From a part of the last message to the answer; or a function of the request: "model", "messages",
"config"."""


class NotScripted(LookupError):
    """The script has no answer to a request, or more than one."""


def scripted(script: Script[Answer], asked: dict[str, Any]) -> Answer:
    """The script's answer to ``asked``, a request as ``{"model", "messages", "config"}``.

    Raises:
        NotScripted: no key, or more than one, is a part of the last message.
    """
    if not isinstance(script, Mapping):
        return script(asked)
    text = asked["messages"][-1]["content"]
    keys = [key for key in script if key in text]
    if len(keys) != 1:
        raise NotScripted(
            f"The script has {len(keys)} answers ({keys}) to: {text!r}. Exactly one is needed."
        )
    return script[keys[0]]


class ScriptedEngine:
    """An engine that answers from a script, and refuses what is not in it.

    Args:
        script: from a part of the last user message to the answer; or a function of the request as
            a dictionary (``model``, ``messages``, ``config``). An answer that is an exception is
            raised. An answer that ends in ``"..."`` counts as cut off (finish reason "length").
        model: the id of its LM.
    """

    supports_function_calling = False
    supports_reasoning = False
    supports_response_schema = False
    supported_params = frozenset({"max_tokens", "temperature", "top_p", "stop", "seed"})

    def __init__(self, script: Script[str | Exception], *, model: str = "scripted/model") -> None:
        self.script, self.model = script, model
        self.asked: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    def lm(self, **settings: Any) -> dspy.LM:
        """A ``dspy.LM`` on this engine."""
        settings.setdefault("temperature", 0.0)
        settings.setdefault("max_tokens", 64)
        return dspy.LM(self.model, engine=self, cache=False, num_retries=0, **settings)

    def complete(self, request: Request) -> Response:
        """The scripted answer; it costs nothing.

        Raises:
            dspy.lm15.InvalidRequestError: the script has no answer to this request, or more than
                one.
        """
        asked = serialize.request_to_dict(request)
        with self._lock:
            self.asked.append(asked)
        try:
            answer = scripted(self.script, asked)
        except NotScripted as error:
            raise InvalidRequestError(str(error)) from None
        if isinstance(answer, Exception):
            raise answer
        reason = "length" if answer.endswith("...") else "stop"
        words = sum(len(message["content"].split()) for message in asked["messages"])
        return serialize.make_response(
            request.model, answer, reason, words, len(answer.split()), usd=0.0
        )

    def stream(self, request: Request) -> Any:
        """The scripted answer as events."""
        return response_to_events(self.complete(request))

    def __deepcopy__(self, memo: dict[int, Any]) -> ScriptedEngine:
        return self
