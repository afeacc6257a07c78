"""A hostile endpoint, asked as kind "api" and as kind "server": no traceback, no wait over its
deadline, no paid answer lost.

One server answers in some hundred ways, from right to a reset in the middle of a header. Which of
them a request gets follows from the seed, from what is asked and from how often it was: what fails
here fails again.
"""

from __future__ import annotations

import gc
import json
import logging
import random
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import dspy
import pytest
from hostile import (
    KEY,
    ODD,
    RIGHT,
    SILENT,
    TIMEOUT,
    WAYS,
    WRONG,
    Endpoint,
    Name,
    drawn,
    endpoint,
    identity,
    right_text,
)
from scripted import match, questions

from cowest_dspy import Collaboration, Sampling, Store, build_lm, collect, preference_pairs
from cowest_dspy.influence.report import failure_kind
from cowest_dspy.influence.trace import Trace
from cowest_dspy.lms import protocol
from cowest_dspy.lms.config import Api, Server
from cowest_dspy.store import serialize
from cowest_dspy.store.call_context import keeping
from cowest_dspy.store.record import EXPECTED_FAILURES, UNUSABLE, call_failed, failure, recorded
from cowest_dspy.store.schema import UNDER_WAY

KINDS = ["api", "server"]
EXAMPLES, DRAFTS, THREADS, RETRIES = 12, 3, 8, 1
PATIENCE = 120.0
"""Seconds for an attempt at a good server, on a busy machine."""
BUFFERS = 16 * 2**20
"""Bytes that may be sent beyond what a client takes: the system buffers them. Of kind "api" only
the deadline ends a body."""


@pytest.fixture(autouse=True)
def _key_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COWEST_TEST_KEY", KEY)
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "true")
    monkeypatch.setattr(protocol, "LARGEST_BODY", 2**20)


@pytest.fixture
def ran_out(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many attempts ended at their deadline: on a busy machine also some that were answered."""
    count, within = Counter[str](), protocol.within

    def counted(seconds: float, attempt: Any) -> Any:
        try:
            return within(seconds, attempt)
        except TimeoutError:
            count["attempts"] += 1
            raise

    monkeypatch.setattr(protocol, "within", counted)
    return count


def lm_of(kind: str, address: str, name: str, **more: Any) -> dspy.LM:
    values = {
        "kind": kind,
        "api_base": address,
        "api_key_env": "COWEST_TEST_KEY",
        "timeout": TIMEOUT,
        **more,
    }
    values["model"] = f"openai/{name}" if kind == "api" else name
    return build_lm(Api.model_validate(values) if kind == "api" else Server.model_validate(values))


def stored(folder: Path) -> dict[str, dict[str, Any]]:
    """The answers that a run has, by what was asked."""
    with closing(sqlite3.connect(folder / "run.sqlite")) as db:
        assert not db.execute(
            "SELECT count(*) FROM failures WHERE error = ?", (UNDER_WAY,)
        ).fetchone()[0]
        rows = db.execute("SELECT request, response FROM calls").fetchall()
    return {identity(json.loads(request)): json.loads(response) for request, response in rows}


def check_nothing_is_left(
    server: Endpoint, folder: Path, before: set[threading.Thread], caplog: pytest.LogCaptureFixture
) -> None:
    """No connection, no thread, no trace in the log, no key on the disk."""
    assert server.hanging == []
    assert server.most <= protocol.LARGEST_BODY + BUFFERS
    ours = [
        thread
        for thread in set(threading.enumerate()) - before
        if not thread.name.startswith(("cowest-http", "cowest-look-up"))
    ]
    assert ours == []
    gc.collect()  # An error that nobody has asked a task for is logged now.
    assert [
        record.getMessage()
        for record in caplog.records
        if record.levelno >= logging.ERROR or record.exc_info
    ] == []
    found = [
        path for path in folder.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()
    ]
    assert found == [] and KEY not in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_each_way_to_answer_is_an_answer_that_is_kept_or_a_failure_of_its_own_call(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = set(threading.enumerate())
    names = dict(enumerate(WAYS))

    def ask(number: int) -> str | None:
        with keeping(store):
            try:
                lm(f"Way {number}")
            except EXPECTED_FAILURES as error:
                return failure(error)
        return None

    def way_of(messages: Any) -> Name:
        return names[int(messages[-1]["content"].split()[-1])]

    with endpoint(lambda asked, _: way_of(asked["messages"]), lambda _: "right") as server:
        lm = recorded(
            lm_of(
                kind,
                server.address,
                "strong",
                num_retries=0,
                **({"concurrency": 100} if kind == "server" else {}),
            )
        )
        with Store(tmp_path) as store, ThreadPoolExecutor(16) as pool:
            errors = dict(zip(WAYS, pool.map(ask, names), strict=True))
        kept = {way_of(json.loads(one)[1]): answer for one, answer in stored(tmp_path).items()}
    check_nothing_is_left(server, tmp_path, before, caplog)
    late = {
        name for name, error in errors.items() if error and error.startswith("timeout:")
    }  # on a busy machine
    assert {
        name: error
        for name, error in errors.items()
        if name in RIGHT and error and name not in late
    } == {}
    assert [name for name, error in errors.items() if name in WRONG and not error] == []
    assert kept.keys() == {name for name, error in errors.items() if error is None}
    assert {answer["text"] for answer in kept.values()} <= {"right", ""}
    assert all(
        0 <= answer["input_tokens"] + answer["output_tokens"] <= serialize.MOST_TOKENS
        for answer in kept.values()
    )


# A collection


def hostile(seed: int) -> Callable[[Any, int], Name]:
    """Half of all answers are right, and each of them is drawn by what is asked and how often."""

    def choose(asked: Any, count: int) -> Name:
        rng = random.Random(drawn(seed, identity(asked), count))
        return rng.choice(list(RIGHT) if rng.random() < 0.5 else [*ODD, *WRONG])

    return choose


def run(
    kind: str, folder: Path, server: Endpoint, timeout: float = PATIENCE
) -> tuple[list[Trace], list[dict[str, Any]]]:
    """What a collection gives, both models of which are asked at the server."""
    more: dict[str, Any] = {
        "num_retries": RETRIES,
        "timeout": timeout,
        **({"concurrency": 100} if kind == "server" else {}),
    }
    weak, strong = (lm_of(kind, server.address, name, **more) for name in ("weak", "strong"))
    program = Collaboration("question -> answer", draft="knowledge").bind(weak=weak, strong=strong)
    with Store(folder, strong=strong.model) as store:
        sampling = Sampling(drafts=DRAFTS)
        traces = collect(
            program,
            questions(EXAMPLES),
            match,
            sampling,
            store=store,
            num_threads=THREADS,
            max_errors=1.0,
        )
        return list(traces), preference_pairs(traces).rows()


def facts(traces: Iterable[Trace]) -> list[Any]:
    return [
        (trace.key, trace.draft, trace.refined, trace.alone, trace.influence, trace.error)
        for trace in traces
    ]


def check_hostile_collection(
    kind: str, seed: int, folder: Path, caplog: pytest.LogCaptureFixture, ran_out: Counter[str]
) -> None:
    """Collects from a hostile server, again from one that has come to its senses, and compares with
    one that never was hostile."""
    before, started = set(threading.enumerate()), time.monotonic()
    with endpoint(hostile(seed)) as server:
        traces, _ = run(kind, folder / "run", server, TIMEOUT)
    check_nothing_is_left(server, folder, before, caplog)
    # As if each attempt took all of its time, and a Retry-After as long again held back all others.
    assert time.monotonic() - started < server.asked.total() * 2 * (TIMEOUT + protocol.GRACE)
    answers = stored(folder / "run")
    late = ran_out.total() - sum(server.ways[way] for way in SILENT)
    lost = [one for one in server.billed if one not in answers]
    assert len(lost) <= max(late, 0), f"what was billed is kept: {lost}"
    assert [
        one for one, answer in answers.items() if answer["text"] not in server.given.get(one, set())
    ] == []
    for trace in traces:
        scores = (trace.refined_score, trace.alone_score)
        assert (trace.influence is None) == (trace.error is not None) == (None in scores), trace
        assert trace.error is None or failure_kind(trace.error), trace
    assert all(
        answer["input_tokens"] + answer["output_tokens"] <= serialize.MOST_TOKENS
        for answer in answers.values()
    )

    with endpoint(lambda *_: "plain") as server:
        traces, pairs = run(kind, folder / "run", server)
        assert not server.asked.keys() & answers.keys() and set(server.asked.values()) == {1}, (
            "what failed is asked, and only once"
        )
    assert not [trace.error for trace in traces if call_failed(trace.error)]

    odd = {
        one: answer
        for one, answer in answers.items()
        if not answer["text"] or answer["finish_reason"] != "stop"
    }

    def way_of(asked: Any, _: int) -> Name:
        answer = odd.get(identity(asked))
        return (
            "plain"
            if answer is None or answer["finish_reason"] == "stop"
            else f"finish_reason {answer['finish_reason']}"
        )

    def say(asked: Any) -> str:
        return odd[identity(asked)]["text"] if identity(asked) in odd else right_text(asked)

    with endpoint(way_of, say) as server:
        never, same = run(kind, folder / "never", server)
    assert facts(traces) == facts(never) and pairs == same and len(pairs) > 0
    assert {failure_kind(trace.error).split()[-1] for trace in traces if trace.error} <= set(
        UNUSABLE
    )


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", KINDS)
def test_a_collection_from_a_hostile_server_loses_nothing_and_ends_as_if_it_had_been_a_good_one(
    kind: str, seed: int, tmp_path: Path, caplog: pytest.LogCaptureFixture, ran_out: Counter[str]
) -> None:
    check_hostile_collection(kind, seed, tmp_path, caplog, ran_out)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 12))
@pytest.mark.parametrize("kind", KINDS)
def test_many_collections_from_a_hostile_server_lose_nothing(
    kind: str, seed: int, tmp_path: Path, caplog: pytest.LogCaptureFixture, ran_out: Counter[str]
) -> None:
    check_hostile_collection(kind, seed, tmp_path, caplog, ran_out)
