"""Requests that join a batch on its way, that speak as different adapters, and that fail alone."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import dspy
import pytest
from dspy.lm15 import InvalidRequestError
from engine_parts import ask_all, generated, prompts
from tiny import make_adapter

from cowest_dspy.lms import LocalEngine
from cowest_dspy.lms.local import generate, scheduler
from cowest_dspy.lms.local.sampling import PromptRow
from cowest_dspy.lms.local.scheduler import ComputeThread
from cowest_dspy.program.adapters import LineAdapter
from cowest_dspy.store import serialize


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> LocalEngine:
    return LocalEngine(tiny_model, dtype="float32", max_batch=16)


@pytest.fixture(scope="module")
def adapters(
    engine: LocalEngine, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    folders = [make_adapter(tiny_model, folder / str(seed), seed) for seed in (1, 2)]
    return {engine.load_adapter(one): one for one in folders}


class Counting:
    """A batch that notes how many rows every pass has."""

    def __init__(self, inner: Any, sizes: list[int]) -> None:
        self.inner, self.sizes = inner, sizes

    @property
    def live(self) -> int:
        return self.inner.live

    @property
    def adapters(self) -> Any:
        return self.inner.adapters

    def admit(self, rows: Any) -> Any:
        return self.inner.admit(rows)

    def step(self) -> Any:
        self.sizes.append(self.inner.live)
        return self.inner.step()


def test_base_and_two_adapters_share_one_batch_and_keep_apart(
    engine: LocalEngine, tiny_model: Path, adapters: dict[str, Path]
) -> None:
    asked = prompts(3)
    speakers = [engine.model_id, *adapters]
    expected = [
        generated(tiny_model, messages, 8, adapters.get(model))
        for messages in asked
        for model in speakers
    ]
    loaded = engine._load()
    rows = [
        engine._batcher._row(
            loaded, engine._work(serialize.request_from_messages(model, messages, max_tokens=8))
        )
        for messages in asked
        for model in speakers
    ]
    assert [one.text for one in generate.run(loaded.begin(), rows)] == expected
    requests = [
        serialize.request_from_messages(model, messages, max_tokens=8)
        for messages in asked
        for model in speakers
    ]
    with ThreadPoolExecutor(len(requests)) as pool:
        assert [
            serialize.response_text(one) for one in pool.map(engine.complete, requests)
        ] == expected


def test_a_request_joins_a_batch_that_is_on_its_way(tiny_model: Path) -> None:
    engine = LocalEngine(tiny_model, dtype="float32", max_batch=16)
    loaded = engine._load()
    sizes: list[int] = []
    engine._loaded = scheduler.LoadedModel(
        loaded.lora,
        loaded.tokenizer,
        frozenset(),
        lambda: Counting(loaded.begin(), sizes),
        loaded.joinable,
    )
    started = threading.Event()
    first = engine._work(
        serialize.request_from_messages(engine.model_id, prompts(1)[0], max_tokens=300), None
    )
    object.__setattr__(first.row, "on_tokens", lambda tokens: started.set())
    engine._batcher.submit(first)
    assert started.wait(30)
    late = serialize.response_text(
        engine.complete(
            serialize.request_from_messages(engine.model_id, prompts(2)[1], max_tokens=4)
        )
    )
    assert not first.future.done(), "the late one was answered while the first was on its way"
    assert 2 in sizes
    assert late == generated(tiny_model, prompts(2)[1], 4)
    first.future.result(60)


def test_rows_that_come_and_go_say_what_they_say_alone(tiny_model: Path) -> None:
    loaded = LocalEngine(tiny_model, dtype="float32")._load()
    begin = loaded.begin
    rows = [
        PromptRow(
            [70 + n % 7, 80, 90 + n][: 2 + n % 2] * (1 + n % 5), 3 + n % 9, temperature=1.0, seed=n
        )
        for n in range(24)
    ]
    alone = {row: generate.run(begin(), [row])[0] for row in rows}
    session: Any = begin()
    waiting, done = list(rows), {}
    while waiting or session.live:
        joining, waiting = waiting[: 5 - min(session.live, 5)], waiting[5 - min(session.live, 5) :]
        done.update(session.admit(joining))
        if session.live:
            done.update(session.step())
    assert {row: one.tokens for row, one in done.items()} == {
        row: one.tokens for row, one in alone.items()
    }


def test_a_request_that_fails_takes_nobody_with_it(tiny_model: Path) -> None:
    engine = LocalEngine(tiny_model, dtype="float32", max_batch=16)
    loaded = engine._load()
    poison = engine._tokens(prompts(6)[5])[0]

    class Poisoned(Counting):
        def admit(self, rows: Any) -> Any:
            if any(tuple(row.tokens) == poison[-len(row.tokens) :] for row in rows):
                raise RuntimeError(
                    "DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"
                )
            return self.inner.admit(rows)

    engine._loaded = scheduler.LoadedModel(
        loaded.lora,
        loaded.tokenizer,
        loaded.end_tokens,
        lambda: Poisoned(loaded.begin(), []),
        loaded.joinable,
    )
    requests = [
        serialize.request_from_messages(engine.model_id, messages, max_tokens=5)
        for messages in prompts(6)
    ]
    with ThreadPoolExecutor(6) as pool:
        futures = [pool.submit(engine.complete, request) for request in requests]
    texts = [serialize.response_text(future.result()) for future in futures[:5]]
    assert texts == [generated(tiny_model, messages, 5) for messages in prompts(6)[:5]]
    with pytest.raises(
        InvalidRequestError,
        match=r"Out of memory for one request alone, of .* prompt tokens and max_tokens = 5",
    ):
        futures[5].result()


def test_an_adapter_that_is_gone_fails_those_who_ask_for_it(
    tiny_model: Path, tmp_path: Path
) -> None:
    engine = LocalEngine(tiny_model, dtype="float32", max_batch=16)
    gone = engine.load_adapter(make_adapter(tiny_model, tmp_path / "gone", 7))
    shutil.rmtree(tmp_path / "gone")
    asked = prompts(4)
    requests = [
        serialize.request_from_messages(
            gone if place % 2 else engine.model_id, messages, max_tokens=5
        )
        for place, messages in enumerate(asked)
    ]
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(engine.complete, request) for request in requests]
    assert [serialize.response_text(futures[place].result()) for place in (0, 2)] == [
        generated(tiny_model, asked[p], 5) for p in (0, 2)
    ]
    for place in (1, 3):
        with pytest.raises(Exception, match="gone"):
            futures[place].result()


def test_a_model_that_cannot_be_loaded_fails_every_request_and_not_the_engine(
    tiny_model: Path,
) -> None:
    engine = LocalEngine(tiny_model, dtype="float32")
    work = engine._work(
        serialize.request_from_messages(engine.model_id, prompts(1)[0], max_tokens=2)
    )

    def broken() -> Any:
        raise OSError("the disk is gone")

    engine._batcher._open = broken
    engine._batcher.submit(work)
    with pytest.raises(OSError, match="the disk is gone"):
        work.future.result(30)
    engine._batcher._open = engine._load
    assert ask_all(engine, prompts(2), max_tokens=2)


def test_a_stream_says_in_pieces_what_the_answer_says(engine: LocalEngine) -> None:
    request = serialize.request_from_messages(
        engine.model_id, prompts(1)[0], max_tokens=12, temperature=1.0, seed=5
    )
    whole = engine.complete(request)
    events = list(engine.stream(request))
    pieces = [event.delta.text for event in events[1:-1]]
    assert "".join(pieces) == serialize.response_text(whole) and len(pieces) > 2
    assert (events[-1].finish_reason, events[-1].usage) == (whole.finish_reason, whole.usage)


def test_a_stream_keeps_back_what_a_stop_string_will_cut(engine: LocalEngine) -> None:
    whole = serialize.response_text(
        engine.complete(
            serialize.request_from_messages(engine.model_id, prompts(1)[0], max_tokens=12)
        )
    )
    request = serialize.request_from_messages(
        engine.model_id, prompts(1)[0], max_tokens=12, stop=(whole[4:7],)
    )
    pieces = [event.delta.text for event in list(engine.stream(request))[1:-1]]
    assert "".join(pieces) == whole.split(whole[4:7])[0]


def test_dspy_streams_the_engine(engine: LocalEngine) -> None:
    import asyncio

    async def chunks() -> list[Any]:
        streaming: Any = cast("Any", dspy.streamify)(
            dspy.Predict("question -> answer"), async_streaming=True
        )
        with dspy.context(
            lm=engine.lm(max_tokens=12, temperature=1.0, seed=1), adapter=LineAdapter()
        ):
            return [chunk async for chunk in streaming(question="Hello?")]

    *pieces, prediction = asyncio.run(chunks())
    assert isinstance(prediction, dspy.Prediction) and len(pieces) > 3


def test_turns_are_given_in_the_order_in_which_they_were_asked_for() -> None:
    turns, order = ComputeThread(), []
    release = [threading.Event() for _ in range(3)]

    def take(number: int) -> None:
        turns.run(lambda: (order.append(number), release[number].wait(30)))

    threads = [threading.Thread(target=take, args=(number,)) for number in range(3)]
    for number, thread in enumerate(threads):
        thread.start()
        while len(order) + turns._tasks.qsize() <= number:
            pass
    assert turns.wanted
    for number in range(3):
        release[number].set()
        threads[number].join(30)
    assert order == [0, 1, 2] and not turns.wanted


def test_a_turn_gives_what_its_work_gives_or_raises_and_may_ask_for_more() -> None:
    turns = ComputeThread()
    assert turns.run(lambda: turns.run(threading.current_thread).name) == "cowest compute"
    with pytest.raises(ZeroDivisionError):
        turns.run(lambda: 1 / 0)
    assert turns.run(lambda: 1) == 1


def test_who_has_nothing_to_do_ends_and_is_there_again_when_needed() -> None:
    turns = ComputeThread()
    first = turns.run(threading.current_thread)
    first.join(30)
    assert not first.is_alive() and turns.run(threading.current_thread) is not first
