"""DSPy's canonical ``Request`` and ``Response`` as plain dictionaries of text, and back.

The store, the engine and the traces speak in these dictionaries, so that only this file knows the
types of DSPy's LM layer.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dspy.lm15 import (
    Config,
    InvalidRequestError,
    Message,
    RefusalPart,
    Request,
    Response,
    TextPart,
    TokenLogprob,
    TopLogprob,
    Usage,
)

from cowest_dspy.utils.safe_text import has_half_pair

SAMPLING = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "stop",
    "seed",
    "frequency_penalty",
    "presence_penalty",
    "logprobs",
)
# Under this key of a response's provider_data an engine says what the answer cost.
PRICE = "cowest_usd"
MOST_TOKENS = 2**40
"""No answer has more: such a count is an error of a server, and a few of them would be more than a
store can add."""


def request_to_dict(request: Request) -> dict[str, Any]:
    """``{"model", "messages": [{"role", "content"}], "config": {...}}``; settings that are not set
    are left out.

    Raises:
        dspy.lm15.InvalidRequestError: the request holds something else than text (an image, a tool
            call).
    """
    config = {name: getattr(request.config, name) for name in SAMPLING}
    settings = {name: value for name, value in config.items() if value is not None and value != ()}
    if request.config.response_format is not None:
        settings["response_format"] = request.config.response_format
    return {"model": request.model, "messages": request_messages(request), "config": settings}


def request_messages(request: Request) -> list[dict[str, str]]:
    """The chat messages of a request, its system text first, as ``[{"role": ..., "content":
    ...}]``."""
    messages: list[dict[str, str]] = []
    if request.system is not None:
        messages.append({"role": "system", "content": _text_of(request.system)})
    for message in request.messages:
        role = "system" if message.role == "developer" else message.role
        messages.append({"role": role, "content": _text_of(message.parts)})
    return messages


def request_from_messages(model: str, messages: list[dict[str, str]], **sampling: Any) -> Request:
    """A request from chat messages and sampling settings such as ``temperature=1.0, max_tokens=64,
    seed=3``."""
    system = messages[0]["content"] if messages and messages[0]["role"] == "system" else None
    rest = messages[1:] if system is not None else messages
    make = {"user": Message.user, "assistant": Message.assistant, "system": Message.developer}
    return Request(
        model,
        tuple(make[m["role"]](m["content"]) for m in rest),
        system=system,
        config=Config(**sampling),
    )


def request_key(request: Request) -> str:
    """The content of a request as 64 hexadecimal digits: equal for equal model id, messages and
    settings, on any machine."""
    return content_key(request_to_dict(request))


def content_key(asked: Mapping[str, Any]) -> str:
    """:func:`request_key` of a request as a dictionary, also after a round trip through JSON.

    Raises:
        dspy.lm15.InvalidRequestError: a text in it cannot be sent, since it has half of a surrogate
            pair.
    """
    canonical = json.dumps(
        asked, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=list
    )
    try:
        return hashlib.sha256(canonical.encode()).hexdigest()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            "The request cannot be sent: half of a surrogate pair is in its text."
        ) from error


def digest(value: Any) -> str:
    """JSON-able content as 12 hexadecimal digits: equal for equal content."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def response_text(response: Response) -> str:
    """The text of a response; empty when the model wrote nothing."""
    return response.message.text or ""


def response_to_dict(response: Response) -> dict[str, Any]:
    """``{"model", "text", "finish_reason", "input_tokens", "output_tokens", "usd"}``, the last None
    where the price is not known; and ``"logprobs"`` where there are any: a list of ``{"token",
    "logprob", "token_id", "top": [...]}``."""
    answer: dict[str, Any] = {
        "model": response.model,
        "text": response_text(response),
        # OpenAI says of a model that refuses that it stopped.
        "finish_reason": "content_filter" if _refused(response) else response.finish_reason,
        "input_tokens": response.usage.input_tokens or 0,
        "output_tokens": response.usage.output_tokens or 0,
        "usd": response_usd(response),
    }
    if response.logprobs is not None:
        answer["logprobs"] = [
            {**_scored(one), "top": [_scored(other) for other in one.top]}
            for one in response.logprobs
        ]
    return answer


def find_fault(answer: Mapping[str, Any], written: str) -> str | None:
    """Describe what is wrong with an answer (:func:`response_to_dict`, and the same as JSON) that
    cannot be written, counted or paid for; None when nothing is.

    >>> find_fault({"text": "yes", "input_tokens": 2**63, "output_tokens": 1, "usd": None}, "{}")
    'it counts 9,223,372,036,854,775,809 tokens'
    """
    tokens, usd = answer["input_tokens"] + answer["output_tokens"], answer["usd"]
    if has_half_pair(written):
        return "half of a surrogate pair is in its text"
    if not 0 <= tokens <= MOST_TOKENS:
        return f"it counts {tokens:,} tokens"
    return f"it costs {usd} US dollars" if usd is not None and not 0 <= usd < math.inf else None


def lacks_answer(response: Response, *, of_provider: bool = False) -> bool:
    """Whether a provider's body has no answer in it, not even an empty one, as in ``{"choices":
    []}``: DSPy reads that as an answer without a text. ``of_provider``: a body of a form that is
    not known here, and that gave no text, has none either."""
    body = response.provider_data
    if response_text(response) or any(
        not isinstance(part, TextPart) for part in response.message.parts
    ):
        return False
    if body is None or PRICE in body:  # Made here, by an engine that has looked.
        return False
    if "choices" in body:
        choices: Any = body["choices"]
        choice = choices[0] if isinstance(choices, list) and choices else None
        message = choice.get("message") if isinstance(choice, Mapping) else None
        return not isinstance(message, Mapping) or not isinstance(
            message.get("content"), str | list | None
        )
    if "candidates" in body or "output" in body:
        return not (body.get("candidates") or body.get("output"))
    return of_provider and not body.get("stop_reason")


def response_from_dict(answer: dict[str, Any]) -> Response:
    """The inverse of :func:`response_to_dict`."""
    logprobs = answer.get("logprobs")
    return make_response(
        answer["model"],
        answer["text"],
        answer["finish_reason"],
        answer["input_tokens"],
        answer["output_tokens"],
        None if logprobs is None else tuple(token_logprob(**one) for one in logprobs),
        usd=answer.get("usd"),
    )


def make_response(
    model: str,
    text: str,
    finish_reason: Any,
    input_tokens: int,
    output_tokens: int,
    logprobs: tuple[TokenLogprob, ...] | None = None,
    *,
    usd: float | None = None,
) -> Response:
    """A text response with its token counts; ``finish_reason`` is stop, length or content_filter,
    ``usd`` as for :func:`with_price`."""
    usage = Usage(input_tokens=input_tokens, output_tokens=output_tokens)
    return with_price(
        Response(None, model, Message.assistant(text), finish_reason, usage, logprobs), usd
    )


def with_price(response: Response, usd: float | None) -> Response:
    """The response, and with it what it cost in US dollars; None is "not known", which is never
    0."""
    return replace(response, provider_data={**(response.provider_data or {}), PRICE: usd})


def response_usd(response: Response) -> float | None:
    """The cost of a response in US dollars, where its engine said so; None when it is not known."""
    usd = (response.provider_data or {}).get(PRICE)
    return float(usd) if isinstance(usd, int | float) else None


def token_logprob(
    token: str, logprob: float, token_id: int | None, top: Sequence[Mapping[str, Any]] = ()
) -> TokenLogprob:
    """A token of an answer with its natural log-probability; ``top`` are the likeliest, each of the
    same three keys."""
    return TokenLogprob(
        token, logprob, token_id=token_id, top=tuple(TopLogprob(**other) for other in top)
    )


def _scored(one: TokenLogprob | TopLogprob) -> dict[str, Any]:
    return {"token": one.token, "logprob": one.logprob, "token_id": one.token_id}


def _refused(response: Response) -> bool:
    return any(isinstance(part, RefusalPart) for part in response.message.parts)


def _text_of(parts: Any) -> str:
    if isinstance(parts, str):
        return parts
    texts = [getattr(part, "text", None) for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise InvalidRequestError(
            "Only text can be sent here: the request holds a part that is not text."
        )
    return "".join(text for text in texts if isinstance(text, str))
