"""Several samples of one model: the vote of self-consistency, and a weak model's answer with its
confidence."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import dspy
import pytest
from baseline_parts import TASK, collaboration, refiner
from dspy.lm15 import ServerError
from dspy.utils.exceptions import AdapterParseError, LMError
from scripted import match, questions

from cowest_dspy import Collaboration, Store
from cowest_dspy.errors import ProgramError
from cowest_dspy.influence.collection import collect
from cowest_dspy.influence.metric import attempt
from cowest_dspy.influence.trace import Sampling
from cowest_dspy.lms import LocalEngine
from cowest_dspy.program import Confident, SelfConsistency, chain_of_thought, super_icl
from cowest_dspy.program.voting import normalise
from cowest_dspy.store.call_context import keeping, sampling
from cowest_dspy.testing import ScriptedEngine


def in_turn(*answers: str | Exception) -> ScriptedEngine:
    """Gives the sample of rollout 0, 1, ... each its answer; a call that is no sample is an
    error."""

    def answer(request: dict[str, Any]) -> Any:
        return answers[request["config"]["seed"] % 1000]

    return ScriptedEngine(answer, model="scripted/strong")


# Votes


def test_the_largest_group_wins_and_a_tie_goes_to_the_first() -> None:
    def vote(*answers: str | Exception, **settings: Any) -> tuple[Any, ...]:
        made = SelfConsistency(collaboration(in_turn(*answers)), samples=len(answers), **settings)(
            question="What?"
        )
        assert list(made.keys()) == ["agreement", "failed_samples", "answer"]
        return made.answer, made.agreement, made.failed_samples

    assert vote("a", "b", "B.", "c") == ("b", 0.5, 0), "the first of its group is the answer"
    assert vote("a", "b", "b", "a") == ("a", 0.5, 0)
    assert vote("b", "a", "c") == ("b", 1 / 3, 0)
    assert vote("one") == ("one", 1.0, 0)
    assert vote("12 bar", "13 bar", "13 litres", key=lambda prediction: prediction.answer[:2]) == (
        "13 bar",
        2 / 3,
        0,
    )
    assert vote(ServerError("down"), "a", "", "b", "b") == ("b", 0.4, 2), (
        "failed samples are left out"
    )
    assert vote("a", "b...", "b...", "c") == ("a", 0.25, 2), "what was cut off is left out"
    assert (
        normalise("  (B). ") == normalise("b") == "b"
        and normalise("?") == "?"
        and normalise(4.5) == "4.5"
    )
    assert normalise("The  Orvane\npress!") == "the orvane press" and normalise("-5") != normalise(
        "5"
    )


def test_the_vote_is_on_the_answer_and_not_on_the_reasoning() -> None:
    engine = in_turn(
        "Reasoning: one\nAnswer: x", "Reasoning: two\nAnswer: y", "Reasoning: three\nAnswer: Y"
    )
    made = SelfConsistency(chain_of_thought(collaboration(engine)), samples=3)(question="What?")
    assert (made.reasoning, made.answer) == ("two", "y")


def test_if_all_fail_the_first_error_is_raised() -> None:
    failing = SelfConsistency(collaboration(in_turn("", ServerError("down"))), samples=2)
    with pytest.raises(AdapterParseError):
        failing(question="What?")
    with pytest.raises(LMError, match="down"):
        SelfConsistency(collaboration(in_turn(ServerError("down"), "")), samples=2)(
            question="What?"
        )
    cut = attempt(
        lambda: SelfConsistency(collaboration(in_turn("a...", "b...")), samples=2)(question="What?")
    )
    assert (cut.error or "").startswith("truncated") and len(cut.calls) == 2
    with pytest.raises(KeyError, match="bug"):  # a bug of the program is no failed sample
        SelfConsistency(collaboration(in_turn("a")), samples=1, key=lambda prediction: {}["bug"])(
            question="What?"
        )


def test_a_failed_sample_does_not_fail_the_answer_and_every_call_is_told() -> None:
    module = SelfConsistency(collaboration(in_turn("a...", "b", "b")), samples=3)
    made = attempt(lambda: module(question="What?"))
    assert made.error is None and made.outputs == {
        "agreement": 2 / 3,
        "failed_samples": 1,
        "answer": "b",
    }
    assert [(call.text, call.left_out) for call in made.calls] == [
        ("a...", True),
        ("b", False),
        ("b", False),
    ]


def test_each_sample_has_its_own_seed_and_none_is_served_for_another(tmp_path: Path) -> None:
    engine = ScriptedEngine(lambda request: str(request["config"]["seed"]))
    program = collaboration(engine)
    program.alone.module.predictors()[0].config = {"temperature": 0.0, "seed": 7}
    module = SelfConsistency(program, samples=3, temperature=0.9)
    with Store(tmp_path / "run") as store, keeping(store):
        assert module(question="What?").agreement == 1 / 3
        assert [request["config"]["temperature"] for request in engine.asked] == [0.9] * 3
        assert len({request["config"]["seed"] for request in engine.asked}) == 3
        assert module(question="What?").agreement == 1 / 3
        assert len(engine.asked) == 3, "a store answers each sample as it was"
    with sampling(seed=11):
        inside = [
            module(question="What?").agreement,
            len({request["config"]["seed"] for request in engine.asked[3:]}),
        ]
    with sampling(seed=12):
        module(question="What?")
    assert inside == [1 / 3, 3], "samples differ inside of a sampled draft"
    assert len({request["config"]["seed"] for request in engine.asked}) == 9, (
        "and differ from those of another draft"
    )
    unbound = SelfConsistency("question -> answer", samples=2)
    with dspy.context(lm=engine.lm()):
        assert unbound(question="What?").agreement == 0.5, "an LM that was never bound too"


def test_samples_of_a_real_engine_differ_and_come_again(tiny_model: Path) -> None:
    lm = LocalEngine(tiny_model, dtype="float32").lm(temperature=0.0, max_tokens=6)

    def texts() -> list[str]:
        made = attempt(
            lambda: SelfConsistency("question -> answer", samples=4, temperature=1.5)(
                question="What?"
            )
        )
        return [call.text for call in made.calls]

    with dspy.context(lm=lm):
        assert len(set(texts())) > 1
        assert texts() == texts()


def test_an_lm_with_a_cache_of_its_own_keeps_samples_apart(tmp_path: Path) -> None:
    class Seedless(ScriptedEngine):
        supported_params = frozenset({"max_tokens", "temperature"})

    count = threading.local()

    def answer(request: dict[str, Any]) -> str:
        count.value = getattr(count, "value", 0) + 1
        return str(count.value)

    lm = dspy.LM(
        "scripted/cached", engine=Seedless(answer), cache=True, temperature=0.0, max_tokens=5
    )
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=True)
    program = Collaboration("question -> answer").bind(strong=lm, weak=lm)
    assert SelfConsistency(program, samples=3)(question="What?").agreement == 1 / 3
    assert SelfConsistency(program, samples=3)(question="What?").answer == "1", (
        "and gives each again"
    )
    assert count.value == 3


def test_a_sampler_around_a_vote_gets_other_samples() -> None:
    engine = ScriptedEngine(lambda request: str(request["config"]["seed"]))
    module = SelfConsistency(collaboration(engine), samples=2)
    best = dspy.BestOfN(module, N=3, reward_fn=lambda _, prediction: 0.0, threshold=1.0)
    best(question="What?")
    assert [request["config"]["seed"] for request in engine.asked] == [0, 1, 2, 3, 4, 5]


def test_an_optimiser_gets_demos_from_the_sample_that_won() -> None:
    engine = in_turn("w", "0", "0")
    module = SelfConsistency(collaboration(engine), samples=3)
    with dspy.context(trace=[]):
        module(question="What?")
        assert [(step[0] is module.module, step[2].answer) for step in dspy.settings.trace] == [
            (True, "0")
        ]
    optimiser = dspy.BootstrapFewShot(metric=match, max_bootstrapped_demos=1, max_labeled_demos=0)
    made = optimiser.compile(module, trainset=questions(1))
    demos = made.module.demos
    assert [(demo.question, demo.answer) for demo in demos] == [("Question number 0?", "0")]


@pytest.mark.parametrize("settings", [{"samples": 0}, {"temperature": 0.0}, {"temperature": 2.5}])
def test_what_a_vote_refuses(settings: dict[str, Any]) -> None:
    for kind in (SelfConsistency, Confident):
        with pytest.raises(ProgramError, match=f"{kind.__name__}: samples is"):
            kind("question -> answer", **settings)


# A weak model's answer with its confidence


def weak_that_is_not_sure() -> ScriptedEngine:
    """Gives the number of the question in four of five samples, and fails on question 3."""

    def answer(request: dict[str, Any]) -> Any:
        number = request["messages"][-1]["content"].split()[-1].rstrip("?")
        return (
            ServerError("down")
            if number == "3"
            else "no"
            if request["config"]["seed"] == 1
            else number
        )

    return ScriptedEngine(answer, model="scripted/weak")


def test_super_icl_shows_the_weak_answers_and_their_confidence(tmp_path: Path) -> None:
    weak, strong = weak_that_is_not_sure(), ScriptedEngine(lambda request: "final")
    base = collaboration(
        strong, weak, demos=[dspy.Example(question="Old?", background="b", answer="o")]
    )
    program = super_icl(base, questions(5), samples=5)
    assert len(weak.asked) == 25 and not strong.asked
    assert all(
        request["messages"][0]["content"] == TASK and len(request["messages"]) == 2
        for request in weak.asked
    )
    answer = program(question="Question number 9?")
    assert (answer.answer, answer.draft) == ("final", "9 (confidence 0.80)")
    shown = [message["content"] for message in strong.asked[0]["messages"][1:]]
    assert shown[:2] == ["Question: Question number 0?\nBackground: 0 (confidence 0.80)", "0"]
    assert shown[-1] == "Question: Question number 9?\nBackground: 9 (confidence 0.80)"
    assert len(shown) == 2 * 4 + 1 and "number 3" not in str(shown), (
        "where the weak model fails there is no demo"
    )
    program.ask_alone(question="Question number 9?")
    alone = str(strong.asked[1]["messages"])
    assert "Question number 0?" in alone and "confidence" not in alone and "Background" not in alone
    assert program.ask_draft(question="Question number 9?").toDict() == {
        "answer": "9", "confidence": 0.8, "stated_answer": "9 (confidence 0.80)", "draft": ("9 (confidence " "0.80)"),
    }  # fmt: skip
    assert "Old?" in str(base.refine.demos)  # pyright: ignore
    program.save(tmp_path / "program.json")
    other = super_icl(base, questions(1), samples=1)
    other.load(tmp_path / "program.json")
    assert other.refine.demos[2]["background"] == "2 (confidence 0.80)"  # pyright: ignore
    with pytest.raises(LMError, match="down"):
        super_icl(base, questions(4)[3:])
    with pytest.raises(ProgramError, match="not bound"):
        super_icl(Collaboration("question -> answer"), questions(1))


def test_super_icl_on_a_weak_module_of_ones_own_and_in_a_collection() -> None:
    weak, strong = (
        weak_that_is_not_sure(),
        ScriptedEngine(lambda request: "0" if "0 (confidence" in str(request) else "none"),
    )
    own = dspy.Predict(dspy.Signature("question -> label", "Guess."))  # pyright: ignore
    own.set_lm(weak.lm())
    program = super_icl(
        collaboration(strong, weak), [*questions(1), *questions(3)[2:]], own, samples=2
    )
    assert {request["messages"][0]["content"] for request in weak.asked} == {"Guess."}
    traces = list(collect(program, questions(1), match, Sampling(drafts=2)))
    assert [trace.draft for trace in traces] == ["0 (confidence 1.00)"] * 2
    seeds = {request["config"]["seed"] for request in weak.asked[4:]}
    assert len(seeds) == 4, "two drafts of two samples: four different seeds"


def test_a_vote_as_a_drafter_gives_its_answer_and_no_count() -> None:
    weak, strong = in_turn("a", "b", "b"), ScriptedEngine({"Background: b": "done"})
    program = Collaboration(
        draft=SelfConsistency("question -> background", samples=3), refine=refiner()
    )
    program = program.bind(weak=weak.lm(), strong=strong.lm())
    assert program(question="What?").draft == "b"
    direct = Collaboration(
        draft=SelfConsistency("question -> answer", samples=3), refine=refiner()
    ).bind(weak=weak.lm())
    assert direct.ask_draft(question="What?").draft == "b"
