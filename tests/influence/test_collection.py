"""Collecting traces: memory that stays flat, steps that overlap, several answers, drafts that are
scored too."""

from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.lm15 import ServerError
from scripted import match, questions, strong_that_reads, together
from scripted_weak import by_seed, weak_by_seed

from cowest_dspy.errors import CollectionError
from cowest_dspy.influence.collection import collect
from cowest_dspy.influence.report import InfluenceReport
from cowest_dspy.influence.trace import Sampling, Trace, Traces
from cowest_dspy.program.collaboration import Collaboration, DraftFormat
from cowest_dspy.store import serialize
from cowest_dspy.store.pool import results_in_order
from cowest_dspy.store.store import Store
from cowest_dspy.testing import ScriptedEngine

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
        row = {
            "id": f"q{index}",
            "question": f"Question number {index}?",
            "answer": str(index),
            "long": "x" * 2000,
        }
        return dspy.Example(**row).with_inputs("question")


class Forgetful(ScriptedEngine):
    """A scripted engine that does not keep what it was asked."""

    def complete(self, request: Any) -> Any:
        response = super().complete(request)
        self.asked.clear()
        return response


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_traces(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        weak, strong = (
            Forgetful(by_seed, model="scripted/weak"),
            Forgetful(lambda r: "yes", model="scripted/strong"),
        )
        with Store(tmp_path / str(count)) as store:
            tracemalloc.start()
            traces = collect(
                together(weak, strong),
                Numbers(count),
                match,
                Sampling(drafts=2),
                store=store,
                num_threads=2,
            )
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
        results = results_in_order(
            lambda item: pool.submit(lambda: started.append(item) or item), range(1000), ahead=8
        )
        for place, item in enumerate(results):
            assert item == place
            assert len(started) <= place + 9


def test_who_stops_early_starts_no_more() -> None:
    started: list[int] = []
    with ThreadPoolExecutor(1) as pool:
        work = results_in_order(
            lambda item: pool.submit(lambda: started.append(item) or item), range(1000), ahead=8
        )
        assert isinstance(work, Iterator) and next(work) == 0
        work.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert len(started) < 12


def test_stored_traces_are_a_sequence_that_can_be_read_again_and_after_the_store_is_closed(
    tmp_path: Path,
) -> None:
    def made(store: Store | None) -> Sequence[Trace]:
        return collect(
            together(weak_by_seed(), strong_that_reads()),
            questions(5),
            match,
            Sampling(drafts=3),
            store=store,
        )

    held = made(None)
    with Store(tmp_path) as store:
        stored = made(store)
        assert [key for key, _ in store.each("trace", chunk=2)] == [trace.key for trace in held]
        assert store.count("trace", start="1/q3/") == 3
    assert isinstance(held, Traces) and isinstance(stored, Traces)
    assert stored == held and list(stored) == list(stored) == held and len(stored) == 15
    assert (
        stored[0] == held[0]
        and stored[-1] == held[-1]
        and stored[3:9:2] == held[3:9:2]
        and stored[::-1] == held[::-1]
    )
    for index in (15, -16):
        with pytest.raises(IndexError, match="there are 15"):
            stored[index]
    assert stored != held[:-1] and InfluenceReport.from_traces(
        iter(stored)
    ) == InfluenceReport.from_traces(held)


def test_a_collection_replaces_the_traces_of_its_round_and_no_others(tmp_path: Path) -> None:
    program = together(weak_by_seed(), strong_that_reads())
    with Store(tmp_path) as store:
        first = collect(program, questions(4), match, Sampling(drafts=2), store=store)
        assert len(first) == 8
        second = collect(program, questions(3), match, Sampling(drafts=2, round=2), store=store)
        again = collect(program, questions(1), match, Sampling(drafts=2), store=store)
        assert len(again) == len(first) == 2 and len(second) == 6 and len(Traces.load(store)) == 8


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

    engines = (
        ScriptedEngine(weak, model="scripted/weak"),
        ScriptedEngine(strong, model="scripted/strong"),
    )
    assert [
        trace.draft
        for trace in collect(together(*engines), questions(1), match, Sampling(drafts=2))
    ] == ["first", "second"]


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

    collect(
        together(weak_by_seed(), ScriptedEngine(strong)),
        questions(12),
        match,
        Sampling(drafts=4),
        num_threads=3,
    )
    assert most == 3


def test_what_is_asked_is_what_a_copied_program_asked_before(tmp_path: Path) -> None:
    """The content of a call decides under which key its answer is kept: earlier runs must go on to
    be found."""
    weak = weak_by_seed()
    rules = Sampling(drafts=2, temperature=1, top_p=0.9)
    program = together(weak, strong_that_reads())
    collect(program, questions(1), match, rules, num_threads=1, weak_threads=1)
    for index, asked in enumerate(list(weak.asked)):
        copied = program.deepcopy()
        copied.draft.set_lm(
            program.weak.copy(temperature=1, top_p=0.9, seed=rules.seed_of("q0", index))
        )
        copied.ask_draft(question="Question number 0?")
        assert weak.asked[-1] == asked and list(weak.asked[-1]["config"]) == list(asked["config"])


# Several answers


def test_scores_of_several_answers_are_averaged_and_asking_for_more_asks_only_for_the_rest(
    tmp_path: Path,
) -> None:
    def strong(request: dict[str, Any]) -> str:
        number = request["messages"][-1]["content"].splitlines()[0].split()[-1].rstrip("?")
        return number if request["config"].get("seed", 0) % 2 else "no"

    counted = []
    for answers in (1, 4):
        engine = ScriptedEngine(strong, model="scripted/strong")
        weak = ScriptedEngine({"": "a draft"}, model="scripted/weak")
        program = Collaboration("question -> answer").bind(
            weak=weak.lm(), strong=engine.lm(temperature=1.0)
        )
        with Store(tmp_path) as store:
            traces = list(
                collect(
                    program, questions(6), match, Sampling(drafts=2), store=store, answers=answers
                )
            )
        counted.append(len(engine.asked))
    assert counted == [6 * 2, 6 * 2 * 3]
    for trace in traces:
        assert (
            len(trace.refined_scores) == len(trace.alone_scores) == 4
            and trace.refined_scores[0] == 0.0
        )
        assert trace.refined_score == sum(trace.refined_scores) / 4
    assert len({trace.refined_score for trace in traces}) > 1, "seeds differ between examples"


def test_one_answer_of_several_that_failed_fails_the_whole() -> None:
    def strong(request: dict[str, Any]) -> str | Exception:
        alone = "Background" not in request["messages"][-1]["content"]
        return "0" if alone or "seed" in request["config"] else ServerError("down")

    program = Collaboration("question -> answer").bind(
        weak=ScriptedEngine({"": "a draft"}).lm(), strong=ScriptedEngine(strong).lm(temperature=1.0)
    )
    (trace,) = collect(program, questions(1), match, Sampling(drafts=1), answers=3, max_errors=1.0)
    assert (
        trace.alone_scores == (1.0, 1.0, 1.0)
        and trace.refined_scores == ()
        and trace.refined_score is None
    )
    assert (
        trace.error is not None
        and trace.error.startswith("refine server:")
        and trace.influence is None
    )


def test_several_answers_of_a_model_that_does_not_sample_are_refused() -> None:
    with pytest.raises(CollectionError, match=r"does not sample .* answers = 1"):
        collect(together(weak_by_seed(), strong_that_reads()), questions(1), match, answers=2)


# Drafts on their own, feedback, cost


@pytest.mark.parametrize(
    ("form", "draft", "score"),
    [
        ("direct", "0", 1.0),
        ("direct", "7", 0.0),
        ("chain_of_thought", "Reasoning: none\nAnswer: 0", 1.0),
        ("knowledge", "0", None),
    ],
)
def test_a_draft_with_the_answers_fields_is_scored_as_an_answer(
    form: DraftFormat, draft: str, score: float | None
) -> None:
    weak, strong = ScriptedEngine({"": draft}), ScriptedEngine({"": "no"}, model="scripted/strong")
    program = Collaboration("question -> answer", draft=form).bind(
        weak=weak.lm(), strong=strong.lm()
    )
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
            return serialize.with_price(super().complete(request), 0.25)

    class Unpriced(ScriptedEngine):
        def complete(self, request: Any) -> Any:
            return serialize.with_price(super().complete(request), None)

    def metric(example: dspy.Example, prediction: Any, trace: Any = None) -> dspy.Prediction:
        return dspy.Prediction(score=0.5, feedback=f"said {prediction.answer}")

    for kind, usd in ((Priced, 0.5), (Unpriced, None)):
        for _ in range(2):  # asked, and from the store
            program = together(
                ScriptedEngine({"": "a"}), kind({"": "b"}, model=f"scripted/{kind.__name__}")
            )
            program = program.bind(weak=Priced({"": "a"}, model="scripted/weak").lm())
            with Store(tmp_path) as store:
                (trace,) = collect(program, questions(1), metric, Sampling(drafts=1), store=store)
            assert (trace.feedback, trace.usd) == ("said b", usd)
