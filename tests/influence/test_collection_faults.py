"""What goes wrong while traces are collected stays wrong: it is an error of a kind, never a score;
and the store under load."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.lm15 import Message, RefusalPart, Response, ServerError, Usage
from local_server import CHAT, completion, local_server
from scripted import match, questions, strong_that_reads, together
from scripted_weak import weak_by_seed

from cowest_dspy.errors import CollectionError, DataError
from cowest_dspy.influence.collection import collect
from cowest_dspy.influence.metric import attempt
from cowest_dspy.influence.report import InfluenceReport
from cowest_dspy.influence.trace import Sampling, Trace
from cowest_dspy.lms import ServerEngine
from cowest_dspy.lms.api import ApiEngine
from cowest_dspy.lms.config import Api, Server
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.store import serialize
from cowest_dspy.store.store import Store
from cowest_dspy.testing import Fault, OpenAIServer, ScriptedEngine

# Failures


def test_a_metric_that_fails_is_a_trace_with_an_error_and_a_bug_in_it_is_raised() -> None:
    judge = ScriptedEngine(lambda request: ServerError("down"), model="scripted/judge").lm()

    def metric(example: dspy.Example, prediction: Any, trace: Any = None) -> float:
        return float(judge("How good?")[0])

    traces = collect(
        together(weak_by_seed(), strong_that_reads()),
        questions(2),
        metric,
        Sampling(drafts=2),
        max_errors=1.0,
    )
    assert all(
        trace.error and trace.error.startswith("refine judge server:") and trace.influence is None
        for trace in traces
    )

    def bug(example: dspy.Example, prediction: Any, trace: Any = None) -> float:
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        collect(
            together(weak_by_seed(), strong_that_reads()), questions(50), bug, Sampling(drafts=2)
        )


def test_a_bug_in_one_example_stops_the_others() -> None:
    strong = strong_that_reads()

    def metric(example: dspy.Example, prediction: Any, trace: Any = None) -> float:
        return 7.0 if example.id == "q0" else 0.0

    with pytest.raises(DataError, match="between 0 and 1"):
        collect(
            together(weak_by_seed(), strong),
            questions(200),
            metric,
            Sampling(drafts=4),
            num_threads=2,
        )
    assert len(strong.asked) < 100


@pytest.mark.parametrize("empty", ["", "   \n"])
def test_an_empty_answer_is_a_parse_failure(empty: str) -> None:
    strong = ScriptedEngine(lambda request: empty, model="scripted/strong")
    (trace,) = collect(
        together(ScriptedEngine({"": "a"}), strong),
        questions(1),
        match,
        Sampling(drafts=1),
        max_errors=1.0,
    )
    assert (
        trace.error is not None
        and trace.error.startswith("refine parse:")
        and trace.refined_score is None
    )


@pytest.mark.parametrize(
    "body", [completion("No.", "content_filter"), completion("", "content_filter")]
)
def test_an_answer_that_a_providers_filter_ended_is_a_refusal(body: Any) -> None:
    with local_server({CHAT: lambda asked: body}) as server:
        engine = ServerEngine(
            Server.model_validate({"kind": "server", "model": "m", "api_base": f"{server.url}/v1"})
        )
        program = Collaboration("question -> answer").bind(
            weak=ScriptedEngine({"": "a"}).lm(), strong=engine.lm()
        )
        (trace,) = collect(program, questions(1), match, Sampling(drafts=1), max_errors=1.0)
    assert (
        trace.error is not None
        and trace.error.startswith("refine refusal:")
        and trace.refined_score is None
    )


def test_a_model_that_refuses_in_openais_words_is_a_refusal() -> None:
    body = completion("")
    body.body["choices"][0]["message"] |= {"content": None, "refusal": "I cannot help with that."}
    with local_server({CHAT: lambda asked: body}) as server:
        engine = ServerEngine(
            Server.model_validate({"kind": "server", "model": "m", "api_base": f"{server.url}/v1"})
        )
        program = Collaboration("question -> answer").bind(
            weak=engine.lm(), strong=ScriptedEngine({"": "a"}).lm()
        )
        made = attempt(lambda: dspy.Prediction(draft=program.ask_draft(question="?").draft))
    assert made.error is not None and made.error.startswith("refusal:")
    refused = Response(None, "m", Message("assistant", (RefusalPart("No."),)), "stop", Usage())
    assert serialize.response_to_dict(refused)["finish_reason"] == "content_filter"


def test_a_collection_stops_early_when_too_many_fail_and_keeps_what_there_is(
    tmp_path: Path,
) -> None:
    def weak(request: dict[str, Any]) -> str | Exception:
        number = int(request["messages"][-1]["content"].split()[-1].rstrip("?"))
        return ServerError("down") if number % 2 else "fine"

    strong = strong_that_reads()
    with Store(tmp_path) as store:
        with pytest.raises(
            CollectionError, match=r"10 of 20 drafts failed \(server 10\).*The first: server"
        ):
            collect(
                together(ScriptedEngine(weak), strong),
                questions(500),
                match,
                Sampling(drafts=2),
                store=store,
                max_errors=0.4,
            )
        assert store.count("trace") == 20 and store.calls() > 20
    assert len(strong.asked) < 200, "what was not under way was not asked"


def faults(seed: int) -> list[Fault | None]:
    """What goes wrong with 30 % of the first 500 requests."""
    rng = random.Random(seed)
    kinds = (
        Fault.status(429),
        Fault.status(500),
        Fault.reset(),
        Fault.truncated(),
        Fault.garbled(),
        Fault.slow(3.0),
    )
    return [rng.choice(kinds) if rng.random() < 0.3 else None for _ in range(500)]


def test_injected_faults_become_errors_and_a_second_run_without_them_completes_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COWEST_TEST_KEY", "any")
    monkeypatch.setenv(
        "LITELLM_LOCAL_MODEL_COST_MAP", "true"
    )  # DSPy's table of prices as it ships: no network

    def strong(request: dict[str, Any]) -> str:
        return str(strong_that_reads().script(request))  # pyright: ignore[reportCallIssue]

    def run(folder: str, wrong: list[Fault | None]) -> tuple[list[Trace], list[Any]]:
        with OpenAIServer(strong, faults=wrong) as server, Store(tmp_path / folder) as store:
            reach = {
                "model": f"openai/{server.model}",
                "api_base": server.api_base,
                "api_key_env": "COWEST_TEST_KEY",
            }
            engine = ApiEngine(
                Api.model_validate(
                    {"kind": "api", **reach, "num_retries": 0, "timeout": 0.8 if wrong else 60}
                )
            )
            program = Collaboration("question -> answer").bind(
                weak=weak_by_seed().lm(), strong=engine.lm()
            )
            traces = collect(
                program,
                questions(25),
                match,
                Sampling(drafts=4),
                store=store,
                num_threads=6,
                max_errors=1.0,
            )
            return list(traces), [one for one in server.received if one.fault is None]

    broken, answered = run("faulty", faults(seed=5))
    kinds = Counter(
        (trace.error or "").partition(":")[0].removeprefix("alone ").removeprefix("refine ")
        for trace in broken
    )
    assert {"timeout", "rate limit", "server", "transport"} <= set(kinds)
    assert kinds[""] < len(broken) / 1.4, "30 % of the calls failed"
    for trace in broken:
        assert (trace.influence is None) == (trace.error is not None)
        if trace.error and not trace.error.startswith("alone"):
            assert trace.refined_score is None
    failed = {trace.key for trace in broken if trace.error}
    used = {trace.key for trace in broken if trace.influence is not None}
    assert failed | used == {trace.key for trace in broken} and InfluenceReport.from_traces(
        broken
    ).failed == len(failed)

    resumed, asked_again = run("faulty", [])
    clean, asked_once = run("clean", [])
    assert resumed == clean and not any(trace.error for trace in clean)
    assert len(answered) + len(asked_again) == len(asked_once), "no answered call is asked again"


# The store under load


def test_answers_committed_together_are_all_there_and_no_lock_is_left(tmp_path: Path) -> None:
    weak = ScriptedEngine(
        lambda request: f"draft {request['config']['seed']}", model="scripted/weak"
    )
    strong = strong_that_reads()
    with Store(tmp_path) as store, store.spending("collect") as counter:
        collect(
            together(weak, strong),
            questions(40),
            match,
            Sampling(drafts=4),
            store=store,
            num_threads=16,
        )
        asked = len(weak.asked) + len(strong.asked)
        assert store.calls() == counter.usage.calls == asked == 40 * (4 + 4 + 1)
        assert store._asking == {} and store._queue == []
    with Store(tmp_path) as store:
        collect(
            together(weak, strong),
            questions(40),
            match,
            Sampling(drafts=4),
            store=store,
            num_threads=16,
        )
    assert len(weak.asked) + len(strong.asked) == asked
