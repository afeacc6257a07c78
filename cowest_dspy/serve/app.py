"""The HTTP surface: /v1/chat/completions (whole and streamed), /v1/models, /healthz, /metrics, and
its own OpenAPI schema."""

# No "from __future__ import annotations" here: FastAPI reads annotations, and the types of these
# are imported inside of functions.

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from cowest_dspy.errors import nearest
from cowest_dspy.serve import refusals, writing
from cowest_dspy.serve.asking import Answer
from cowest_dspy.serve.front import CHAT, HEALTH, METRICS, MODELS, SCHEMA, Front
from cowest_dspy.serve.protocol import (
    ChatCompletion,
    ChatRequest,
    ErrorBody,
    Health,
    Model,
    ModelList,
)
from cowest_dspy.serve.reading import Asked
from cowest_dspy.serve.refusals import Refused
from cowest_dspy.serve.service import Service

REFUSALS = {
    400: "The request asks for what cannot be; the message says what",
    401: "The API key is missing or wrong",
    404: "There is no such model",
    408: "The body did not come in time",
    413: "The body is too long",
    421: "Without a key only this machine's own names are answered to",
    429: "Too many requests wait; Retry-After says when to come again",
    500: "The server failed",
    502: "A model gave no usable answer",
    503: (
        "The server is being stopped, a model is left alone for a while, or too many connections "
        "are open"
    ),
    504: "The time is over",
}
EVENT = {
    "type": "object",
    "required": ["data"],
    "properties": {
        "data": {
            "type": "string",
            "description": "a chat.completion.chunk as JSON; the last one is [DONE]",
        }
    },
}


def make_app(service: Service, *, key: str | None = None) -> Front:
    """The ASGI application of a service. ``key``: what clients must give as a bearer token.

    Raises:
        ImportError: FastAPI is not installed (the extra "serve").
    """
    from fastapi import FastAPI

    from cowest_dspy import __version__

    api = FastAPI(
        title="cowest_dspy", version=__version__, docs_url=None, redoc_url=None, openapi_url=SCHEMA
    )
    front = Front(api, service.rules.limits, service.metrics, key)
    _say_errors_as_openai_does(api)
    _add_chat(api, service)
    _add_the_rest(api, service, front)
    _describe(api, service, secured=key is not None)
    return front


def _documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody, "description": REFUSALS[status]} for status in statuses}


def _add_chat(api: Any, service: Service) -> None:
    from fastapi import Request, Response
    from fastapi.responses import StreamingResponse

    stream = {
        200: {"description": "The answer", "content": {"text/event-stream": {"schema": EVENT}}}
    }

    @api.post(
        CHAT,
        response_model=ChatCompletion,
        responses={**stream, **_documented(*REFUSALS)},
        operation_id="chat",
    )
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Asks the collaboration. The last message is the program's input; the answer's text has
        the answer's fields."""
        facts: dict[str, Any] = request.scope["cowest"]
        head = writing.Head(facts["id"], int(time.time()), service.name)
        asked = service.read(body)
        if body.stream:
            return StreamingResponse(
                await _streamed(service, body, asked, head, request),
                media_type="text/event-stream",
                headers=_of(facts),
            )
        answer = await service.answered(head.id, asked, request.receive)  # pyright: ignore[reportArgumentType]
        content = writing.content_of(answer, asked, service.task)
        draft = answer.draft if service.shows_draft(body) else None
        about = writing.told(answer, asked, service.answering.models)
        made = writing.whole(head, content, draft, answer, about)
        _note(facts, answer)
        return Response(made.model_dump_json(), media_type="application/json", headers=_of(facts))


async def _streamed(
    service: Service, body: ChatRequest, asked: Asked, head: writing.Head, request: Any
) -> AsyncIterator[str]:
    """The chunks of an answer. It returns when the first of them is there, so that an error before
    has its HTTP status: when the draft is there, where that is shown, otherwise with the answer."""
    facts: dict[str, Any] = request.scope["cowest"]
    options, shows = body.stream_options, service.shows_draft(body)
    chunks = writing.Chunks(head, with_usage=bool(options and options.include_usage))
    draft: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    tell: Callable[[str], None] = lambda text: None if draft.done() else draft.set_result(text)  # noqa: E731
    answering = asyncio.ensure_future(service.answered(head.id, asked, request.receive, tell))
    try:
        await asyncio.wait(
            {answering, draft} if shows else {answering}, return_when=asyncio.FIRST_COMPLETED
        )
        first = _content(answering.result(), asked, service) if answering.done() else None
    except BaseException:
        answering.cancel()
        raise
    if answering.done():
        _note(facts, answering.result())

    async def said() -> AsyncIterator[str]:
        try:
            yield chunks.opening()
            if shows and (draft.done() or answering.result().draft is not None):
                yield chunks.reasoning(
                    draft.result() if draft.done() else answering.result().draft or ""
                )
            try:
                answer = await answering
                _note(facts, answer)
                content = first if first is not None else _content(answer, asked, service)
            except Refused as error:
                yield chunks.failing(error)
                return
            for chunk in chunks.content(content):
                yield chunk
            for chunk in chunks.closing(
                answer, writing.told(answer, asked, service.answering.models)
            ):
                yield chunk
        finally:
            answering.cancel()

    return said()


def _content(answer: Answer, asked: Asked, service: Service) -> str:
    return writing.content_of(answer, asked, service.task)


def _note(facts: dict[str, Any], answer: Answer) -> None:
    """For the log, and for headers where they are not sent yet."""
    facts.update(route=answer.route, fallback=answer.fallback, tokens=sum(answer.tokens.values()))


def _of(facts: dict[str, Any]) -> dict[str, str]:
    """Headers that say who answered, where it is known when they are sent."""
    found = {"x-cowest-route": facts.get("route"), "x-cowest-fallback": facts.get("fallback")}
    return {name: value.replace(" ", "-") for name, value in found.items() if value is not None}


def _add_the_rest(api: Any, service: Service, front: Front) -> None:
    from fastapi import Response

    @api.get(
        MODELS,
        response_model=ModelList,
        responses=_documented(401, 421, 503),
        operation_id="models",
    )
    async def models() -> ModelList:
        """The collaboration, under its name."""
        return ModelList(data=[Model(id=service.name, created=service.created)])

    @api.get(
        HEALTH, response_model=Health, responses={503: {"model": Health}}, operation_id="health"
    )
    async def health(response: Response) -> Health:
        """Whether requests are taken (200, or 503 while the server is being stopped). Needs no
        key."""
        response.status_code = 503 if front.stopping else 200
        breakers = service.answering.breakers
        status = "stopping" if front.stopping else "ok"
        return Health(status=status, weak=breakers["weak"].state, strong=breakers["strong"].state)

    text = {
        200: {"description": "Counters", "content": {"text/plain": {"schema": {"type": "string"}}}}
    }

    @api.get(
        METRICS,
        response_class=Response,
        responses={**text, **_documented(401, 421)},
        operation_id="metrics",
    )
    async def metrics() -> Response:
        """What was counted, in Prometheus' text format."""
        return Response(
            service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )


def _say_errors_as_openai_does(api: Any) -> None:
    from fastapi import Request, Response
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException

    def said(error: Refused, more: dict[str, str] | None = None) -> Response:
        headers = {**(more or {}), **error.headers}
        return Response(json.dumps(error.body), error.status, headers, "application/json")

    @api.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return said(error)

    @api.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        return said(refusals.broken())

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return said(_invalid(error))

    @api.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        if error.status_code in (404, 405):
            made = refusals.unknown(error.status_code, request.scope["path"], request.method)
        else:
            made = Refused(
                error.status_code, "The body is no JSON that can be read.", "invalid_body"
            )
        return said(made, dict(error.headers or {}))


def _invalid(error: Any) -> Refused:
    """What is wrong with a body, by its first fault; nothing of the body is repeated but the names
    of its keys."""
    problem = error.errors()[0]
    keys = [str(part)[:100] for part in problem["loc"] if part != "body"]
    where = ".".join(keys)
    if problem["type"] == "json_invalid":
        return Refused(400, "The body is no JSON.", "invalid_body")
    if problem["type"] == "extra_forbidden":
        return Refused(
            400,
            f'There is no "{where}" here.{nearest(keys[-1], ChatRequest.model_fields)}',
            "unknown_parameter",
            param=where,
        )
    if not keys:
        return Refused(
            400, "A JSON object is expected, with Content-Type: application/json.", "invalid_body"
        )
    return Refused(400, f"{where}: {problem['msg']}.", "invalid_value", param=where)


def _describe(api: Any, service: Service, *, secured: bool) -> None:
    """Has the schema say what is so: the only model, an example, no 422, and the key where one is
    asked for."""
    names = tuple(service.task.inputs)
    example = "a question" if len(names) == 1 else json.dumps(dict.fromkeys(names, "..."))
    made: Callable[[], dict[str, Any]] = api.openapi

    def described() -> dict[str, Any]:
        schema = made()
        for path, operations in schema["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                if secured and path != HEALTH:
                    operation["security"] = [{"key": []}]
        schema["components"]["schemas"]["ChatRequest"]["properties"]["model"]["enum"] = [
            service.name
        ]
        asked = {"model": service.name, "messages": [{"role": "user", "content": example}]}
        schema["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]["example"] = (
            asked
        )
        if secured:
            schema.setdefault("components", {})["securitySchemes"] = {
                "key": {"type": "http", "scheme": "bearer"}
            }
        return schema

    api.openapi = described
