"""A program in asyncio: both models are awaited, what is kept is kept once, and drafts and answers
are streamed."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import dspy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowest_dspy import Budget, Collaboration, Store
from cowest_dspy.errors import BudgetError
from cowest_dspy.lms import LocalEngine
from cowest_dspy.program.adapters import LineAdapter, _labels
from cowest_dspy.program.collaboration import FAILED_CALL
from cowest_dspy.program.streaming import FieldMarks
from cowest_dspy.store.call_context import keeping, listening, sampling
from cowest_dspy.testing import Fault, OpenAIServer, ScriptedEngine

WORDS = " ".join(f"word{number}" for number in range(40))


def drafts_then_answers(request: dict[str, Any]) -> str:
    text = request["messages"][-1]["content"]
    if request["model"] == "weak":
        return f"About {text.removeprefix('Question: ')}\n{WORDS}"
    return "yes it is" if "\nBackground: About" in text else "no"


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer(drafts_then_answers, model=("weak", "strong")) as served:
        yield served


def lms(server: OpenAIServer, **settings: Any) -> dict[str, dspy.LM]:
    return {
        name: dspy.LM(
            f"openai/{name}", api_base=server.api_base, api_key="any", cache=False, **settings
        )
        for name in server.models
    }


def program_of(server: OpenAIServer, signature: str = "question -> answer", **more: Any) -> Any:
    return Collaboration(signature, **more).bind(**lms(server))


asyncify: Any = dspy.asyncify  # DSPy types what they give as of two arguments
streamify: Any = dspy.streamify


async def gathered(program: Any, questions: list[str]) -> list[Any]:
    return await asyncio.gather(*(program.acall(question=one) for one in questions))


def test_awaited_it_answers_as_it_does_when_called(server: OpenAIServer) -> None:
    program = program_of(server)
    awaited = asyncio.run(program.acall(question="Is it?"))
    assert awaited.toDict() == program(question="Is it?").toDict()
    assert (awaited.answer, awaited.draft) == ("yes it is", f"About Is it?\n{WORDS}")
    bodies = [one.body["messages"] for one in server.received]
    assert bodies[:2] == bodies[2:], "the same prompts"
    assert asyncio.run(asyncify(program)(question="Is it?")).answer == "yes it is"
    assert asyncio.run(asyncify(program.ask_alone)(question="Is it?")).answer == "no"
    assert len(program.history) == 6, "three answers of two calls each"


def test_more_calls_are_under_way_than_there_are_threads_for() -> None:
    together, most = threading.Barrier(24), dspy.settings.async_max_workers

    def all_at_once(request: dict[str, Any]) -> str:
        together.wait(timeout=60)  # breaks, and the request with it, if fewer are under way
        return drafts_then_answers(request)

    assert most < 24
    with OpenAIServer(all_at_once, model=("weak", "strong")) as server:
        program = program_of(server)
        answers = asyncio.run(gathered(program, [f"Is it {n}?" for n in range(24)]))
    assert {one.answer for one in answers} == {"yes it is"}
    assert [one.draft.splitlines()[0] for one in answers] == [
        f"About Is it {n}?" for n in range(24)
    ]


def test_each_of_many_is_sampled_and_listened_to_by_itself(server: OpenAIServer) -> None:
    program = program_of(server)

    async def one(number: int) -> Any:
        with sampling(temperature=0.7, seed=number), listening() as calls:
            await program.acall(question=f"Is it {number}?")
        return calls

    async def all_of_them() -> Any:
        return await asyncio.gather(*(one(number) for number in range(5)))

    for number, calls in enumerate(asyncio.run(all_of_them())):
        assert [call.model for call in calls] == ["openai/weak", "openai/strong"]
        assert all(f"Is it {number}?" in call.messages[-1]["content"] for call in calls)
    assert sorted(one.body["seed"] for one in server.received) == sorted([*range(5)] * 2)
    assert {one.body["temperature"] for one in server.received} == {0.7}


def test_a_store_keeps_each_awaited_answer_once(server: OpenAIServer, tmp_path: Path) -> None:
    program = program_of(server)
    asked = [f"Is it {n % 4}?" for n in range(12)]  # each question three times, at once
    with Store(tmp_path) as store, keeping(store):
        first = asyncio.run(gathered(program, asked))
        assert len(server.received) == store.calls() == 2 * 4
        assert program(question="Is it 1?").toDict() == first[1].toDict()
        asyncio.run(asyncify(program)(question="Is it 2?"))
    with Store(tmp_path) as store, keeping(store), listening() as calls:
        again = asyncio.run(gathered(program, asked))
    assert len(server.received) == 2 * 4, "and a second process asks nothing"
    assert [one.toDict() for one in again] == [one.toDict() for one in first]
    assert all(call.cached for call in calls) and len(calls) == 2 * 12


def test_a_budget_holds_for_what_is_awaited(server: OpenAIServer, tmp_path: Path) -> None:
    program = program_of(server)
    budget = Budget.model_validate({"strong_calls": 3})
    with (
        Store(tmp_path, budget=budget, strong=program.strong.model) as store,
        keeping(store),
        pytest.raises(BudgetError, match="strong"),
    ):
        asyncio.run(gathered(program, [f"Is it {n}?" for n in range(5)]))
    assert sum(one.body["model"] == "strong" for one in server.received) == 3


def test_an_answer_whose_waiting_was_given_up_is_kept_and_not_asked_again(tmp_path: Path) -> None:
    begun, going_on = threading.Event(), threading.Event()

    def slow(request: dict[str, Any]) -> str:
        begun.set()
        going_on.wait(60)
        return drafts_then_answers(request)

    async def given_up(program: Any) -> None:
        waiting = asyncio.create_task(program.acall(question="Is it?"))
        await asyncio.to_thread(begun.wait, 60)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        going_on.set()

    with OpenAIServer(slow, model=("weak", "strong")) as server:
        program = program_of(server)
        with Store(tmp_path) as store, keeping(store):
            asyncio.run(given_up(program))
            answer = asyncio.run(program.acall(question="Is it?"))
            assert answer.answer == "yes it is"
            assert len(server.received) == store.calls() == 2


def test_a_failure_that_passes_is_tried_again_and_one_that_stays_is_raised() -> None:
    faults = [Fault.status(429, retry_after=0.01)]
    with OpenAIServer(drafts_then_answers, model=("weak", "strong"), faults=faults) as server:
        assert asyncio.run(program_of(server).acall(question="Is it?")).answer == "yes it is"
    with (
        OpenAIServer(lambda asked: Fault.status(400), model=("weak", "strong")) as server,
        listening() as calls,
        pytest.raises(dspy.LMError),
    ):
        asyncio.run(program_of(server).acall(question="Is it?"))
    assert not calls


def test_an_awaited_answer_that_was_cut_off_is_marked_as_failed(server: OpenAIServer) -> None:
    program = Collaboration("question -> answer").bind(**lms(server, max_tokens=2))
    prediction = asyncio.run(program.acall(question="Is it?"))
    assert getattr(prediction, FAILED_CALL).startswith("truncated")


class OwnDrafter(dspy.Module):
    """A user's module, which has no aforward."""

    def __init__(self) -> None:
        super().__init__()
        self.know = dspy.Predict("question -> background")
        self.threads: set[int] = set()

    def forward(self, question: str) -> dspy.Prediction:
        self.threads.add(threading.get_ident())
        return self.know(question=question)


def test_modules_and_engines_without_asyncio_are_called_in_threads() -> None:
    drafter = OwnDrafter()
    strong = ScriptedEngine({"": "yes"}, model="scripted/strong")
    program: Any = Collaboration("question -> answer", draft=drafter).bind(
        weak=ScriptedEngine({"": "a note"}, model="scripted/weak").lm(), strong=strong.lm()
    )

    async def while_the_loop_goes_on() -> Any:
        with listening() as calls:
            prediction = await program.acall(question="Is it?")
        return prediction, [call.text for call in calls]

    prediction, texts = asyncio.run(while_the_loop_goes_on())
    assert (prediction.answer, prediction.draft, texts) == ("yes", "a note", ["a note", "yes"])
    assert threading.get_ident() not in program.draft.threads


def test_a_model_in_this_process_is_awaited(tiny_model: Path) -> None:
    engine = LocalEngine(tiny_model)
    lm = engine.lm(temperature=0.0, max_tokens=4)
    program: Any = Collaboration("question -> answer").bind(weak=lm, strong=lm)
    answers = asyncio.run(gathered(program, ["One?", "Two?", "One?"]))
    assert [one.toDict() for one in answers] == [
        program(question=one).toDict() for one in ("One?", "Two?", "One?")
    ]


# Streams


async def pieces_of(program: Any, names: tuple[str, ...], **options: Any) -> AsyncIterator[Any]:
    listeners = [dspy.streaming.StreamListener(name) for name in names]
    asked = streamify(program, stream_listeners=listeners, **options)
    async for piece in asked(question="Is it?"):
        yield piece


async def collected(program: Any, names: tuple[str, ...], **options: Any) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    async for piece in pieces_of(program, names, **options):
        if isinstance(piece, dspy.Prediction):
            found["prediction"] = [piece.answer]
        else:
            found.setdefault(piece.signature_field_name, []).append(piece.chunk)
    return found


@pytest.mark.parametrize("is_async_program", [False, True])
@pytest.mark.parametrize("kept", [False, True])
def test_listeners_get_the_draft_and_the_answer_piece_by_piece(
    server: OpenAIServer, tmp_path: Path, is_async_program: bool, kept: bool
) -> None:
    program = program_of(server)
    names, options = ("background", "answer"), {"is_async_program": is_async_program}
    with Store(tmp_path) as store, keeping(store if kept else None):
        found = asyncio.run(collected(program, names, **options))
        assert "".join(found["background"]) == f"About Is it?\n{WORDS}"
        assert len(found["background"]) > 40
        assert [one for one in found["answer"] if one] == ["yes", " it", " is"]
        assert found["prediction"] == ["yes it is"]
        assert store.calls() == (2 if kept else 0)
        if kept:  # As where DSPy's cache answers: the prediction, and no pieces.
            again = asyncio.run(collected(program, names, **options))
            assert again == {"prediction": ["yes it is"]} and len(server.received) == 2


@pytest.mark.parametrize("is_async_program", [False, True])
def test_the_draft_is_seen_before_the_strong_model_is_asked(
    server: OpenAIServer, is_async_program: bool
) -> None:
    async def first_piece() -> tuple[str, int]:
        pieces = pieces_of(
            program_of(server), ("background", "answer"), is_async_program=is_async_program
        )
        async for piece in pieces:
            asked = len(server.received)
            async for _ in pieces:
                pass
            return piece.chunk, asked
        raise AssertionError

    # DSPy's stream holds 16 pieces: the draft's 43 cannot all be in it.
    assert asyncio.run(first_piece()) == ("About", 1)
    assert len(server.received) == 2


def test_without_listeners_every_piece_comes_once(server: OpenAIServer) -> None:
    async def raw() -> str:
        text = ""
        async for chunk in streamify(program_of(server))(question="Is it?"):
            if not isinstance(chunk, dspy.Prediction):
                text += chunk.choices[0].delta.content or ""
        return text

    assert asyncio.run(raw()) == f"About Is it?\n{WORDS}yes it is"


@pytest.mark.parametrize("configured", [False, True])
def test_listeners_read_dspys_own_adapter(configured: bool) -> None:
    def in_fields(request: dict[str, Any]) -> str:
        name, text = ("background", WORDS) if request["model"] == "weak" else ("answer", "yes")
        return f"[[ ## {name} ## ]]\n{text}\n\n[[ ## completed ## ]]"

    adapter = dspy.ChatAdapter()
    with OpenAIServer(in_fields, model=("weak", "strong")) as server:
        program = program_of(server, adapter=None if configured else adapter)
        with dspy.context(adapter=adapter if configured else None):
            found = asyncio.run(collected(program, ("background", "answer")))
    assert "".join(found["background"]) == WORDS and "".join(found["answer"]) == "yes"
    assert len(found["background"]) > 10


def test_labels_of_several_fields_are_told_apart_in_a_stream() -> None:
    def answers(request: dict[str, Any]) -> str:
        if request["model"] == "weak":
            return "Background: a note: of it"
        return "Since it\nis so: yes\n**Answer:** yes it is"

    with OpenAIServer(answers, model=("weak", "strong")) as server:
        program = program_of(server, "question -> working, answer")
        found = asyncio.run(collected(program, ("background", "working", "answer")))
    assert {name: "".join(pieces) for name, pieces in found.items()} == {
        "background": "a note: of it",
        "working": "Since it\nis so: yes",
        "answer": "yes it is",
        "prediction": "yes it is",
    }


TEXTS = st.text(st.sampled_from("Ano wer:*\n-#Wkig"), max_size=12)


@given(first=TEXTS, second=TEXTS, data=st.data())
def test_law_a_field_of_a_stream_is_the_one_that_is_parsed(
    first: str, second: str, data: st.DataObject
) -> None:
    """However the text is cut into pieces, what stands between the marks is what LineAdapter
    parses, less a sign of Markdown that a label has opened."""
    signature = dspy.ensure_signature("question -> working, answer")
    text = f"Working: {first}\nAnswer: {second}"
    marks = FieldMarks(["working", "answer"], _labels(("working", "answer")))
    made, rest = "", text
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        made += "".join(marks.add(rest[:size]))
        rest = rest[size:]
    made += "".join(marks.end())
    try:
        parsed = LineAdapter().parse(signature, text)  # pyright: ignore[reportArgumentType]
    except dspy.utils.exceptions.AdapterParseError:
        return
    shown = {
        name: made.partition(f"[[ ## {name} ## ]]\n")[2].partition("\n\n[[ ## ")[0].strip()
        for name in ("working", "answer")
    }
    assert {name: value.strip("*") for name, value in shown.items()} == {
        name: value.strip("*") for name, value in parsed.items()
    }


def test_waiting_takes_no_time_of_the_loop(tmp_path: Path) -> None:
    """A store is synchronous: its calls wait in threads, and the loop goes on."""

    def slow(request: dict[str, Any]) -> str:
        time.sleep(0.3)
        return drafts_then_answers(request)

    async def beats(program: Any) -> int:
        waiting = asyncio.create_task(program.acall(question="Is it?"))
        beaten = 0
        while not waiting.done():
            await asyncio.sleep(0.005)
            beaten += 1
        await waiting
        return beaten

    with (
        OpenAIServer(slow, model=("weak", "strong")) as server,
        Store(tmp_path) as store,
        keeping(store),
    ):
        assert asyncio.run(beats(program_of(server))) > 10
