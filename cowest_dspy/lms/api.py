"""A hosted model: rate limits, retries, a deadline and prices around ``dspy.LM``, which reaches it.

    lm = ApiEngine(Api(kind="api", model="openai/gpt-5-mini", api_key_env="OPENAI_API_KEY",
    requests_per_minute=60)).lm()

Every attempt, first or repeated, waits for room in the limits of its endpoint (rate_limit.py). A
failure that passes (429, 5xx, a broken or silent connection, a body that is cut, no JSON or without
an answer) is tried again after an exponential, jittered pause; ``Retry-After`` holds back every
call to that endpoint. DSPy's own retries know no jitter, no upper bound and no other threads, so
they are off. A stop ends waits; an attempt that is under way may be paid for, and comes to its end
(protocol.py).

What an answer costs comes from the settings' own price, else from the table that DSPy ships. Where
neither says, it is not known: None, never 0, and a sum with an unknown part is unknown.
"""

from __future__ import annotations

import random
from typing import Any

import dspy
from dspy.lm15 import LM15Error, Request, Response
from dspy.utils.exceptions import (
    LMError,
    LMProviderError,
    LMServerError,
    LMTimeoutError,
    LMTransportError,
    LMUnexpectedError,
)

from cowest_dspy.lms import protocol
from cowest_dspy.lms.base_engine import AsyncEngine, BaseEngine
from cowest_dspy.lms.config import Api, Price, read_key
from cowest_dspy.store import serialize
from cowest_dspy.store.rate_limit import Limits, retry, shared_limits
from cowest_dspy.utils.masking import without_secret

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
# English has about four characters to a token, other languages and code fewer. Too many is safe: it
# is corrected afterwards.
CHARACTERS_PER_TOKEN = 3
MILLION = 1_000_000


class ApiEngine(BaseEngine):
    """An engine that reaches a hosted model as its settings say.

    The key is read from the environment here and stays inside: it is in no saved state, history or
    error message.

    Args:
        settings: as in a TOML.
        limits: those of its endpoint by default, shared with every other engine for the same model,
            address and key.

    Raises:
        ConfigError: the environment variable of the key is not set.
    """

    def __init__(self, settings: Api, *, limits: Limits | None = None) -> None:
        self.settings, self.concurrency = settings, settings.concurrency
        self.limits = limits or shared_limits(
            settings.model,
            settings.api_base,
            settings.api_key_env,
            requests=settings.requests_per_minute,
            tokens=settings.tokens_per_minute,
        )
        self._key = read_key(settings.api_key_env) if settings.api_key_env else None
        self._inner = _connection(settings, self._key, settings.model)
        self._idle: list[dspy.LM] = []
        self.supports_function_calling = self._inner.supports_function_calling
        self.supports_reasoning = self._inner.supports_reasoning
        self.supports_response_schema = self._inner.supports_response_schema
        self.supported_params = self._inner.supported_params

    def lm(self) -> dspy.LM:
        """A ``dspy.LM`` on this engine."""
        settings = self.settings
        return dspy.LM(
            settings.model,
            engine=self,
            async_engine=AsyncApiEngine(self),
            provider=self._inner.provider,
            cache=False,
            num_retries=0,
            temperature=settings.temperature,
            max_tokens=settings.max_tokens,
        )

    def complete(self, request: Request) -> Response:
        """The answer, with what it cost (``serialize.response_usd``).

        Raises:
            dspy's LMError: a failure that does not pass, or the last of ``num_retries`` + 1 that
                might have.
            BudgetError: a retry for which the run's budget has no room.
            KeyboardInterrupt: the work was stopped while the call waited for its turn or for
                another try.
        """
        return retry(lambda: self._admitted(request), self.settings.num_retries, self._pause)

    def _admitted(self, request: Request) -> Response:
        """One attempt, when the limits have room for it."""
        admission = self.limits.enter(self.estimated_tokens(request))
        used: int | None = None
        try:
            response = self.attempt(request)
            used = _used_tokens(response)
            return serialize.with_price(
                response, response_cost(self._inner, self.settings.price, response)
            )
        except LMError as error:
            if error.status is not None and 400 <= error.status < 500:
                used = 0  # refused: nothing was generated
            raise
        finally:
            self.limits.leave(admission, used)

    def dump_state(self) -> dict[str, Any]:
        """The settings. The key is not among them, only the name of its variable."""
        return {"settings": self.settings.model_dump(mode="json")}

    @classmethod
    def load_state(cls, state: dict[str, Any]) -> ApiEngine:
        """The inverse of :meth:`dump_state`; the key is read from the environment."""
        return cls(Api.model_validate(state["settings"]))

    def attempt(self, request: Request) -> Response:
        """One request, which ends in an answer or an error within ``timeout`` seconds, whatever the
        server does, and which no stop ends before. It is not limited, and not repeated."""
        try:
            # The LM around this engine keeps history, counts usage and streams: not twice.
            with dspy.context(disable_history=True, usage_tracker=None, send_stream=None):
                response = protocol.within(self.settings.timeout, lambda: self._ask(request))
        except TimeoutError:
            error: BaseException = LMTimeoutError(
                f"No whole answer within timeout = {self.settings.timeout:g} seconds.",
                model=request.model,
            )
        except Exception as found:  # Of whatever kind: it may repeat the key.
            error = self._without_key(found)
        else:
            if not serialize.lacks_answer(response, of_provider=True):
                return response
            error = LMServerError(
                "The server answered, but with no answer of a model in it.",
                model=request.model,
                status=200,
            )
        # Outside of the handlers: the error would otherwise carry the one before it, and what that
        # repeats of a key.
        raise error

    async def _ask(self, request: Request) -> Response:
        """One request on a connection that no other attempt has at the same time, and that is
        closed unless it brought an answer.

        After an interim answer (HTTP 102, 103), which DSPy's transport takes for the answer itself,
        the real one comes later: on a connection that is used again it would be the answer to
        another question. To be simplified when DSPy reads interim answers.
        """
        # All of them run on one loop (protocol.py): nobody takes one in between.
        same = bool(self._idle) and self._idle[-1].model == request.model
        inner = self._idle.pop() if same else _connection(self.settings, self._key, request.model)
        answered = False
        try:
            response = await inner.acall(request)
            answered = not serialize.lacks_answer(response, of_provider=True)
            return response
        finally:
            if answered:
                self._idle.append(inner)
            else:
                await inner.aclose()

    def _without_key(self, error: BaseException) -> BaseException:
        """The error as it is raised: without the key, and a body that is no JSON or not read as the
        broken transport that it is."""
        cause = error.__cause__
        if self._key and _contains_key(error, self._key):
            # A server has repeated the key. The cause repeats it too, so that the error is told
            # anew, without one.
            plain = type(error) if isinstance(error, LMError) else LMError
            text = without_secret(str(getattr(error, "message", error)), self._key)
            details = {
                name: getattr(error, name, None)
                for name in ("model", "provider", "provider_code", "status", "retry_after")
            }
            error = plain(text, **details)
        garbled = isinstance(error, LMUnexpectedError) and isinstance(cause, protocol.UNREADABLE)
        if type(error) is LMProviderError and error.status is not None and error.status < 300:
            garbled = True
        if garbled and isinstance(error, LMError):
            return LMTransportError(f"The answer is garbled: {error.message}", model=error.model)
        return error

    def _pause(self, error: LMError, retries: int) -> float:
        """Seconds before the next attempt; what the server asks for, all calls to it wait."""
        asked = min(error.retry_after or 0.0, self.settings.timeout)
        if asked:
            self.limits.hold(asked)
        growing = min(FIRST_PAUSE * 2**retries, LONGEST_PAUSE) * random.uniform(0.5, 1.0)
        return max(asked, growing)

    def estimated_tokens(self, request: Request) -> int:
        """Tokens of the prompt and of the longest answer, before anything is known."""
        letters = sum(len(message["content"]) for message in serialize.request_messages(request))
        return letters // CHARACTERS_PER_TOKEN + (
            request.config.max_tokens or self.settings.max_tokens
        )


class AsyncApiEngine(AsyncEngine):
    """The same engine for ``await lm.acall(...)``."""

    kind = ApiEngine


def _contains_key(error: BaseException | None, key: str) -> bool:
    """Whether the error, or one that led to it, has the key in it, in any form."""
    if error is None:
        return False
    text = f"{error} {vars(error)}"
    return without_secret(text, key) != text or _contains_key(
        error.__cause__ or error.__context__, key
    )


def _connection(settings: Api, key: str | None, model: str) -> dspy.LM:
    """An LM with connections of its own, which a copy of another would share."""
    options: dict[str, Any] = {"timeout": settings.timeout + protocol.GRACE}
    if settings.api_base:
        options["api_base"] = settings.api_base
    if key:
        options["api_key"] = key
    return dspy.LM(model, cache=False, num_retries=0, **options)


def _used_tokens(response: Response) -> int | None:
    usage = response.usage
    if usage.input_tokens is None or usage.output_tokens is None:
        return None
    used = usage.input_tokens + usage.output_tokens
    return (
        used if used <= serialize.MOST_TOKENS else None
    )  # Nobody else waits for room because of a count that is none.


def response_cost(lm: dspy.LM, price: Price | None, response: Response) -> float | None:
    """The cost of ``response`` of ``lm``; None when its price, or its number of tokens, is not
    known.

    A table prices a provider's own endpoint. An LM with an address of its own (``api_base``) is
    somebody else's: without a ``price`` its cost is not known.
    """
    if price is not None:
        return token_cost(price, response.usage.input_tokens, response.usage.output_tokens)
    return None if lm.kwargs.get("api_base") else _table_cost(lm, response)


def token_cost(price: Price, input_tokens: int | None, output_tokens: int | None) -> float | None:
    """US dollars for so many tokens, None when a number is not known.

    >>> token_cost(Price(input=0.25, output=2.0), 2_000_000, 500_000)
    1.5
    """
    if input_tokens is None or output_tokens is None:
        return None
    return (price.input * input_tokens + price.output * output_tokens) / MILLION


def estimate_cost(settings: Api, input_tokens: int, output_tokens: int) -> float | None:
    """Estimate what so many tokens of a hosted model would cost; None when its price is not known.

    By the thousand, as in many calls of ordinary length: prices of very long prompts are left out.
    """
    if settings.price is not None:
        return token_cost(settings.price, input_tokens, output_tokens)
    address: dict[str, Any] = {"api_base": settings.api_base} if settings.api_base else {}
    lm = dspy.LM(settings.model, cache=False, **address)
    read = response_cost(lm, None, serialize.make_response(settings.model, "", "stop", 1000, 0))
    written = response_cost(lm, None, serialize.make_response(settings.model, "", "stop", 0, 1000))
    return (
        None
        if read is None or written is None
        else (read * input_tokens + written * output_tokens) / 1000
    )


def _table_cost(lm: dspy.LM, response: Response) -> float | None:
    from dspy.clients.capabilities import resolve
    from dspy.clients.costs import estimate_cost as listed_cost

    try:
        route = resolve(lm)
    except LM15Error:
        return None  # a provider that only LiteLLM knows
    return listed_cost(response, provider=route.provider, requested_model=route.model)[0]
