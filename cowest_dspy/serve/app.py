"""The HTTP application: /v1/chat/completions (whole and streamed), /v1/models, /healthz, /metrics,
and its own OpenAPI schema. Every error is in OpenAI's form, and no text of a request is logged."""

# No "from __future__ import annotations" here: FastAPI reads annotations, and the types of these
# are imported inside of functions.

import asyncio
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any, Literal

from pydantic import BaseModel

from cowest_dspy.errors import nearest
from cowest_dspy.serve.answer import Answering, ServedAnswer, Unanswered
from cowest_dspy.serve.chat import (
    ChatRequest,
    Interface,
    ParsedRequest,
    Response,
    describe_answer,
    format_content,
    parse_request,
)
from cowest_dspy.serve.config import ServeRules
from cowest_dspy.serve.guard import (
    CHAT,
    HEALTH,
    METRICS,
    MODELS,
    PATHS,
    SCHEMA,
    ApiError,
    ClientGone,
    Guard,
    Metrics,
    Receive,
    error_response,
    internal_error,
)
from cowest_dspy.store.call_context import Stopping
from cowest_dspy.utils.safe_text import without_half_pairs

log = logging.getLogger("cowest_dspy.serve")


class ErrorFacts(BaseModel):
    """The facts of an error, in OpenAI's form."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of an error response."""

    error: ErrorFacts


class Health(BaseModel):
    """Whether requests are taken."""

    status: Literal["ok", "stopping"]


class Service:
    """A program behind the endpoint, asked by many at once.

    Args:
        answering: the program with its router and fallbacks.
        rules: [serve].
        name: the model's, for clients.
        inputs: the program's, in order; by default those of its strong model alone.

    Raises:
        ConfigError: [serve] fields names what the answer does not have.
    """

    def __init__(
        self, answering: Answering, rules: ServeRules, name: str, *, inputs: tuple[str, ...] = ()
    ) -> None:
        self.answering, self.rules, self.name = answering, rules, name
        self.interface = Interface.of(answering.program, inputs=inputs, fields=rules.fields)
        self.metrics, self.created = Metrics(), int(time.time())
        self._turns = asyncio.Semaphore(rules.limits.concurrency)

    def parse(self, request: ChatRequest) -> ParsedRequest:
        """Parse a request. Raises ApiError."""
        return parse_request(request, self.interface, self.rules, self.name)

    def shows_draft(self, request: ChatRequest) -> bool:
        """Whether the draft is given as reasoning_content."""
        asked = request.cowest is not None and request.cowest.draft
        return self.rules.show_draft == "always" or (self.rules.show_draft == "asked" and asked)

    async def answer(
        self,
        request_id: str,
        parsed: ParsedRequest,
        receive: Receive,
        on_draft: Callable[[str], None] = lambda _: None,
    ) -> ServedAnswer:
        """Answer a request within its time; ``on_draft`` is called on the event loop.

        When the client goes away, or the time is over, no further model is asked for it.

        Raises:
            ApiError: the time is over (504), or a model failed (502, 504).
            ClientGone: the client went away.
        """
        loop, stopping = asyncio.get_running_loop(), Stopping()
        work = asyncio.ensure_future(
            self._in_thread(
                lambda: self.answering.answer(
                    parsed.inputs,
                    on_draft=lambda draft: _call_soon(loop, on_draft, draft),
                    stopping=stopping,
                )
            )
        )
        gone = asyncio.ensure_future(_disconnected(receive))
        seconds = self.rules.limits.seconds
        try:
            async with asyncio.timeout(seconds):
                await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ClientGone
            answer = work.result()
        except TimeoutError:
            what = f"There was no answer within {seconds:g} seconds ([serve.limits] seconds)."
            raise ApiError(504, what, "timeout") from None
        except Unanswered as error:
            self.metrics.failures.labels(error.role, error.kind).inc()
            status = 504 if error.kind == "timeout" else 502
            raise ApiError(status, str(error), f"{error.role}_model_failed") from None
        finally:
            stopping.stop()
            work.cancel()
            gone.cancel()
        self.metrics.count_answer(answer)
        if self.rules.log_text:
            log.info("%s inputs %s outputs %s", request_id, parsed.inputs, answer.outputs)
        return answer

    async def _in_thread(self, ask: Callable[[], ServedAnswer]) -> ServedAnswer:
        """Ask in a thread of its own, so many at once as [serve.limits] concurrency says. A thread
        cannot be stopped: it keeps its turn until the model has come back, waited for or not."""
        with self.metrics.waiting.track_inprogress():
            await self._turns.acquire()
        loop = asyncio.get_running_loop()
        done: asyncio.Future[ServedAnswer] = loop.create_future()
        self.metrics.active.inc()

        def settle(answer: ServedAnswer | None, error: BaseException | None) -> None:
            self._turns.release()
            self.metrics.active.dec()
            if done.done():
                return
            if error is not None:
                done.set_exception(error)
            elif answer is not None:
                done.set_result(answer)

        def run() -> None:
            answer = error = None
            try:
                answer = ask()
            except BaseException as raised:
                error = raised
            _call_soon(loop, settle, answer, error)

        # A daemon does not keep a process alive that wants to end.
        threading.Thread(target=run, name="cowest-serve-model", daemon=True).start()
        return await done


def _call_soon(loop: asyncio.AbstractEventLoop, call: Callable[..., Any], *values: Any) -> None:
    with suppress(RuntimeError):  # The loop is closed: the process ends.
        loop.call_soon_threadsafe(call, *values)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def make_app(service: Service, *, key: str | None = None) -> Guard:
    """Build the ASGI application of a service. ``key``: what clients must give as a bearer token.

    Raises:
        ImportError: FastAPI is not installed (the extra "serve").
    """
    from fastapi import FastAPI

    from cowest_dspy import __version__

    api = FastAPI(
        title="cowest_dspy", version=__version__, docs_url=None, redoc_url=None, openapi_url=SCHEMA
    )
    guard = Guard(api, service.rules.limits, service.metrics, key)
    _handle_errors(api)
    _add_chat(api, service)
    _add_others(api, service, guard)
    _describe(api, service, secured=key is not None)
    return guard


_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request cannot be answered; it says why"},
    "5XX": {"model": ErrorBody, "description": "The server or a model failed, or is being stopped"},
}


def _add_chat(api: Any, service: Service) -> None:
    from fastapi import Request
    from fastapi.responses import JSONResponse, StreamingResponse
    from fastapi.responses import Response as HttpResponse
    from openai.types.chat import ChatCompletion

    event = {"description": "The answer", "content": {"text/event-stream": {"schema": {}}}}

    @api.post(
        CHAT,
        response_model=ChatCompletion,
        responses={200: event, **_ERRORS},
        operation_id="chat",
    )
    async def chat(body: ChatRequest, request: Request) -> HttpResponse:
        """Ask the collaboration. The last message is the program's input; the answer's text has the
        answer's fields."""
        facts: dict[str, Any] = request.scope["cowest"]
        response = Response(facts["id"], int(time.time()), service.name)
        parsed = service.parse(body)
        if body.stream:
            chunks = await _stream(service, body, parsed, response, request)
            return StreamingResponse(
                chunks, media_type="text/event-stream", headers=_route_headers(facts)
            )
        answer = await service.answer(response.id, parsed, request.receive)
        _note(facts, answer)
        made = response.completion(
            format_content(answer, parsed, service.interface),
            answer.draft if service.shows_draft(body) else None,
            answer,
            describe_answer(answer, parsed, service.answering.models),
        )
        return JSONResponse(made, headers=_route_headers(facts))


async def _stream(
    service: Service, body: ChatRequest, parsed: ParsedRequest, response: Response, request: Any
) -> AsyncIterator[str]:
    """The server-sent events of an answer. Returns when the first of them is there, so that an
    error before has its HTTP status: when the draft is there, where that is shown, otherwise with
    the answer."""
    facts: dict[str, Any] = request.scope["cowest"]
    draft: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def on_draft(text: str) -> None:
        if not draft.done():
            draft.set_result(text)

    async def ask() -> tuple[ServedAnswer, str]:
        answer = await service.answer(response.id, parsed, request.receive, on_draft)
        _note(facts, answer)
        return answer, format_content(answer, parsed, service.interface)

    shows, answering = service.shows_draft(body), asyncio.ensure_future(ask())
    try:
        await asyncio.wait(
            {answering, draft} if shows else {answering}, return_when=asyncio.FIRST_COMPLETED
        )
        if answering.done():
            answering.result()
    except BaseException:
        answering.cancel()
        raise
    with_usage = bool(body.stream_options and body.stream_options.include_usage)
    # Every chunk says "usage" where the last one has it.
    more: dict[str, Any] = {"usage": None} if with_usage else {}

    async def events() -> AsyncIterator[str]:
        try:
            yield _event(response.chunk({"role": "assistant", "content": ""}, **more))
            if shows:
                text = draft.result() if draft.done() else answering.result()[0].draft
                if text is not None:
                    delta = {"reasoning_content": without_half_pairs(text)}
                    yield _event(response.chunk(delta, **more))
            try:
                answer, content = await answering
            except ApiError as error:
                yield _event(error.body)
                return
            for chunk in response.content_chunks(content, **more):
                yield _event(chunk)
            about = describe_answer(answer, parsed, service.answering.models)
            yield _event(response.chunk({}, "stop", **more, cowest=about))
            if with_usage:
                yield _event(response.usage_chunk(answer))
            yield "data: [DONE]\n\n"
        finally:
            answering.cancel()

    return events()


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def _note(facts: dict[str, Any], answer: ServedAnswer) -> None:
    """Note what the log says, and headers where they are not sent yet."""
    facts.update(route=answer.route, fallback=answer.fallback, tokens=sum(answer.tokens.values()))


def _route_headers(facts: dict[str, Any]) -> dict[str, str]:
    """Headers with the route and the fallback, where they are known when headers are sent."""
    found = {"x-cowest-route": facts.get("route"), "x-cowest-fallback": facts.get("fallback")}
    return {name: value.replace(" ", "-") for name, value in found.items() if value is not None}


def _add_others(api: Any, service: Service, guard: Guard) -> None:
    from fastapi import Response as HttpResponse
    from openai.types import Model
    from prometheus_client import generate_latest
    from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

    class ModelList(BaseModel):
        """All models of this server: one."""

        object: Literal["list"] = "list"
        data: list[Model]

    @api.get(MODELS, response_model=ModelList, responses=_ERRORS, operation_id="models")
    async def models() -> ModelList:
        """List the collaboration, under its name."""
        one = Model(
            id=service.name, object="model", created=service.created, owned_by="cowest_dspy"
        )
        return ModelList(data=[one])

    @api.get(
        HEALTH, response_model=Health, responses={503: {"model": Health}}, operation_id="health"
    )
    async def health(response: HttpResponse) -> Health:
        """Say whether requests are taken (200, or 503 while the server is being stopped). Needs no
        key."""
        response.status_code = 503 if guard.stopping else 200
        return Health(status="stopping" if guard.stopping else "ok")

    text = {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Counters"}

    @api.get(
        METRICS,
        response_class=HttpResponse,
        responses={200: text, **_ERRORS},
        operation_id="metrics",
    )
    async def metrics() -> HttpResponse:
        """Give what was counted, in Prometheus' text format."""
        content = generate_latest(service.metrics.registry)
        return HttpResponse(content, media_type=CONTENT_TYPE_PLAIN_0_0_4)


def _handle_errors(api: Any) -> None:
    from fastapi import Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import Response as HttpResponse
    from starlette.exceptions import HTTPException

    @api.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> HttpResponse:
        return error_response(error)

    @api.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> HttpResponse:
        return error_response(internal_error())

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> HttpResponse:
        return error_response(_invalid(error))

    @api.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> HttpResponse:
        status, path = error.status_code, request.scope["path"]
        if status == 404:
            served = "POST /v1/chat/completions, GET /v1/models, /healthz and /metrics are served"
            made = ApiError(404, f"There is nothing at {path[:200]}: {served}.", "not_found")
        elif status == 405:
            what = f"{request.method} is not served at this path."
            made = ApiError(405, what, "method_not_allowed")
        else:
            made = ApiError(status, "The body is no JSON that can be read.", "invalid_body")
        return error_response(made, error.headers)


def _invalid(error: Any) -> ApiError:
    """Build the error of an invalid body, by its first fault; nothing of the body is repeated but
    the names of its keys."""
    problem = error.errors()[0]
    keys = [str(part)[:100] for part in problem["loc"] if part != "body"]
    where = ".".join(keys)
    if problem["type"] == "json_invalid":
        return ApiError(400, "The body is no JSON.", "invalid_body")
    if problem["type"] == "extra_forbidden":
        what = f'There is no "{where}" here.{nearest(keys[-1], ChatRequest.model_fields)}'
        return ApiError(400, what, "unknown_parameter", param=where)
    if not keys:
        what = "A JSON object is expected, with Content-Type: application/json."
        return ApiError(400, what, "invalid_body")
    return ApiError(400, f"{where}: {problem['msg']}.", "invalid_value", param=where)


def _describe(api: Any, service: Service, *, secured: bool) -> None:
    """Have the schema name the only model, an example, and the key where one is asked for."""
    names = tuple(service.interface.inputs)
    example = "a question" if len(names) == 1 else json.dumps(dict.fromkeys(names, "..."))
    make: Callable[[], dict[str, Any]] = api.openapi

    def described() -> dict[str, Any]:
        schema = make()
        chat = schema["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]
        messages = [{"role": "user", "content": example}]
        chat["example"] = {"model": service.name, "messages": messages}
        request = schema["components"]["schemas"]["ChatRequest"]
        request["properties"]["model"]["enum"] = [service.name]
        if secured:
            schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            for path in set(PATHS) - {HEALTH, SCHEMA}:
                for operation in schema["paths"][path].values():
                    operation["security"] = [{"key": []}]
        return schema

    api.openapi = described
