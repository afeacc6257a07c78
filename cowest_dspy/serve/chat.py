"""OpenAI's chat protocol: from a request to a program's inputs, and from its answer to the
response.

The last message is the user's and holds the input, in one of four forms:

    text        May the Arbel run at 25 bar?                     the only input of a program with
                one
    JSON        {"question": "...", "options": ["a", "b"]}       all inputs by name
    lines       Question: ...\\nOptions: ...                      all inputs, as LineAdapter writes
                them
    marks       [[ ## question ## ]]\\n...                        as DSPy's adapters write them;
                answered
                                                                 with marks, too

Nothing is dropped in silence: what a tuned prompt has no place for is an error, or named in the
response as ignored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import dspy
from dspy.adapters.utils import parse_value
from pydantic import BaseModel, ConfigDict, Field

from cowest_dspy.errors import ConfigError, nearest
from cowest_dspy.program.adapters import LineAdapter, escape_field_marks, escape_value, label
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.serve.answer import Role, ServedAnswer
from cowest_dspy.serve.config import ServeRules
from cowest_dspy.serve.guard import ApiError
from cowest_dspy.utils.jsonable import plain
from cowest_dspy.utils.safe_text import has_half_pair, without_half_pairs

Form = Literal["text", "marks", "json"]
UNREFINED = "Unrefined draft (the strong model did not answer):\n"
"""How the text of the fallback "draft" begins, for a client that sees nothing but the text."""
MAX_CHUNKS = 256
_MARK = re.compile(r"^\[\[ ## (\w+) ## \]\][ \t]*$", re.MULTILINE)
# How DSPy's adapters end their last message; what follows names the outputs that the client
# expects.
_TAIL = re.compile(
    r"^Respond with (?:the corresponding output fields|a JSON object)\b", re.MULTILINE
)
_NAMED = re.compile(r"`(?:\[\[ ## )?(\w+)(?: ## \]\])?`")
_XML = re.compile(
    r"^Respond with the corresponding output fields wrapped in XML tags\b", re.MULTILINE
)
_PIECES = re.compile(r"\S+\s*|\s+")


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class ContentPart(_Strict):
    """A part of a message; only text is understood."""

    model_config = ConfigDict(extra="allow")
    type: str = Field(description='"text"; anything else is refused')
    text: str | None = None


class ChatMessage(_Strict):
    """One message of a chat."""

    model_config = ConfigDict(extra="allow")
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None


class StreamOptions(_Strict):
    """Options of a streamed answer."""

    include_usage: bool = Field(False, description="a last chunk with the tokens of both models")
    include_obfuscation: bool | None = None


class ResponseFormat(_Strict):
    """The form of the answer: text; or the answer's fields as one JSON object."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = Field(
        None, description="its properties must be fields of the answer"
    )


class Wishes(_Strict):
    """Options of a request that only this server knows."""

    model_config = ConfigDict(extra="forbid")
    draft: bool = Field(False, description="give the weak model's draft as reasoning_content")


class ChatRequest(_Strict):
    """A chat completion that is asked for. The last message is the program's input; the program's
    sampling settings are its own."""

    model_config = ConfigDict(extra="forbid")
    model: str = Field(description="the name that /v1/models lists")
    messages: list[ChatMessage] = Field(
        min_length=1, description="the last one is the user's: the program's input"
    )
    stream: bool | None = Field(None, description="answer as server-sent events")
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    cowest: Wishes | None = None
    # Left aside and named in the answer, or refused, as [serve] parameters says: a tuned program
    # has its own.
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    prediction: dict[str, Any] | None = None
    # Of the caller's own accounts: they change no answer.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    # Not served: anything but "no" is refused.
    n: int | None = Field(None, description="1")
    logprobs: bool | None = Field(None, description="false")
    top_logprobs: int | None = Field(None, description="0")
    modalities: list[str] | None = Field(None, description='["text"]')
    tools: list[Any] | None = Field(None, description="none")
    tool_choice: str | dict[str, Any] | None = Field(None, description='"none" or "auto"')
    parallel_tool_calls: bool | None = None
    functions: list[Any] | None = Field(None, description="none")
    function_call: str | dict[str, Any] | None = Field(None, description='"none" or "auto"')
    audio: dict[str, Any] | None = Field(None, description="not served")
    web_search_options: dict[str, Any] | None = Field(None, description="not served")


_IGNORED = (
    "temperature", "top_p", "max_tokens", "max_completion_tokens", "stop", "seed",
    "presence_penalty", "frequency_penalty", "logit_bias", "reasoning_effort", "verbosity",
    "prediction",
)  # fmt: skip
_UNSERVED: dict[str, tuple[tuple[Any, ...], str]] = {
    "n": ((None, 1), "One answer is given: leave n out, or set it to 1."),
    "tools": ((None, []), "Tools are not served: the program calls none."),
    "tool_choice": ((None, "none", "auto"), "Tools are not served: the program calls none."),
    "functions": ((None, []), "Functions are not served: the program calls none."),
    "function_call": ((None, "none", "auto"), "Functions are not served: the program calls none."),
    "logprobs": ((None, False), "Log-probabilities are not served: the answer is a program's."),
    "top_logprobs": ((None, 0), "Log-probabilities are not served: the answer is a program's."),
    "modalities": ((None, [], ["text"]), "Only text is served."),
    "audio": ((None, {}), "Only text is served."),
    "web_search_options": ((None,), "Nothing is searched here."),
}
"""By parameter, the values that ask for nothing, and what other values are told."""


@dataclass(frozen=True)
class Interface:
    """The interface of a program for clients: the types of its inputs by name, and a signature
    with the answer's fields."""

    inputs: dict[str, Any]
    signature: type[dspy.Signature]

    @classmethod
    def of(
        cls, program: Collaboration, *, inputs: tuple[str, ...] = (), fields: tuple[str, ...] = ()
    ) -> Interface:
        """Read that of a program; ``inputs`` and ``fields``: by default all.

        Raises:
            ConfigError: a field that the answer does not have.
        """
        alone: Any = program.alone.module.predictors()
        types = {
            name: field.annotation
            for one in reversed(alone)
            for name, field in one.signature.input_fields.items()
        }
        names = inputs or tuple(alone[0].signature.input_fields)
        signature: Any = program.refine.predictors()[-1].signature  # pyright: ignore[reportAttributeAccessIssue]
        for name in fields:
            if name not in signature.output_fields:
                known = list(signature.output_fields)
                raise ConfigError(
                    f'[serve] fields: the answer has no "{name}".{nearest(name, known)} It has '
                    f"{', '.join(known)}."
                )
        wanted = fields or tuple(signature.output_fields)
        return cls({name: types.get(name, str) for name in names}, _only(signature, wanted))

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of the answer's fields."""
        return tuple(self.signature.output_fields)


def _only(signature: Any, fields: tuple[str, ...]) -> Any:
    for name in list(signature.output_fields):
        signature = signature if name in fields else signature.delete(name)
    return signature


@dataclass(frozen=True)
class ParsedRequest:
    """A request as it is understood: the program's inputs, the answer's form and fields, and what
    is ignored."""

    inputs: dict[str, Any]
    form: Form
    fields: tuple[str, ...]
    ignored: tuple[str, ...]


def parse_request(
    request: ChatRequest, interface: Interface, rules: ServeRules, name: str
) -> ParsedRequest:
    """Parse a request to the model of this name.

    Raises:
        ApiError: it asks for another model (404), or for what cannot be served (400).
    """
    if request.model != name:
        what = f'There is no model "{request.model[:200]}" here, only "{name}".'
        raise ApiError(404, what, "model_not_found", param="model")
    for param, (nothing, why) in _UNSERVED.items():
        if getattr(request, param) not in nothing:
            raise ApiError(400, why, "unsupported", param=param)
    *earlier, last = request.messages
    if last.role != "user":
        what = f'The last message is the input: its role must be "user", not "{last.role}".'
        raise _refused(what, "no_input")
    text = _text_of(last)
    if _XML.search(text):
        raise _refused("XML tags are not understood: use ChatAdapter, JSONAdapter or LineAdapter.")
    marked, tail = _parse_marks(text, interface)
    lines = _parse_lines(text, tuple(interface.inputs)) if marked is None else None
    inputs = marked or lines or _parse_text(text, interface)
    formed = marked is not None or lines is not None
    form: Form = "marks" if marked is not None else "text"
    if (request.response_format and request.response_format.type != "text") or (
        "JSON" in tail.partition("\n")[0]
    ):
        form = "json"
    named = tuple(dict.fromkeys(found for found in _NAMED.findall(tail) if found != "completed"))
    return ParsedRequest(
        _convert(inputs, interface),
        form,
        _wanted_fields(request, named, interface),
        (*_ignored_messages(earlier, rules, formed=formed), *_ignored_parameters(request, rules)),
    )


def _refused(message: str, code: str = "inputs") -> ApiError:
    return ApiError(400, message, code, param="messages")


def _text_of(message: ChatMessage) -> str:
    parts = message.content or []
    if not isinstance(parts, str):
        if any(part.type != "text" or part.text is None for part in parts):
            raise _refused("Only text is served: no images, audio or files.", "unsupported")
        parts = "".join(part.text or "" for part in parts)
    if not parts.strip():
        raise _refused("The last message is empty: it is the input.", "no_input")
    return parts


def _ignored_messages(earlier: list[ChatMessage], rules: ServeRules, *, formed: bool) -> list[str]:
    """List what is ignored of the messages before the last. The system message of a client that
    writes inputs by mark or label, as DSPy does, is its own prompt, in whose place the program's
    comes."""
    systems = sum(message.role in ("system", "developer") for message in earlier)
    turns = len(earlier) - systems
    if rules.earlier == "refuse" and (turns or (systems and not formed)):
        what = "earlier turns" if turns else "a system message"
        raise _refused(
            "The program answers one input, and its prompts are its own: send one user message, "
            f'without {what}. A server with [serve] earlier = "ignore" leaves them aside.',
            "unsupported",
        )
    return [*(["system messages"] if systems else []), *(["earlier turns"] if turns else [])]


def _ignored_parameters(request: ChatRequest, rules: ServeRules) -> list[str]:
    given = [name for name in _IGNORED if getattr(request, name) is not None]
    if given and rules.parameters == "refuse":
        what = f"{given[0]}: the program has its own settings; leave this out."
        raise ApiError(400, what, "unsupported", param=given[0])
    return given


def _wanted_fields(
    request: ChatRequest, named: tuple[str, ...], interface: Interface
) -> tuple[str, ...]:
    """The answer's fields that a client expects: those that its last message or its JSON schema
    names, otherwise all."""
    form = request.response_format
    schema = (form.json_schema or {}).get("schema") if form else None
    properties = schema.get("properties") if isinstance(schema, dict) else None
    if isinstance(properties, dict) and properties:
        named = tuple(properties)
    for name in named:
        if name not in interface.fields:
            raise _refused(
                f'The answer has no field "{name[:100]}", only {", ".join(interface.fields)}.',
                "unknown_field",
            )
    return named or interface.fields


def _parse_marks(text: str, interface: Interface) -> tuple[dict[str, str] | None, str]:
    """The inputs of a message with DSPy's marks, and how it ends; None where it has no mark of an
    input."""
    ends = [match.start() for match in _TAIL.finditer(text)]
    body, tail = (text[: ends[-1]], text[ends[-1] :]) if ends else (text, "")
    known = interface.inputs
    marks = [one for one in _MARK.finditer(body) if one.start() == 0 or one[1] in known]
    if not marks or marks[0].start() != 0:
        return None, ""
    ends = [*(match.start() for match in marks[1:]), len(body)]
    values: dict[str, str] = {}
    for match, end in zip(marks, ends, strict=True):
        values.setdefault(match[1], body[match.end() : end].strip())
    return values, tail


def _parse_lines(text: str, names: tuple[str, ...]) -> dict[str, str] | None:
    """Values by label, each label once and all of them; None where the text is something else."""
    labels = {label(name).casefold(): name for name in names}
    pattern = "|".join(re.escape(label(name)) for name in names)
    found = list(re.finditer(rf"^({pattern}): ?", text, re.IGNORECASE | re.MULTILINE))
    given = sorted(labels[match[1].casefold()] for match in found)
    if not found or found[0].start() != 0 or given != sorted(names):
        return None
    ends = [*(match.start() - 1 for match in found[1:]), len(text)]
    values: dict[str, str] = {}
    for match, end in zip(found, ends, strict=True):
        first, *rest = text[match.end() : end].split("\n")
        if all(line.startswith("  ") for line in rest):
            rest = [line[2:] for line in rest]
        values[labels[match[1].casefold()]] = "\n".join([first, *rest])
    return values


def _parse_text(text: str, interface: Interface) -> Mapping[str, Any]:
    """The inputs of a message without marks and labels: a JSON object, or the only input."""
    names = list(interface.inputs)
    given: Any = None
    if text.lstrip().startswith("{"):
        with suppress(ValueError, RecursionError):
            given = json.loads(text)
    if isinstance(given, dict) and (len(names) > 1 or set(given) == set(names)):
        return given
    if len(names) > 1:
        shown = json.dumps(dict.fromkeys(names, "..."))
        raise _refused(f"The program takes {len(names)} inputs: send them as JSON, {shown}.")
    return dict.fromkeys(names, text)


def _convert(values: Mapping[str, Any], interface: Interface) -> dict[str, Any]:
    """Convert inputs to the types of the program's fields."""
    if set(values) != set(interface.inputs):
        given = ", ".join(sorted(str(name)[:50] for name in values))[:300]
        names = ", ".join(interface.inputs)
        raise _refused(f"The program takes {names}; given: {given or 'nothing'}.")
    made: dict[str, Any] = {}
    for name, annotation in interface.inputs.items():
        value = values[name]
        if annotation is str:
            if not isinstance(value, str):
                raise _refused(f'The input "{name}" is a text.')
            made[name] = value
            continue
        with suppress(ValueError, RecursionError):
            # Before DSPy's parser, which repairs what is no JSON, and changes some of what is.
            value = json.loads(value) if isinstance(value, str) else value
        try:
            made[name] = parse_value(value, annotation)
        except Exception as error:  # DSPy's parser raises what json_repair, ast and pydantic raise.
            kind = getattr(annotation, "__name__", str(annotation))
            raise _refused(f'The input "{name}" is no {kind}.') from error
    if has_half_pair(json.dumps(made, ensure_ascii=False, default=str)):
        raise _refused("The input holds half of a surrogate pair, which is no text.")
    return made


# From an answer to the response


def format_content(answer: ServedAnswer, parsed: ParsedRequest, interface: Interface) -> str:
    """Format the answer's text in the form that is wanted.

    Raises:
        ApiError: 502: the draft would be the answer, and has not the fields that a program expects.
    """
    outputs, unrefined = answer.outputs, ""
    if answer.fallback == "draft":
        whole = set(parsed.fields) <= outputs.keys()
        if not whole and parsed.form != "text":
            what = "The strong model gave no usable answer, and the draft is none."
            raise ApiError(502, what, "strong_model_failed")
        if not whole:
            return without_half_pairs(UNREFINED + (answer.draft or ""))
        unrefined = UNREFINED if parsed.form == "text" else ""
    if parsed.form == "json":
        values = {name: plain(outputs[name]) for name in parsed.fields}
        return without_half_pairs(json.dumps(values, ensure_ascii=False))
    signature = _only(interface.signature, parsed.fields)
    if parsed.form == "marks":
        # A value must not end where another one would begin.
        safe = {name: escape_value(outputs[name], escape_field_marks) for name in parsed.fields}
        text = dspy.ChatAdapter().format_assistant_message_content(signature, safe)
    else:
        text = unrefined + LineAdapter().format_assistant_message_content(signature, outputs)
    return without_half_pairs(text)


def describe_answer(
    answer: ServedAnswer, parsed: ParsedRequest, models: Mapping[Role, str]
) -> dict[str, Any]:
    """Describe how an answer came about: the object ``cowest`` of a response."""
    return {
        "route": answer.route,
        "fallback": answer.fallback,
        "failed": dict(answer.failed),
        "models": dict(models),
        "tokens": answer.tokens,
        "ignored": list(parsed.ignored),
    }


@dataclass(frozen=True)
class Response:
    """The objects of one response: its id, the Unix time, and the model's name."""

    id: str
    created: int
    model: str

    def completion(
        self, content: str, draft: str | None, answer: ServedAnswer, cowest: dict[str, Any]
    ) -> dict[str, Any]:
        """Build the whole answer, a ``chat.completion``; ``draft``: shown as reasoning_content."""
        message = {"role": "assistant", "content": content, "refusal": None}
        message["reasoning_content"] = None if draft is None else without_half_pairs(draft)
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
        return {
            **self._head("chat.completion"),
            "choices": [choice],
            "usage": _usage(answer),
            "cowest": cowest,
        }

    def chunk(
        self, delta: dict[str, Any], finish_reason: str | None = None, **more: Any
    ) -> dict[str, Any]:
        """Build a ``chat.completion.chunk``."""
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return {**self._head("chat.completion.chunk"), "choices": [choice], **more}

    def content_chunks(self, text: str, **more: Any) -> Iterator[dict[str, Any]]:
        """Split the answer's text into chunks, word by word, or some words at once where there are
        many."""
        words = _PIECES.findall(text)
        step = -(-len(words) // MAX_CHUNKS) or 1
        for place in range(0, len(words), step):
            yield self.chunk({"content": "".join(words[place : place + step])}, **more)

    def usage_chunk(self, answer: ServedAnswer) -> dict[str, Any]:
        """Build the chunk with the tokens of both models together."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": _usage(answer)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def _usage(answer: ServedAnswer) -> dict[str, int]:
    """The tokens of both models together; the provider's own count, 0 where it says none."""
    tokens = answer.tokens
    given, made = tokens["weak_in"] + tokens["strong_in"], tokens["weak_out"] + tokens["strong_out"]
    return {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made}
