"""Collecting traces: flat, overlapped, adaptive, several answers, failures that stay failures, drafts that are scored too."""

from __future__ import annotations

import random
import threading
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.lm15 import Message, RefusalPart, Response, ServerError, Usage
from hypothesis import given, settings
from hypothesis import strategies as st
from local_server import CHAT, completion, local_server
from test_influence_laws import made_trace, match, questions, strong_that_reads, together

from cowest_dspy.config import Api, Server
from cowest_dspy.errors import CollectionError, DataError, StoreError
from cowest_dspy.influence import attempt
from cowest_dspy.lms import ServerEngine, wire
from cowest_dspy.lms.api import ApiEngine
from cowest_dspy.pairs import preference_pairs
from cowest_dspy.program import Collaboration, DraftFormat
from cowest_dspy.store import Store
from cowest_dspy.testing import Fault, OpenAIServer, ScriptedEngine
from cowest_dspy.traces import HeldTraces, Sampling, StoredTraces, Trace, collect, in_order, influence_report
from cowest_dspy.traces.enough import HOPELESS, chance_of_another, enough


def by_seed(request: dict[str, Any]) -> str:
    """A weak model: the question's number, something else, or nothing that can be told apart, as the seed wants it."""
    number = request["messages"][-1]["content"].split()[-1].rstrip("?")
    seed = request["config"]["seed"]
    return {0: number, 1: f"not {number}", 2: "same"}[seed % 3] if int(number) % 4 else "always this"


def weak_by_seed() -> ScriptedEngine:
    return ScriptedEngine(by_seed, model="scripted/weak")


# Memory


class Numbers(Sequence[dspy.Example]):
    """Examples that are made when they are asked for."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if index >= self._count:
            raise IndexError(index)
        row = {"id": f"q{index}", "question": f"Question number {index}?", "answer": str(index), "long": "x" * 2000}
        return dspy.Example(**row).with_inputs("question")


class Forgetful(ScriptedEngine):
    """A scripted engine that does not keep what it was asked."""

    def complete(self, request: Any) -> Any:
        response = super().complete(request)
        self.asked.clear()
        return response


def test_memory_does_not_grow_with_the_number_of_traces(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        weak, strong = Forgetful(by_seed, model="scripted/weak"), Forgetful(lambda r: "yes", model="scripted/strong")
        with Store(tmp_path / str(count)) as store:
            tracemalloc.start()
            traces = collect(together(weak, strong), Numbers(count), match, Sampling(drafts=2), store=store, threads=2)
            assert sum(1 for _ in traces) == 2 * count
            found = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        return found

    peak(20)  # what is loaded once
    few, many = peak(150), peak(600)
    # The longer run has 900 traces of more than 2,000 characters more, which are 1.8 MB and more.
    assert many < few + 500_000, f"{few:,} bytes for 300 traces, {many:,} for 1,200"


def test_items_ahead_are_bounded_and_given_in_order() -> None:
    started: list[int] = []
    with ThreadPoolExecutor(4) as pool:
        given_items = in_order(pool, lambda item: started.append(item) or item, range(1000), ahead=8)
        for place, item in enumerate(given_items):
            assert item == place
            assert len(started) <= place + 9


def test_who_stops_early_starts_no_more() -> None:
    started: list[int] = []
    with ThreadPoolExecutor(1) as pool:
        work = in_order(pool, lambda item: started.append(item) or item, range(1000), ahead=8)
        assert isinstance(work, Iterator) and next(work) == 0
        work.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert len(started) < 12


def test_stored_traces_are_a_sequence_that_can_be_read_again_and_after_the_store_is_closed(tmp_path: Path) -> None:
    def made(store: Store | None) -> Sequence[Trace]:
        return collect(together(weak_by_seed(), strong_that_reads()), questions(5), match, Sampling(drafts=3), store=store)

    held = made(None)
    with Store(tmp_path) as store:
        stored = made(store)
        assert [key for key, _ in store.each("trace", chunk=2)] == [trace.key for trace in held]
        assert store.count("trace", start="1/q3/") == 3
    assert isinstance(held, HeldTraces) and isinstance(stored, StoredTraces)
    assert stored == held and list(stored) == list(stored) == held and len(stored) == 15
    assert stored[0] == held[0] and stored[-1] == held[-1] and stored[3:9:2] == held[3:9:2] and stored[::-1] == held[::-1]
    for index in (15, -16):
        with pytest.raises(IndexError, match="there are 15"):
            stored[index]
    assert stored != held[:-1] and influence_report(iter(stored)) == influence_report(held)


def test_a_collection_replaces_the_traces_of_its_round_and_no_others(tmp_path: Path) -> None:
    program = together(weak_by_seed(), strong_that_reads())
    with Store(tmp_path) as store:
        first = collect(program, questions(4), match, Sampling(drafts=2), store=store)
        assert len(first) == 8
        second = collect(program, questions(3), match, Sampling(drafts=2, round=2), store=store)
        again = collect(program, questions(1), match, Sampling(drafts=2), store=store)
        assert len(again) == len(first) == 2 and len(second) == 6 and len(StoredTraces(store)) == 8


# Overlap


def test_a_draft_is_refined_before_the_next_one_is_there() -> None:
    refined = threading.Event()

    def weak(request: dict[str, Any]) -> str:
        if request["config"]["seed"] == Sampling().seed_of("q0", 0):
            return "first"
        assert refined.wait(20), "the first draft is not refined while the second is sampled"
        return "second"

    def strong(request: dict[str, Any]) -> str:
        if "first" in request["messages"][-1]["content"]:
            refined.set()
        return "yes"

    engines = ScriptedEngine(weak, model="scripted/weak"), ScriptedEngine(strong, model="scripted/strong")
    assert [trace.draft for trace in collect(together(*engines), questions(1), match, Sampling(drafts=2))] == ["first", "second"]


def test_no_more_than_so_many_threads_ask_the_strong_model() -> None:
    lock, under_way, most = threading.Lock(), 0, 0
    pause = threading.Event()

    def strong(request: dict[str, Any]) -> str:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        pause.wait(0.005)
        with lock:
            under_way -= 1
        return "yes"

    collect(together(weak_by_seed(), ScriptedEngine(strong)), questions(12), match, Sampling(drafts=4), threads=3)
    assert most == 3


def test_what_is_asked_is_what_a_copied_program_asked_before(tmp_path: Path) -> None:
    """The content of a call decides under which key its answer is kept: earlier runs must go on to be found."""
    weak = weak_by_seed()
    rules = Sampling(drafts=2, temperature=1, top_p=0.9)
    program = together(weak, strong_that_reads())
    collect(program, questions(1), match, rules, threads=1, weak_threads=1)
    for index, asked in enumerate(list(weak.asked)):
        copied = program.deepcopy()
        copied.draft.set_lm(program.weak.copy(temperature=1, top_p=0.9, seed=rules.seed_of("q0", index)))
        copied.drafted(question="Question number 0?")
        assert weak.asked[-1] == asked and list(weak.asked[-1]["config"]) == list(asked["config"])


# Adaptive


def adaptive(seed: int, drafts: int = 6) -> Sampling:
    return Sampling(drafts=drafts, seed=seed, adaptive=True)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 7))
def test_an_adaptive_run_is_a_prefix_of_the_full_run_and_finds_a_pair_wherever_it_stopped_for_one(seed: int, drafts: int) -> None:
    def run(sampling: Sampling) -> Sequence[Trace]:
        return collect(together(weak_by_seed(), strong_that_reads()), questions(6), match, sampling, threads=2)

    full, short = run(Sampling(drafts=drafts, seed=seed)), run(adaptive(seed, drafts))
    paired = {pair.example_id for pair in preference_pairs(short)}
    for example in {trace.example_id for trace in full}:
        whole = [trace for trace in full if trace.example_id == example]
        part = [trace for trace in short if trace.example_id == example]
        assert part == whole[: len(part)] and len(part) >= 2
        assert not any(enough(part[:some], adaptive(seed, drafts)) for some in range(2, len(part))), "it stops as soon as it can"
        alike = len({trace.influence for trace in part}) == 1
        assert len(part) == drafts or example in paired or (alike and chance_of_another(len(part), drafts - len(part)) < HOPELESS)


@pytest.mark.parametrize("answers", [1, 3])
@pytest.mark.parametrize("stop", [False, True])
def test_strong_calls_are_all_of_them_less_what_is_said_to_be_saved(tmp_path: Path, stop: bool, answers: int) -> None:
    weak, strong = weak_by_seed(), strong_that_reads()
    program = Collaboration("question -> answer").bind(weak=weak.lm(), strong=strong.lm(temperature=0.7))
    with Store(tmp_path) as store:
        rules = Sampling(drafts=8, adaptive=stop)
        traces = collect(program, questions(8), match, rules, store=store, answers=answers)
        saved = StoredTraces(store).saved
    assert traces.saved == saved and (saved["weak_calls"] > 0) == stop and saved["strong_calls"] > 0
    assert len(weak.asked) == 8 * 8 - saved["weak_calls"] == len(traces)
    assert len(strong.asked) == 8 * (8 + 1) * answers - saved["strong_calls"]
    texts = {(trace.example_id, trace.draft) for trace in traces}
    assert len(strong.asked) == (8 + len(texts)) * answers, "equal drafts are refined once"


def test_law_4_with_different_drafts_the_cost_is_n_times_drafts_and_one_more() -> None:
    strong = strong_that_reads()
    weak = ScriptedEngine(lambda request: f"draft {request['config']['seed']}")
    traces = collect(together(weak, strong), questions(5), match, Sampling(drafts=3))
    assert len(strong.asked) == 5 * (3 + 1) and traces.saved == {"weak_calls": 0, "strong_calls": 0}


def test_an_example_whose_alone_failed_is_not_sampled_to_the_end() -> None:
    def strong(request: dict[str, Any]) -> str | Exception:
        return "yes" if "Background" in request["messages"][-1]["content"] else ServerError("down")

    weak = weak_by_seed()
    traces = collect(together(weak, ScriptedEngine(strong)), questions(1), match, adaptive(0))
    assert len(traces) == len(weak.asked) == 2
    assert all(trace.error and trace.error.startswith("alone server:") for trace in traces)


def test_the_chance_of_another_influence_is_laplaces_rule_of_succession() -> None:
    """Against the product that it abbreviates: each further draw is alike with probability (k + 1) / (k + 2)."""
    for same in range(1, 9):
        alike = 1.0
        for left in range(1, 9):
            alike *= (same + left) / (same + left + 1)
            assert chance_of_another(same, left) == pytest.approx(1 - alike)


@pytest.mark.parametrize(
    ("influences", "texts", "drafts", "stops"),
    [
        ([1.0, 0.0], "ab", 4, True),  # a pair
        ([0.0, -1.0], "ab", 4, True),  # chosen did not hurt
        ([1.0, 0.0], "aa", 4, False),  # one text twice
        ([1.0, 0.75], "ab", 4, False),  # below the margin
        ([-0.5, -1.0], "ab", 4, False),  # the best hurt
        ([0.0, 0.0], "ab", 4, False),  # 2 alike, 2 left: 0.4
        ([0.0, 0.0, 0.0], "abc", 4, True),  # 3 alike, 1 left: 0.2
        ([None, None], "ab", 4, False),  # failures say nothing
        ([0.0, None, 0.0], "abc", 4, False),  # 2 alike, 1 left: 0.25, which is not below
        ([None, None], "ab", 2, True),  # none left
    ],
)
def test_when_there_are_enough_drafts(influences: list[float | None], texts: str, drafts: int, stops: bool) -> None:
    made = [made_trace(index, value, text) for index, (value, text) in enumerate(zip(influences, texts, strict=True))]
    assert enough(made, Sampling(drafts=drafts, adaptive=True)) is stops


# Several answers


def test_scores_of_several_answers_are_averaged_and_asking_for_more_asks_only_for_the_rest(tmp_path: Path) -> None:
    def strong(request: dict[str, Any]) -> str:
        number = request["messages"][-1]["content"].splitlines()[0].split()[-1].rstrip("?")
        return number if request["config"].get("seed", 0) % 2 else "no"

    counted = []
    for answers in (1, 4):
        engine = ScriptedEngine(strong, model="scripted/strong")
        weak = ScriptedEngine({"": "a draft"}, model="scripted/weak")
        program = Collaboration("question -> answer").bind(weak=weak.lm(), strong=engine.lm(temperature=1.0))
        with Store(tmp_path) as store:
            traces = list(collect(program, questions(6), match, Sampling(drafts=2), store=store, answers=answers))
        counted.append(len(engine.asked))
    assert counted == [6 * 2, 6 * 2 * 3]
    for trace in traces:
        assert len(trace.refined_scores) == len(trace.alone_scores) == 4 and trace.refined_scores[0] == 0.0
        assert trace.refined_score == sum(trace.refined_scores) / 4
    assert len({trace.refined_score for trace in traces}) > 1, "seeds differ between examples"


def test_one_answer_of_several_that_failed_fails_the_whole() -> None:
    def strong(request: dict[str, Any]) -> str | Exception:
        alone = "Background" not in request["messages"][-1]["content"]
        return "0" if alone or "seed" in request["config"] else ServerError("down")

    program = Collaboration("question -> answer").bind(
        weak=ScriptedEngine({"": "a draft"}).lm(), strong=ScriptedEngine(strong).lm(temperature=1.0)
    )
    (trace,) = collect(program, questions(1), match, Sampling(drafts=1), answers=3)
    assert trace.alone_scores == (1.0, 1.0, 1.0) and trace.refined_scores == () and trace.refined_score is None
    assert trace.error is not None and trace.error.startswith("server:") and trace.influence is None


def test_several_answers_of_a_model_that_does_not_sample_are_refused() -> None:
    with pytest.raises(CollectionError, match=r"does not sample .* \[collect\] answers = 1"):
        collect(together(weak_by_seed(), strong_that_reads()), questions(1), match, answers=2)


# Drafts on their own, feedback, cost


@pytest.mark.parametrize(
    ("form", "draft", "score"),
    [("direct", "0", 1.0), ("direct", "7", 0.0), ("chain_of_thought", "Reasoning: none\nAnswer: 0", 1.0), ("knowledge", "0", None)],
)
def test_a_draft_with_the_answers_fields_is_scored_as_an_answer(form: DraftFormat, draft: str, score: float | None) -> None:
    weak, strong = ScriptedEngine({"": draft}), ScriptedEngine({"": "no"}, model="scripted/strong")
    program = Collaboration("question -> answer", draft=form).bind(weak=weak.lm(), strong=strong.lm())
    (trace,) = collect(program, questions(1), match, Sampling(drafts=1))
    assert trace.draft_score == score and trace.influence == 0.0


def test_a_draft_metric_scores_drafts_of_any_format() -> None:
    def long(example: dspy.Example, prediction: Any, trace: Any = None) -> float:
        assert prediction.draft == prediction.background
        return min(len(prediction.draft) / 10, 1.0)

    program = together(ScriptedEngine({"": "12345"}), strong_that_reads())
    (trace,) = collect(program, questions(1), match, Sampling(drafts=1), draft_metric=long)
    assert trace.draft_score == 0.5


def test_a_trace_has_the_metrics_words_and_what_its_calls_cost(tmp_path: Path) -> None:
    class Priced(ScriptedEngine):
        def complete(self, request: Any) -> Any:
            return wire.priced(super().complete(request), 0.25)

    class Unpriced(ScriptedEngine):
        def complete(self, request: Any) -> Any:
            return wire.priced(super().complete(request), None)

    def metric(example: dspy.Example, prediction: Any, trace: Any = None) -> dspy.Prediction:
        return dspy.Prediction(score=0.5, feedback=f"said {prediction.answer}")

    for kind, usd in ((Priced, 0.5), (Unpriced, None)):
        for _ in range(2):  # asked, and from the store
            program = together(ScriptedEngine({"": "a"}), kind({"": "b"}, model=f"scripted/{kind.__name__}"))
            program = program.bind(weak=Priced({"": "a"}, model="scripted/weak").lm())
            with Store(tmp_path) as store:
                (trace,) = collect(program, questions(1), metric, Sampling(drafts=1), store=store)
            assert (trace.feedback, trace.usd) == ("said b", usd)


# Failures


def test_a_metric_that_fails_is_a_trace_with_an_error_and_a_bug_in_it_is_raised() -> None:
    judge = ScriptedEngine(lambda request: ServerError("down"), model="scripted/judge").lm()

    def metric(example: dspy.Example, prediction: Any, trace: Any = None) -> float:
        return float(judge("How good?")[0])

    traces = collect(together(weak_by_seed(), strong_that_reads()), questions(2), metric, Sampling(drafts=2))
    assert all(trace.error and trace.error.startswith("judge server:") and trace.influence is None for trace in traces)

    def bug(example: dspy.Example, prediction: Any, trace: Any = None) -> float:
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        collect(together(weak_by_seed(), strong_that_reads()), questions(50), bug, Sampling(drafts=2))


def test_a_bug_in_one_example_stops_the_others() -> None:
    strong = strong_that_reads()

    def metric(example: dspy.Example, prediction: Any, trace: Any = None) -> float:
        return 7.0 if example.id == "q0" else 0.0

    with pytest.raises(DataError, match="between 0 and 1"):
        collect(together(weak_by_seed(), strong), questions(200), metric, Sampling(drafts=4), threads=2)
    assert len(strong.asked) < 100


@pytest.mark.parametrize("empty", ["", "   \n"])
def test_an_empty_answer_is_a_parse_failure(empty: str) -> None:
    strong = ScriptedEngine(lambda request: empty, model="scripted/strong")
    (trace,) = collect(together(ScriptedEngine({"": "a"}), strong), questions(1), match, Sampling(drafts=1))
    assert trace.error is not None and trace.error.startswith("parse:") and trace.refined_score is None


@pytest.mark.parametrize("body", [completion("No.", "content_filter"), completion("", "content_filter")])
def test_an_answer_that_a_providers_filter_ended_is_a_refusal(body: Any) -> None:
    with local_server({CHAT: lambda asked: body}) as server:
        engine = ServerEngine(Server.model_validate({"kind": "server", "model": "m", "api_base": f"{server.url}/v1"}))
        program = Collaboration("question -> answer").bind(weak=ScriptedEngine({"": "a"}).lm(), strong=engine.lm())
        (trace,) = collect(program, questions(1), match, Sampling(drafts=1))
    assert trace.error is not None and trace.error.startswith("refusal:") and trace.refined_score is None


def test_a_model_that_refuses_in_openais_words_is_a_refusal() -> None:
    body = completion("")
    body.body["choices"][0]["message"] |= {"content": None, "refusal": "I cannot help with that."}
    with local_server({CHAT: lambda asked: body}) as server:
        engine = ServerEngine(Server.model_validate({"kind": "server", "model": "m", "api_base": f"{server.url}/v1"}))
        program = Collaboration("question -> answer").bind(weak=engine.lm(), strong=ScriptedEngine({"": "a"}).lm())
        made = attempt(lambda: dspy.Prediction(draft=program.drafted(question="?")))
    assert made.error is not None and made.error.startswith("refusal:")
    refused = Response(None, "m", Message("assistant", (RefusalPart("No."),)), "stop", Usage())
    assert wire.response_to_dict(refused)["finish_reason"] == "content_filter"


def test_a_collection_stops_early_when_too_many_fail_and_keeps_what_there_is(tmp_path: Path) -> None:
    def weak(request: dict[str, Any]) -> str | Exception:
        number = int(request["messages"][-1]["content"].split()[-1].rstrip("?"))
        return ServerError("down") if number % 2 else "fine"

    strong = strong_that_reads()
    with Store(tmp_path) as store:
        with pytest.raises(CollectionError, match=r"10 of 20 drafts failed \(\{'server': 10\}\).*The first: server"):
            collect(together(ScriptedEngine(weak), strong), questions(500), match, Sampling(drafts=2), store=store, max_failed=0.4)
        assert store.count("trace") == 20 and store.calls() > 20
    assert len(strong.asked) < 200, "what was not under way was not asked"


def faults(seed: int) -> list[Fault | None]:
    """What goes wrong with 30 % of the first 500 requests."""
    rng = random.Random(seed)
    kinds = (Fault.status(429), Fault.status(500), Fault.reset(), Fault.truncated(), Fault.garbled(), Fault.slow(1.0))
    return [rng.choice(kinds) if rng.random() < 0.3 else None for _ in range(500)]


def test_injected_faults_become_errors_and_a_second_run_without_them_completes_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COWEST_TEST_KEY", "any")
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "true")  # DSPy's table of prices as it ships: no network

    def strong(request: dict[str, Any]) -> str:
        return str(strong_that_reads().script(request))  # pyright: ignore[reportCallIssue]

    def run(folder: str, wrong: list[Fault | None]) -> tuple[list[Trace], list[Any]]:
        with OpenAIServer(strong, faults=wrong) as server, Store(tmp_path / folder) as store:
            reach = {"model": f"openai/{server.model}", "api_base": server.api_base, "api_key_env": "COWEST_TEST_KEY"}
            engine = ApiEngine(Api.model_validate({"kind": "api", **reach, "num_retries": 0, "timeout": 0.4}))
            program = Collaboration("question -> answer").bind(weak=weak_by_seed().lm(), strong=engine.lm())
            traces = collect(program, questions(25), match, Sampling(drafts=4), store=store, threads=6)
            return list(traces), [one for one in server.received if one.fault is None]

    broken, answered = run("faulty", faults(seed=5))
    kinds = Counter((trace.error or "").partition(":")[0].removeprefix("alone ") for trace in broken)
    assert {"timeout", "rate limit", "server", "transport"} <= set(kinds)
    assert kinds[""] < len(broken) / 1.4, "30 % of the calls failed"
    for trace in broken:
        assert (trace.influence is None) == (trace.error is not None)
        if trace.error and not trace.error.startswith("alone"):
            assert trace.refined_score is None
    failed = {trace.key for trace in broken if trace.error}
    used = {trace.key for trace in broken if trace.influence is not None}
    assert failed | used == {trace.key for trace in broken} and influence_report(broken).failed == len(failed)

    resumed, asked_again = run("faulty", [])
    clean, asked_once = run("clean", [])
    assert resumed == clean and not any(trace.error for trace in clean)
    assert len(answered) + len(asked_again) == len(asked_once), "no answered call is asked again"


# The store under load


def test_answers_committed_together_are_all_there_and_no_lock_is_left(tmp_path: Path) -> None:
    weak = ScriptedEngine(lambda request: f"draft {request['config']['seed']}", model="scripted/weak")
    strong = strong_that_reads()
    with Store(tmp_path) as store, store.spending("collect") as spent:
        collect(together(weak, strong), questions(40), match, Sampling(drafts=4), store=store, threads=16)
        asked = len(weak.asked) + len(strong.asked)
        assert store.calls() == spent.calls == asked == 40 * (4 + 4 + 1)
        assert store._asking == {} and store._queue == []
    with Store(tmp_path) as store:
        collect(together(weak, strong), questions(40), match, Sampling(drafts=4), store=store, threads=16)
    assert len(weak.asked) + len(strong.asked) == asked


def test_an_answer_that_cannot_be_committed_is_not_used(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store._db.execute("CREATE TRIGGER full BEFORE INSERT ON calls BEGIN SELECT RAISE(ABORT, 'disk full'); END")
        with pytest.raises(StoreError, match=r"could not be written .*disk full"):
            collect(together(weak_by_seed(), strong_that_reads()), questions(5), match, Sampling(drafts=2), store=store)
        assert store.calls() == 0 and store.spent.calls == 0
