"""A hosted model: rate limits, retries and a deadline around ``dspy.LM``, which reaches it.

    lm = ApiEngine(Api(kind="api", model="openai/gpt-5-mini", api_key_env="OPENAI_API_KEY",
    requests_per_minute=60)).lm()

Every attempt, first or repeated, waits for room in the limits of its endpoint (limits.py). A
failure that passes (429, 5xx, a broken or silent connection, a body that is cut, no JSON or without
an answer) is tried again after an exponential, jittered pause; ``Retry-After`` holds back every
call to that endpoint. DSPy's own retries know no jitter, no upper bound and no other threads, so
they are off. A stop ends waits; an attempt that is under way may be paid for, and comes to its end
(attempts.py).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import dspy
from dspy.lm15 import Request, Response, response_to_events
from dspy.utils.exceptions import (
    LMError,
    LMProviderError,
    LMServerError,
    LMTimeoutError,
    LMTransportError,
    LMUnexpectedError,
    is_retryable_lm_error,
)

from cowest_dspy.lms import attempts, prices
from cowest_dspy.lms.config import Api
from cowest_dspy.lms.keys import key_in
from cowest_dspy.lms.protocol import UNREADABLE
from cowest_dspy.store import serialize
from cowest_dspy.store.budget import another_attempt
from cowest_dspy.store.rate_limit import Limits, rest, shared_limits
from cowest_dspy.utils.masking import without_secret

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
# English has about four characters to a token, other languages and code fewer. Too many is safe: it
# is corrected afterwards.
CHARACTERS_PER_TOKEN = 3


class ApiEngine:
    """An engine that reaches a hosted model as its settings say.

    The key is read from the environment here and stays inside: it is in no saved state, history or
    error message.

    Args:
        settings: as in a TOML.
        limits: those of its endpoint by default, shared with every other engine for the same model,
            address and key.
        attempt: makes one attempt in the place of :meth:`attempt`, for instance on another machine.

    Raises:
        ConfigError: the environment variable of the key is not set.
    """

    def __init__(
        self,
        settings: Api,
        *,
        limits: Limits | None = None,
        attempt: Callable[[Request], Response] | None = None,
    ) -> None:
        self.settings, self._attempt = settings, attempt or self.attempt
        self.limits = limits or shared_limits(
            settings.model,
            settings.api_base,
            settings.api_key_env,
            requests=settings.requests_per_minute,
            tokens=settings.tokens_per_minute,
        )
        self._key = key_in(settings.api_key_env) if settings.api_key_env else None
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
        for retries in range(self.settings.num_retries + 1):
            if retries:
                another_attempt()
            admission = self.limits.enter(self.estimated_tokens(request))
            used: int | None = None
            try:
                response = self._attempt(request)
                used = _used_tokens(response)
                return serialize.priced(
                    response, prices.usd(self._inner, self.settings.price, response)
                )
            except LMError as error:
                used = (
                    0 if error.status is not None and 400 <= error.status < 500 else None
                )  # refused: nothing was generated
                if retries == self.settings.num_retries or not is_retryable_lm_error(error):
                    raise
                pause = self._pause(error, retries)
            finally:
                self.limits.leave(admission, used)
            rest(pause)
        raise AssertionError("the last attempt returns or raises")

    def stream(self, request: Request) -> Any:
        """The finished answer as events: an answer that is not whole could not be tried again."""
        return response_to_events(self.complete(request))

    def dump_state(self) -> dict[str, Any]:
        """The settings. The key is not among them, only the name of its variable."""
        return {"settings": self.settings.model_dump(mode="json")}

    @classmethod
    def load_state(cls, state: dict[str, Any]) -> ApiEngine:
        """The inverse of :meth:`dump_state`; the key is read from the environment."""
        return cls(Api.model_validate(state["settings"]))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).load_state, (self.dump_state(),)

    def __deepcopy__(self, memo: dict[int, Any]) -> ApiEngine:
        return self

    def attempt(self, request: Request) -> Response:
        """One request, which ends in an answer or an error within ``timeout`` seconds, whatever the
        server does, and which no stop ends before. It is not limited, and not repeated."""
        try:
            # The LM around this engine keeps history, counts usage and streams: not twice.
            with dspy.context(disable_history=True, usage_tracker=None, send_stream=None):
                response = attempts.within(self.settings.timeout, lambda: self._ask(request))
        except TimeoutError:
            error: BaseException = LMTimeoutError(
                f"No whole answer within timeout = {self.settings.timeout:g} seconds.",
                model=request.model,
            )
        except Exception as found:  # Of whatever kind: it may repeat the key.
            error = self._told(found)
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
        # All of them run on one loop (attempts.py): nobody takes one in between.
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

    def _told(self, error: BaseException) -> BaseException:
        """The error as it is raised: without the key, and a body that is no JSON or not read as the
        broken transport that it is."""
        cause = error.__cause__
        if self._key and _says(error, self._key):
            # A server has repeated the key. The cause repeats it too, so that the error is told
            # anew, without one.
            plain = type(error) if isinstance(error, LMError) else LMError
            text = without_secret(str(getattr(error, "message", error)), self._key)
            details = {
                name: getattr(error, name, None)
                for name in ("model", "provider", "provider_code", "status", "retry_after")
            }
            error = plain(text, **details)
        garbled = isinstance(error, LMUnexpectedError) and isinstance(cause, UNREADABLE)
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


class AsyncApiEngine:
    """The same engine for ``await lm.acall(...)``: a thread waits for each answer."""

    def __init__(self, engine: ApiEngine) -> None:
        self.engine = engine

    async def complete(self, request: Request) -> Response:
        """As :meth:`ApiEngine.complete`."""
        return await asyncio.to_thread(self.engine.complete, request)

    def dump_state(self) -> dict[str, Any]:
        """As :meth:`ApiEngine.dump_state`."""
        return self.engine.dump_state()

    @classmethod
    def load_state(cls, state: dict[str, Any]) -> AsyncApiEngine:
        """As :meth:`ApiEngine.load_state`."""
        return cls(ApiEngine.load_state(state))

    def __deepcopy__(self, memo: dict[int, Any]) -> AsyncApiEngine:
        return self


def _says(error: BaseException | None, key: str) -> bool:
    """Whether the error, or one that led to it, has the key in it, in any form."""
    if error is None:
        return False
    text = f"{error} {vars(error)}"
    return without_secret(text, key) != text or _says(error.__cause__ or error.__context__, key)


def _connection(settings: Api, key: str | None, model: str) -> dspy.LM:
    """An LM with connections of its own, which a copy of another would share."""
    options: dict[str, Any] = {"timeout": settings.timeout + attempts.GRACE}
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
