"""From a chat request to a program's inputs: what is asked, in which form the answer is wanted, and
what is left aside.

The last message is the user's and holds the input, in one of four forms:

    text        May the Arbel run at 25 bar?                     the only input of a program that
                has one
    JSON        {"question": "...", "options": ["a", "b"]}       all inputs by name
    lines       Question: ...\\nOptions: ...                      all inputs by label, as
                LineAdapter writes them
    marks       [[ ## question ## ]]\\n...                        as DSPy's adapters write them;
                answered with marks, too

Nothing is dropped in silence: what a tuned prompt has no place for is an error, or named in the
answer as ignored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import dspy
from dspy.adapters.utils import parse_value

from cowest_dspy.errors import nearest
from cowest_dspy.program.adapters import label
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.serve.config import ServeRules
from cowest_dspy.serve.protocol import PARAMETERS, ChatRequest, Message
from cowest_dspy.serve.refusals import Refused
from cowest_dspy.utils.safe_text import has_half_pair

Form = Literal["text", "marks", "json"]
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
COMPLETED = "completed"


@dataclass(frozen=True)
class Task:
    """What a program takes and gives, for clients: the types of its inputs and of its answer's
    fields, by name."""

    inputs: dict[str, Any]
    signature: type[dspy.Signature]

    @classmethod
    def of(
        cls, program: Collaboration, *, inputs: tuple[str, ...] = (), fields: tuple[str, ...] = ()
    ) -> Task:
        """That of a program; ``inputs`` and ``fields``: by default all.

        Raises:
            ValueError: a field that the answer does not have.
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
                raise ValueError(
                    f'[serve] fields: the answer has no "{name}".{nearest(name, known)} It has '
                    f"{', '.join(known)}."
                )
        return cls(
            {name: types.get(name, str) for name in names},
            only(signature, fields or tuple(signature.output_fields)),
        )

    @property
    def fields(self) -> tuple[str, ...]:
        """Those of the answer."""
        return tuple(self.signature.output_fields)


def only(signature: Any, fields: tuple[str, ...]) -> Any:
    """The signature with these output fields."""
    for name in list(signature.output_fields):
        signature = signature if name in fields else signature.delete(name)
    return signature


@dataclass(frozen=True)
class Asked:
    """A request as it is understood: the program's inputs, the answer's form and fields, and what
    was left aside."""

    inputs: dict[str, Any]
    form: Form
    fields: tuple[str, ...]
    ignored: tuple[str, ...]


def read(request: ChatRequest, task: Task, rules: ServeRules, name: str) -> Asked:
    """What a request asks of the program.

    Raises:
        Refused: it asks for another model (404), or for what cannot be served (400).
    """
    if request.model != name:
        raise Refused(
            404,
            f'There is no model "{request.model[:200]}" here, only "{name}".',
            "model_not_found",
            param="model",
        )
    _refuse_what_is_not_served(request)
    *earlier, last = request.messages
    if last.role != "user":
        what = f'The last message is the input: its role must be "user", not "{last.role}".'
        raise Refused(400, what, "no_input", param="messages")
    text = _text_of(last)
    if _XML.search(text):
        raise Refused(
            400,
            "XML tags are not understood: use ChatAdapter, JSONAdapter or LineAdapter.",
            "inputs",
            param="messages",
        )
    given, tail = _marked(text, task)
    lines = _lines(text, tuple(task.inputs)) if given is None else None
    inputs = given or (_typed(lines, task) if lines is not None else _inputs(text, task))
    wanted = tuple(dict.fromkeys(found for found in _NAMED.findall(tail) if found != COMPLETED))
    kind = request.response_format.type if request.response_format else "text"
    as_json = kind != "text" or "JSON" in tail.partition("\n")[0]
    formed = given is not None or lines is not None
    ignored = [*_left_aside(earlier, rules, formed=formed), *_parameters(request, rules)]
    form = "json" if as_json else "marks" if given is not None else "text"
    return Asked(inputs, form, _wanted(request, wanted, task), tuple(ignored))


def _refuse_what_is_not_served(request: ChatRequest) -> None:
    for param, asked, why in (
        ("n", request.n not in (None, 1), "One answer is given: leave n out, or set it to 1."),
        ("tools", bool(request.tools), "Tools are not served: the program calls none."),
        (
            "tool_choice",
            request.tool_choice not in (None, "none", "auto"),
            "Tools are not served: the program calls none.",
        ),
        ("functions", bool(request.functions), "Functions are not served: the program calls none."),
        (
            "function_call",
            request.function_call not in (None, "none", "auto"),
            "Functions are not served.",
        ),
        (
            "logprobs",
            bool(request.logprobs),
            "Log-probabilities are not served: the answer is a program's.",
        ),
        (
            "top_logprobs",
            bool(request.top_logprobs),
            "Log-probabilities are not served: the answer is a program's.",
        ),
        ("modalities", request.modalities not in (None, [], ["text"]), "Only text is served."),
        ("audio", bool(request.audio), "Only text is served."),
        ("web_search_options", request.web_search_options is not None, "Nothing is searched here."),
    ):
        if asked:
            raise Refused(400, why, "unsupported", param=param)


def _text_of(message: Message) -> str:
    if isinstance(message.content, str):
        text = message.content
    else:
        parts = message.content or []
        if any(part.type != "text" or part.text is None for part in parts):
            raise Refused(
                400,
                "Only text is served: no images, audio or files.",
                "unsupported",
                param="messages",
            )
        text = "".join(part.text or "" for part in parts)
    if not text.strip():
        raise Refused(
            400, "The last message is empty: it is the input.", "no_input", param="messages"
        )
    return text


def _left_aside(earlier: list[Message], rules: ServeRules, *, formed: bool) -> list[str]:
    """What is ignored of the messages before the last. The system message of a client that writes
    inputs by mark or label, as DSPy does, is its own prompt, in whose place the program's comes."""
    systems = sum(message.role in ("system", "developer") for message in earlier)
    turns = len(earlier) - systems
    if rules.earlier == "refuse" and (turns or (systems and not formed)):
        what = "earlier turns" if turns else "a system message"
        raise Refused(
            400,
            "The program answers one input, and its prompts are its own: send one user message, "
            f"without {what}. "
            'A server with [serve] earlier = "ignore" leaves them aside.',
            "unsupported",
            param="messages",
        )
    return [*(["system messages"] if systems else []), *(["earlier turns"] if turns else [])]


def _parameters(request: ChatRequest, rules: ServeRules) -> list[str]:
    given = [name for name in PARAMETERS if getattr(request, name) is not None]
    if given and rules.parameters == "refuse":
        raise Refused(
            400,
            f"{given[0]}: the program has its own settings; leave this out.",
            "unsupported",
            param=given[0],
        )
    return given


def _wanted(request: ChatRequest, named: tuple[str, ...], task: Task) -> tuple[str, ...]:
    """The answer's fields that a client expects: those that its last message or its JSON schema
    names, otherwise all."""
    schema = (
        (request.response_format.json_schema or {}).get("schema")
        if request.response_format
        else None
    )
    properties = schema.get("properties") if isinstance(schema, dict) else None
    if isinstance(properties, dict) and properties:
        named = tuple(properties)
    for name in named:
        if name not in task.fields:
            raise Refused(
                400,
                f'The answer has no field "{name[:100]}", only {", ".join(task.fields)}.',
                "unknown_field",
                param="messages",
            )
    return named or task.fields


def _marked(text: str, task: Task) -> tuple[dict[str, Any] | None, str]:
    """The inputs of a message with DSPy's marks, and how it ends; None where it has no mark of an
    input."""
    ends = [match.start() for match in _TAIL.finditer(text)]
    body, tail = (text[: ends[-1]], text[ends[-1] :]) if ends else (text, "")
    found = [
        match for match in _MARK.finditer(body) if match.start() == 0 or match[1] in task.inputs
    ]
    if not found or found[0].start() != 0:
        return None, ""
    values: dict[str, str] = {}
    for match, following in zip(found, [*found[1:], None], strict=False):
        values.setdefault(
            match[1], body[match.end() : following.start() if following else len(body)].strip()
        )
    return _typed(values, task), tail


def _inputs(text: str, task: Task) -> dict[str, Any]:
    """The inputs of a message without marks and labels."""
    names = tuple(task.inputs)
    given = _json(text)
    if given is not None and (len(names) > 1 or set(given) == set(names)):
        return _typed(given, task)
    if len(names) > 1:
        shown = json.dumps(dict.fromkeys(names, "..."))
        raise Refused(
            400,
            f"The program takes {len(names)} inputs: send them as JSON, {shown}.",
            "inputs",
            param="messages",
        )
    return _typed(dict.fromkeys(names, text), task)


def _json(text: str) -> dict[str, Any] | None:
    if not text.lstrip().startswith("{"):
        return None
    try:
        given: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return given if isinstance(given, dict) else None


def _lines(text: str, names: tuple[str, ...]) -> dict[str, str] | None:
    """Values by label, each label once and all of them; None where the text is something else."""
    labels = {label(name).casefold(): name for name in names}
    pattern = re.compile(
        rf"^({'|'.join(re.escape(label(name)) for name in names)}): ?", re.IGNORECASE | re.MULTILINE
    )
    found = list(pattern.finditer(text))
    if (
        not found
        or found[0].start() != 0
        or sorted(labels[match[1].casefold()] for match in found) != sorted(names)
    ):
        return None
    values: dict[str, str] = {}
    for match, following in zip(found, [*found[1:], None], strict=False):
        value = text[match.end() : following.start() - 1 if following else len(text)]
        first, *rest = value.split("\n")
        indented = all(line.startswith("  ") for line in rest)
        values[labels[match[1].casefold()]] = "\n".join(
            [first, *(line[2:] if indented else line for line in rest)]
        )
    return values


def _typed(values: Mapping[str, Any], task: Task) -> dict[str, Any]:
    if set(values) != set(task.inputs):
        given = ", ".join(sorted(str(name)[:50] for name in values))[:300]
        raise Refused(
            400,
            f"The program takes {', '.join(task.inputs)}; given: {given or 'nothing'}.",
            "inputs",
            param="messages",
        )
    made: dict[str, Any] = {}
    for name, annotation in task.inputs.items():
        value = values[name]
        if annotation is str:
            if not isinstance(value, str):
                raise Refused(400, f'The input "{name}" is a text.', "inputs", param="messages")
            made[name] = value
            continue
        given = value
        with suppress(ValueError, RecursionError):
            # Before DSPy's parser, which repairs what is no JSON, and changes some of what is.
            given = json.loads(value) if isinstance(value, str) else value
        try:
            made[name] = parse_value(given, annotation)
        except Exception as error:  # DSPy's parser raises what json_repair, ast and pydantic raise.
            kind = getattr(annotation, "__name__", str(annotation))
            raise Refused(
                400, f'The input "{name}" is no {kind}.', "inputs", param="messages"
            ) from error
    if has_half_pair(json.dumps(made, ensure_ascii=False, default=str)):
        raise Refused(
            400,
            "The input holds half of a surrogate pair, which is no text.",
            "inputs",
            param="messages",
        )
    return made
