"""Laws of the wire: any text comes through as it was, whatever its form; and any body gets an
answer in OpenAI's form."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import dspy
import httpx
import pytest
from hypothesis import given
from hypothesis import settings as how
from hypothesis import strategies as st
from serving_parts import body, program, rules

from cowest_dspy.program.adapters import LineAdapter
from cowest_dspy.serve.answer import Answering, ServedAnswer
from cowest_dspy.serve.app import Service, _event, make_app
from cowest_dspy.serve.chat import (
    ChatRequest,
    Interface,
    ParsedRequest,
    Response,
    format_content,
    parse_request,
)
from cowest_dspy.serve.guard import ApiError

SIGNATURE: Any = dspy.ensure_signature("question, notes, options: list[str] -> reason, answer")
TASK = Interface.of(program(signature=SIGNATURE))
ONE = Interface.of(program())
QUICK = how(max_examples=150)
# What JSON carries: no lone surrogates. A line that is itself a mark is what DSPy's own form cannot
# carry.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
FIELDS = st.fixed_dictionaries(
    {"question": TEXTS, "notes": TEXTS, "options": st.lists(TEXTS, min_size=1, max_size=3)}
)


def understood(content: Any, task: Interface = TASK, **more: Any) -> ParsedRequest:
    return parse_request(
        ChatRequest.model_validate(body(content, **more)), task, rules(), "handbook"
    )


@QUICK
@given(FIELDS)
def test_inputs_as_json_come_through_as_they_were(fields: dict[str, Any]) -> None:
    assert understood(json.dumps(fields)).inputs == fields
    assert understood([{"type": "text", "text": json.dumps(fields)}]).inputs == fields


@QUICK
@given(FIELDS)
def test_inputs_as_labelled_lines_come_through_but_for_the_kind_of_line_break(
    fields: dict[str, Any],
) -> None:
    # A list is written as JSON, in which LineAdapter breaks lines, too.
    fields = {**fields, "options": [" ".join(option.split()) for option in fields["options"]]}
    written = LineAdapter().format_user_message_content(SIGNATURE, fields)
    found = understood(written)
    assert found.form == "text"
    for name in ("question", "notes"):
        assert found.inputs[name] == "\n".join(fields[name].splitlines())
    assert found.inputs["options"] == fields["options"]


@QUICK
@given(
    FIELDS.filter(lambda fields: "[[ ##" not in str(fields) and "Respond with" not in str(fields))
)
def test_inputs_with_dspys_marks_come_through_but_for_space_around_them(
    fields: dict[str, Any],
) -> None:
    for adapter, form in ((dspy.ChatAdapter(), "marks"), (dspy.JSONAdapter(), "json")):
        messages = adapter.format(SIGNATURE, [], fields)
        found = parse_request(
            ChatRequest.model_validate({"model": "handbook", "messages": messages}),
            TASK,
            rules(),
            "handbook",
        )
        assert (found.form, found.fields) == (form, ("reason", "answer"))
        assert {name: found.inputs[name] for name in ("question", "notes")} == {
            name: fields[name].strip() for name in ("question", "notes")
        }
        assert found.inputs["options"] == fields["options"]


@QUICK
@given(TEXTS)
def test_a_text_is_the_only_input_as_it_is(text: str) -> None:
    found = understood(text, ONE).inputs["question"]
    assert (
        found == text
        or text.casefold().startswith("question:")
        or json.loads(text) == {"question": found}
    )


@QUICK
@given(TEXTS, TEXTS)
def test_an_answer_comes_through_every_form(reason: str, answer: str) -> None:
    made = ServedAnswer({"reason": reason, "answer": answer}, "collaborate")
    asked = ParsedRequest({}, "json", ("reason", "answer"), ())
    assert json.loads(format_content(made, asked, TASK)) == {"reason": reason, "answer": answer}
    marked = dspy.ChatAdapter().parse(
        TASK.signature,
        format_content(made, ParsedRequest({}, "marks", ("reason", "answer"), ()), TASK),
    )
    for name, value in (("reason", reason), ("answer", answer)):
        # DSPy's parser reads every kind of line break as "\n".
        assert marked[name].replace("[ ", "[") == "\n".join(value.strip().splitlines()).replace(
            "[ ", "["
        )


@QUICK
@given(TEXTS)
def test_the_pieces_of_a_stream_are_together_the_text(text: str) -> None:
    chunks = list(Response("id", 1, "m").content_chunks(text))
    assert len(chunks) <= 256
    events = [_event(chunk) for chunk in chunks]
    assert all(event.endswith("\n\n") and "\n" not in event[:-2] for event in events)
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4)
    ),
    max_leaves=12,
)
KNOWN = st.dictionaries(st.sampled_from(list(ChatRequest.model_fields)), JSON, max_size=6)
BODIES = st.one_of(
    st.binary(max_size=200),
    JSON.map(lambda value: json.dumps(value).encode()),
    KNOWN.map(lambda value: json.dumps({**body(), **value}).encode()),
    st.sampled_from(
        [
            b"[" * 100_000,
            b'{"model": "\\ud800"}',
            b"\xff\xfe",
            b"",
            b"NaN",
            b"1e999",
            b'{"\\udc00": 1}',
        ]
    ),
    st.sampled_from(["\ud800", '{"question": "\\ud800"}']).map(
        lambda text: json.dumps(body(text)).encode()
    ),
)


class Door:
    """The application of one service, asked without a socket between, on one event loop."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.service = Service(
            Answering(program(strong=lambda text: text[:40] or "no")), rules(), "handbook"
        )
        self.front = make_app(self.service)

    def __call__(self, content: bytes) -> httpx.Response:
        async def ask() -> httpx.Response:
            async with httpx.AsyncClient(
                transport=httpx.ASGITransport(self.front), base_url="http://localhost"
            ) as client:
                return await client.post(
                    "/v1/chat/completions",
                    content=content,
                    headers={"Content-Type": "application/json"},
                )

        return self.loop.run_until_complete(ask())


@pytest.fixture(scope="module")
def door() -> Any:
    made = Door()
    yield made
    made.loop.close()


@how(max_examples=200)
@given(content=BODIES)
def test_any_body_gets_an_answer_in_openais_form(
    door: Callable[[bytes], httpx.Response], content: bytes
) -> None:
    said = door(content)
    assert said.status_code in (200, 400, 404, 413), said.text
    if said.headers["content-type"].startswith("text/event-stream"):
        assert said.text.endswith("data: [DONE]\n\n")
    elif said.status_code == 200:
        assert said.json()["choices"][0]["message"]["role"] == "assistant"
    else:
        error = said.json()["error"]
        assert (
            set(error) == {"message", "type", "param", "code"}
            and error["message"]
            and len(said.content) < 2000
        )


def test_a_text_that_no_utf8_can_say_is_answered_all_the_same() -> None:
    service = Service(
        Answering(program(strong=lambda _: "half \ud83d a pair")),
        rules(show_draft="always"),
        "handbook",
    )
    front, loop = make_app(service), asyncio.new_event_loop()

    async def ask(stream: bool) -> AsyncIterator[httpx.Response] | httpx.Response:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(front), base_url="http://localhost"
        ) as client:
            return await client.post("/v1/chat/completions", json=body(stream=stream))

    for stream in (False, True):
        said: Any = loop.run_until_complete(ask(stream))
        assert said.status_code == 200 and "half" in said.text
    loop.close()


def test_inputs_that_are_not_the_programs_are_refused_by_name() -> None:
    for text, why in (
        ('{"question": "x"}', "The program takes question, notes, options; given: question."),
        ('{"question": 1, "notes": "y", "options": []}', 'The input "question" is a text.'),
        ('{"question": "x", "notes": "y", "options": 5}', 'The input "options" is no list'),
        ("[[ ## query ## ]]\nx", "given: query"),
    ):
        with pytest.raises(ApiError) as error:
            understood(text)
        assert why in error.value.message and error.value.status == 400
