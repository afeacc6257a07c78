"""What an answer cost in US dollars: by the settings' own price, else by the table that DSPy ships,
else not known.

Not known is None and never 0: a sum with an unknown part is unknown. What is computed in this
process costs nothing.
"""

from __future__ import annotations

from typing import Any

import dspy
from dspy.lm15 import LM15Error, Response

from cowest_dspy.lms.config import Api, Price
from cowest_dspy.store import serialize
from cowest_dspy.store.usage import added as added

MILLION = 1_000_000


def usd(lm: dspy.LM, price: Price | None, response: Response) -> float | None:
    """What ``response`` of ``lm`` cost; None when its price, or its number of tokens, is not known.

    A table prices a provider's own endpoint. An LM with an address of its own (``api_base``) is
    somebody else's: without a ``price`` its cost is not known.
    """
    if price is not None:
        return priced_tokens(price, response.usage.input_tokens, response.usage.output_tokens)
    return None if lm.kwargs.get("api_base") else _shipped(lm, response)


def priced_tokens(
    price: Price, input_tokens: int | None, output_tokens: int | None
) -> float | None:
    """US dollars for so many tokens, None when a number is not known.

    >>> priced_tokens(Price(input=0.25, output=2.0), 2_000_000, 500_000)
    1.5
    """
    if input_tokens is None or output_tokens is None:
        return None
    return (price.input * input_tokens + price.output * output_tokens) / MILLION


def of_settings(settings: Api, input_tokens: int, output_tokens: int) -> float | None:
    """What so many tokens of a hosted model would cost; None when its price is not known.

    By the thousand, as in many calls of ordinary length: prices of very long prompts are left out.
    """
    if settings.price is not None:
        return priced_tokens(settings.price, input_tokens, output_tokens)
    address: dict[str, Any] = {"api_base": settings.api_base} if settings.api_base else {}
    lm = dspy.LM(settings.model, cache=False, **address)
    read = usd(lm, None, serialize.make_response(settings.model, "", "stop", 1000, 0))
    written = usd(lm, None, serialize.make_response(settings.model, "", "stop", 0, 1000))
    return (
        None
        if read is None or written is None
        else (read * input_tokens + written * output_tokens) / 1000
    )


def _shipped(lm: dspy.LM, response: Response) -> float | None:
    from dspy.clients.capabilities import resolve
    from dspy.clients.costs import estimate_cost

    try:
        route = resolve(lm)
    except LM15Error:
        return None  # a provider that only LiteLLM knows
    return estimate_cost(response, provider=route.provider, requested_model=route.model)[0]
