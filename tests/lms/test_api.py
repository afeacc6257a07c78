"""Hosted models, chosen by TOML: a real server on loopback, real HTTP, the real client, and
everything that goes wrong there."""

from __future__ import annotations

import asyncio
import contextvars
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.utils.exceptions import LMError

from cowest_dspy import Collaboration, Sampling, Store, build_lm, collect
from cowest_dspy.errors import ConfigError
from cowest_dspy.lms.api import ApiEngine
from cowest_dspy.lms.config import Api
from cowest_dspy.store import serialize
from cowest_dspy.store.call_context import stoppable
from cowest_dspy.store.rate_limit import Limits
from cowest_dspy.store.record import failure, recorded
from cowest_dspy.testing import Fault, OpenAIServer, Received, ScriptedEngine

# Of a form that no pattern of secrets knows: only who knows the key can leave it out.
KEY = "correct horse battery staple"
SCRIPT = {"2+2": "It is 4.", "long": "one two three four five"}


@pytest.fixture(autouse=True)
def _key_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COWEST_TEST_KEY", KEY)
    monkeypatch.setenv(
        "LITELLM_LOCAL_MODEL_COST_MAP", "true"
    )  # DSPy's table of prices as it ships: no network


def settings(server: OpenAIServer, **more: Any) -> Api:
    values = {
        "kind": "api",
        "model": f"openai/{server.model}",
        "api_base": server.api_base,
        "api_key_env": "COWEST_TEST_KEY",
    }
    return Api.model_validate(
        {"num_retries": 0, "max_tokens": 9, "timeout": 20.0, **values, **more}
    )


@contextmanager
def serving(*faults: Fault | None, **more: Any) -> Iterator[tuple[OpenAIServer, dspy.LM]]:
    """A server with faults, and the LM that a TOML for it gives."""
    with OpenAIServer(SCRIPT, key=KEY, faults=faults) as server:
        yield server, build_lm(settings(server, **more))


# What passes is survived

PASSING = [
    Fault.status(429),
    Fault.status(500),
    Fault.status(503),
    Fault.reset(),
    Fault.truncated(),
    Fault.garbled(),
]


@pytest.mark.parametrize("fault", PASSING, ids=lambda fault: f"{fault.kind} {fault.code or ''}")
def test_a_passing_failure_is_tried_again(fault: Fault) -> None:
    with serving(fault, num_retries=1) as (server, lm):
        assert lm("What is 2+2?") == ["It is 4."]
    assert [one.fault for one in server.received] == [fault, None]


def test_a_silent_server_is_left_and_asked_again() -> None:
    with serving(Fault.slow(30), num_retries=1, timeout=0.5) as (server, lm):
        assert lm("What is 2+2?") == ["It is 4."]
    assert len(server.received) == 2


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (Fault.status(429), "rate limit"),
        (Fault.status(500), "server"),
        (Fault.reset(), "transport"),
        (Fault.truncated(), "transport"),
        (Fault.garbled(), "transport"),
        (Fault.slow(30), "timeout"),
        (Fault.drip(30), "timeout"),
    ],
    ids=lambda value: getattr(value, "kind", value),
)
def test_a_failure_that_stays_is_raised_with_its_kind(fault: Fault, kind: str) -> None:
    timeout = 0.3 if kind == "timeout" else 20.0
    with (
        serving(fault, fault, num_retries=1, timeout=timeout) as (server, lm),
        pytest.raises(LMError) as caught,
    ):
        lm("What is 2+2?")
    assert failure(caught.value).startswith(f"{kind}:")
    assert len(server.received) == 2


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (Fault.status(400), "error"),
        (Fault.status(401), "auth"),
        (Fault.status(403), "auth"),
        (Fault.status(400, error_code="context_length_exceeded"), "context"),
        (Fault.status(429, error_code="insufficient_quota"), "billing"),
    ],
)
def test_a_failure_that_does_not_pass_is_not_tried_again(fault: Fault, kind: str) -> None:
    with serving(fault, num_retries=4) as (server, lm), pytest.raises(LMError) as caught:
        lm("What is 2+2?")
    assert failure(caught.value).startswith(f"{kind}:")
    assert len(server.received) == 1


# Who waits, and for how long


def test_retry_after_is_waited_for_by_all_calls_to_the_endpoint() -> None:
    with serving(Fault.status(429, retry_after=0.8), num_retries=1) as (server, lm):
        other = build_lm(settings(server))
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(lm, "What is 2+2?")
            while engine_of(lm).limits._held_until < 0:
                time.sleep(0.001)
            other("long")
            first.result()
    refused, *later = [one.at for one in server.received]
    assert len(later) == 2 and min(later) - refused >= 0.75


def test_retry_after_is_waited_for_no_longer_than_the_timeout() -> None:
    with serving(Fault.status(503, retry_after=3600), num_retries=1, timeout=0.6) as (server, lm):
        lm("What is 2+2?")
    first, second = [one.at for one in server.received]
    assert second - first >= 0.6


def test_pauses_grow() -> None:
    with serving(Fault.status(500), Fault.status(500), num_retries=2) as (server, lm):
        lm("What is 2+2?")
    pauses = [later.at - earlier.at for earlier, later in pairwise(server.received)]
    assert pauses[0] >= 0.24 and pauses[1] >= 0.49


def test_no_window_of_the_server_holds_more_requests_than_allowed_from_many_threads() -> None:
    window, allowed = 0.4, 10
    with OpenAIServer(SCRIPT) as server:
        engine = ApiEngine(settings(server), limits=Limits(requests=allowed, window=window))
        with ThreadPoolExecutor(32) as pool:
            answers = list(pool.map(lambda _: engine.lm()("What is 2+2?"), range(32)))
    assert answers == [["It is 4."]] * 32
    times = sorted(one.at for one in server.received)
    assert max(sum(start <= at < start + window for at in times) for start in times) <= allowed
    assert server.most_at_once <= allowed


def test_repeated_attempts_count_against_the_limit_too() -> None:
    window = 1.2  # longer than the longest first pause
    with OpenAIServer(SCRIPT, faults=[Fault.status(500)]) as server:
        engine = ApiEngine(
            settings(server, num_retries=1), limits=Limits(requests=1, window=window)
        )
        assert engine.lm()("What is 2+2?") == ["It is 4."]
    first, second = [one.at for one in server.received]
    assert second - first >= window


def test_tokens_are_estimated_before_and_corrected_after() -> None:
    with OpenAIServer(SCRIPT) as server:
        limits = Limits(tokens=60, window=3600)
        lm = ApiEngine(settings(server, max_tokens=30), limits=limits).lm()
        for _ in range(4):  # 4 x (4 + 30) estimated would wait an hour; 4 x (3 + 3) taken do not
            lm("What is 2+2?")
    assert limits._taken == 4 * 6


def test_equal_settings_share_their_limits_across_lms() -> None:
    with OpenAIServer(SCRIPT) as server:
        one, other = (ApiEngine(settings(server, requests_per_minute=7)) for _ in range(2))
    assert one.limits is other.limits and one.limits.requests == 7


@pytest.mark.parametrize("waiting", ["for its turn", "for another try"])
def test_an_interrupt_stops_at_once_a_call_for_which_nothing_is_under_way(waiting: str) -> None:
    faults = [Fault.status(503, retry_after=600)] if waiting == "for another try" else []
    with OpenAIServer(SCRIPT, faults=faults) as server:
        limits = Limits(requests=1, window=3600) if waiting == "for its turn" else Limits()
        lm = ApiEngine(settings(server, timeout=600, num_retries=1), limits=limits).lm()
        if waiting == "for its turn":
            lm("What is 2+2?")
        outcome: list[BaseException] = []

        def ask() -> None:
            try:
                lm("What is 2+2?")
            except BaseException as error:
                outcome.append(error)

        def work() -> threading.Thread:
            with stoppable():
                thread = threading.Thread(
                    target=contextvars.copy_context().run, args=(ask,), daemon=True
                )
                thread.start()
                threads.append(thread)
                time.sleep(0.3)
                raise KeyboardInterrupt

        threads: list[threading.Thread] = []
        with pytest.raises(KeyboardInterrupt):
            work()
        threads[0].join(10)
        assert not threads[0].is_alive() and isinstance(outcome[0], KeyboardInterrupt)


# What it costs


def test_a_price_of_the_settings_is_counted_and_an_unknown_one_stays_unknown(
    tmp_path: Path,
) -> None:
    with OpenAIServer(SCRIPT) as server, Store(tmp_path) as store, store.spending("x") as counter:
        priced = settings(server, price={"input": 1.0, "output": 10.0})
        request = serialize.request_from_messages(
            priced.model, [{"role": "user", "content": "What is 2+2?"}]
        )
        for _ in range(2):  # the second is answered from the store, and costs nothing
            store.answer(request, lambda: build_lm(priced)(request))
        assert counter.usage.usd == pytest.approx((3 * 1.0 + 3 * 10.0) / 1e6)
        other = serialize.request_from_messages(priced.model, [{"role": "user", "content": "long"}])
        store.answer(other, lambda: build_lm(settings(server))(other))
        assert counter.usage.usd is None and counter.usage.calls == 2


def test_a_recorded_lm_passes_the_price_on_and_a_scripted_one_costs_nothing(tmp_path: Path) -> None:
    with OpenAIServer(SCRIPT) as server:
        lm = recorded(build_lm(settings(server, price={"input": 1.0, "output": 1.0})))
        request = serialize.request_from_messages(
            lm.model, [{"role": "user", "content": "What is 2+2?"}]
        )
        assert serialize.response_usd(lm(request)) == pytest.approx(6e-6)
    lm = ScriptedEngine(SCRIPT).lm()
    request = serialize.request_from_messages(
        lm.model, [{"role": "user", "content": "What is 2+2?"}]
    )
    assert serialize.response_usd(lm(request)) == 0.0


def test_the_table_that_dspy_ships_prices_a_providers_own_endpoint() -> None:
    from cowest_dspy.lms.api import response_cost
    from cowest_dspy.lms.config import Price

    response = serialize.make_response("gpt-4o-mini", "x", "stop", 1_000_000, 1_000_000)
    lm = dspy.LM("openai/gpt-4o-mini", cache=False)
    shipped = response_cost(lm, None, response)
    assert shipped is not None and shipped > 0
    assert response_cost(lm, Price(input=1.0, output=2.0), response) == 3.0
    unknown = serialize.make_response("no-such-model", "x", "stop", 1, 1)
    assert response_cost(dspy.LM("openai/no-such-model", cache=False), None, unknown) is None
    assert (
        response_cost(
            dspy.LM("openai/gpt-4o-mini", api_base="http://127.0.0.1:1/v1", cache=False),
            None,
            response,
        )
        is None
    )


# The key


def everything_said_by(error: BaseException | None) -> str:
    return (
        ""
        if error is None
        else f"{error!r} {error} {vars(error)}"
        + everything_said_by(error.__cause__ or error.__context__)
    )


@pytest.mark.parametrize("status", [401, 500])
def test_the_key_is_in_no_error_repr_history_or_saved_state(status: int, tmp_path: Path) -> None:
    with serving(Fault.status(status, message=f"Your key is {KEY}.")) as (_, lm):
        with pytest.raises(LMError) as caught:
            lm("What is 2+2?")
        assert "Your key is ***" in str(caught.value) and caught.value.status == status  # pyright: ignore[reportAttributeAccessIssue]
        assert KEY not in everything_said_by(caught.value)
        assert lm("What is 2+2?") == ["It is 4."]
        predict = dspy.Predict("question -> answer")
        predict.set_lm(lm)
        predict.save(tmp_path / "program.json")
        assert KEY.encode() not in (tmp_path / "program.json").read_bytes() + pickle.dumps(
            lm.engine
        )
        assert KEY not in f"{lm!r} {lm.history} {vars(lm)} {lm.dump_state()} {lm.engine!r}"
        again = dspy.Predict("question -> answer")
        again.load(tmp_path / "program.json", allow_unsafe_lm_state=True)
        assert again.lm is not None and again.lm("What is 2+2?") == ["It is 4."]


def test_a_word_in_the_place_of_a_key_is_not_masked_out_of_errors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COWEST_TEST_KEY", "none")
    with (
        OpenAIServer(SCRIPT, faults=[Fault.status(400, message="none of it")]) as server,
        pytest.raises(LMError, match="none of it"),
    ):
        build_lm(settings(server))("What is 2+2?")


def test_a_key_that_is_not_set_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COWEST_TEST_KEY")
    with (
        OpenAIServer(SCRIPT) as server,
        pytest.raises(ConfigError, match="COWEST_TEST_KEY is not set"),
    ):
        build_lm(settings(server))


# As part of DSPy and of a run


def engine_of(lm: dspy.LM) -> ApiEngine:
    assert isinstance(lm.engine, ApiEngine)
    return lm.engine


def token_limit(received: Received) -> int | None:
    """The field has two names: DSPy chooses by the model."""
    return received.body.get("max_tokens") or received.body.get("max_completion_tokens")


def awaited(lm: dspy.LM) -> list[Any]:
    return asyncio.run(lm.acall("What is 2+2?"))


@pytest.mark.parametrize(
    "ask",
    [lambda lm: lm("What is 2+2?"), awaited, lambda lm: lm.copy(temperature=0.5)("What is 2+2?")],
)
def test_calls_copies_and_awaited_calls_answer_alike(ask: Callable[[dspy.LM], list[Any]]) -> None:
    with serving(Fault.status(500), num_retries=1) as (server, lm), dspy.track_usage() as usage:
        assert ask(lm) == ["It is 4."]
    assert len(server.received) == 2 and token_limit(server.received[0]) == 9
    assert usage.get_total_tokens()[lm.model]["total_tokens"] == 6, (
        "counted once, not once for each layer"
    )


def test_a_hosted_strong_model_refines_and_its_failure_is_no_score(tmp_path: Path) -> None:
    def refine(request: dict[str, Any]) -> str | Fault:
        text = request["messages"][-1]["content"]
        return (
            Fault.status(500, message=f"broken, and your key is {KEY}")
            if "broken" in text
            else text.splitlines()[-1]
        )

    def example(number: int, question: str) -> dspy.Example:
        return dspy.Example(
            id=str(number), question=question, answer="Background: good"
        ).with_inputs("question")

    def said_well(example: dspy.Example, prediction: Any, trace: Any = None) -> float:
        return float(prediction.answer == example.answer)

    weak = ScriptedEngine(lambda request: "good" if request["config"].get("seed", 0) % 2 else "bad")
    with OpenAIServer(refine, key=KEY) as server, Store(tmp_path) as store:
        program = Collaboration("question -> answer").bind(
            weak=weak.lm(), strong=build_lm(settings(server, temperature=0.0))
        )
        examples = [example(0, "What?"), example(1, "broken?")]
        traces = collect(
            program, examples, said_well, Sampling(drafts=4), store=store, max_errors=1.0
        )
    good = [trace for trace in traces if trace.example_id == "0"]
    assert {(trace.draft, trace.influence) for trace in good} <= {("good", 1.0), ("bad", 0.0)}
    assert good[0].tokens["strong_in"] > 0 and good[0].tokens["strong_out"] == 2
    broken = [trace for trace in traces if trace.example_id == "1"]
    assert all(
        trace.error and trace.error.startswith("refine server") and trace.influence is None
        for trace in broken
    )
    assert {(token_limit(one), one.body["temperature"]) for one in server.received} == {(9, 0.0)}
    program.save(tmp_path / "program.json")
    for file in tmp_path.iterdir():
        assert KEY.encode() not in file.read_bytes(), file.name
