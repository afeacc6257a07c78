"""Influence as the metric of DSPy's own optimisers: each really runs, on scripted models, and alone
stays what it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dspy
import pytest
from scripted import (
    instructions,
    match,
    miprov2,
    proposer,
    questions,
    strong_that_reads,
    together,
    weak_that_obeys,
)

from cowest_dspy import Influence, Store
from cowest_dspy.optimizers.config import StepRules
from cowest_dspy.optimizers.cycle import Tools, build_optimizer
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.store.call_context import keeping
from cowest_dspy.testing import ScriptedEngine


@pytest.fixture
def task() -> tuple[Collaboration, Influence]:
    program = together(weak_that_obeys(), strong_that_reads())
    return program, Influence(match, program)


def test_gepa_is_told_what_the_draft_changed(task: tuple[Collaboration, Influence]) -> None:
    program, influence = task
    seen: list[str] = []
    optimizer = dspy.GEPA(
        metric=influence,
        max_metric_calls=24,
        reflection_lm=proposer(seen),
        reflection_minibatch_size=2,
        num_threads=1,
        component_selector="all",
    )
    better = optimizer.compile(program, trainset=questions(4), valset=questions(4))
    assert isinstance(better, Collaboration)
    assert any("The draft changed the answer but not its score" in text for text in seen)
    assert better(question="Question number 3?").answer == "3"
    assert instructions(better.alone.module) == instructions(program.alone.module)


def test_miprov2_takes_it(task: tuple[Collaboration, Influence]) -> None:
    program, influence = task
    optimizer = miprov2(influence, proposer([]))
    better = optimizer.compile(
        program,
        trainset=questions(4),
        valset=questions(4),
        num_trials=6,
        minibatch=False,
        program_aware_proposer=False,
        data_aware_proposer=False,
        view_data_batch_size=2,
    )
    assert better(question="Question number 3?").answer == "3"
    assert instructions(better.alone.module) == instructions(program.alone.module)


@pytest.mark.parametrize("search", [False, True])
def test_few_shot_optimisers_run_the_program_on_its_own_models(search: bool) -> None:
    weak, strong = weak_that_obeys(every=3), strong_that_reads()
    program = together(weak, strong)
    few: dict[str, Any] = {"max_bootstrapped_demos": 2, "max_labeled_demos": 0}
    optimizer: Any = dspy.BootstrapFewShot(metric=match, **few)
    if search:
        optimizer = dspy.BootstrapFewShotWithRandomSearch(
            metric=match, num_candidate_programs=1, num_threads=1, **few
        )
    better = optimizer.compile(program, trainset=questions(8))
    assert weak.asked and strong.asked
    assert better.draft.predictors()[0].demos[0]["background"].isdigit(), (
        "a draft that led to a right answer"
    )
    assert better(question="Question number 40?").answer == "40"
    assert (better.weak.model, better.strong.model) == (program.weak.model, program.strong.model)
    assert not program.draft.predictors()[0].demos
    cleared = better.reset_copy()
    assert (
        not any(predictor.demos for predictor in cleared.predictors())
        and cleared.weak is better.weak
    )


def misled() -> Collaboration:
    """A program whose strong model is right alone; drafts of even questions are wrong, the others
    say nothing new, and that of the first question is what it lacks."""

    def weak(request: dict[str, Any]) -> str:
        number = int(request["messages"][-1]["content"].split("Question number ")[-1].split("?")[0])
        return "wrong" if number % 2 == 0 and number else str(number)

    def strong(request: dict[str, Any]) -> str:
        text = request["messages"][-1]["content"]
        number = text.split("Question number ")[-1].split("?")[0]
        return (
            text.rpartition("Background: ")[2]
            if "Background: " in text
            else "none"
            if number == "0"
            else number
        )

    return together(
        ScriptedEngine(weak, model="scripted/weak"), ScriptedEngine(strong, model="scripted/strong")
    )


def test_a_draft_that_hurt_is_no_demonstration() -> None:
    program = misled()
    influence = Influence(match, program)
    few: dict[str, Any] = {"max_bootstrapped_demos": 8, "max_labeled_demos": 0}
    better: Any = dspy.BootstrapFewShot(metric=influence, **few).compile(
        program, trainset=questions(6)
    )
    shown = [demo["background"] for demo in better.draft.predictors()[0].demos]
    assert shown == ["0"], "the draft that helped: none that hurt, and none that changed nothing"


def test_influence_says_whether_a_draft_helped_where_demonstrations_are_looked_for() -> None:
    program = misled()
    influence, (first, second, third) = Influence(match, program), questions(3)
    found = [(one, program(**one.inputs())) for one in (first, second, third)]
    assert [influence(*one) for one in found] == [1.0, 0.0, -1.0]
    assert [influence(*one, trace=[]) for one in found] == [True, False, False]
    words = [influence(*one, trace=[], pred_name="draft", pred_trace=[]) for one in found]
    assert [one.score for one in words] == [1.0, 0.0, -1.0], "GEPA asks for the score and words"  # pyright: ignore[reportAttributeAccessIssue]


def test_miprov2_of_a_configuration_takes_numbers_in_the_place_of_auto(
    task: tuple[Collaboration, Influence],
) -> None:
    program, influence = task
    tools = Tools(program, match, influence, proposer([]), num_threads=1, seed=0)
    settings = {"num_candidates": 3, "max_bootstrapped_demos": 0, "max_labeled_demos": 0}
    compiled = {
        "num_trials": 5,
        "minibatch": False,
        "program_aware_proposer": False,
        "data_aware_proposer": False,
    }
    rules = StepRules.model_validate(
        {"optimizer": "MIPROv2", "settings": settings, "compile": compiled}
    )
    made: Any = build_optimizer("prompts", rules, tools)
    better = made.compile(program, trainset=questions(4), valset=questions(4), **rules.compile)
    assert better(question="Question number 3?").answer == "3"
    light: Any = build_optimizer(
        "prompts", StepRules.model_validate({"optimizer": "MIPROv2"}), tools
    )
    assert (made.auto, made.num_candidates, light.auto) == (None, 3, "light")


def test_simba_varies_the_drafts_and_leaves_the_strong_model_alone() -> None:
    program = together(weak_that_obeys(every=2), strong_that_reads())
    influence: Any = Influence(match, program)  # DSPy's type of a metric is narrower
    strong = program.strong
    optimizer = dspy.SIMBA(
        metric=influence, bsize=8, num_candidates=4, max_steps=2, max_demos=2, num_threads=1
    )
    with dspy.context(lm=proposer([])):
        better = optimizer.compile(program, trainset=questions(16), seed=0)
    assert isinstance(better, Collaboration)
    assert better(question="Question number 17?").answer == "17"
    assert better.strong is strong or better.strong.model == strong.model
    assert instructions(better.alone.module) == instructions(program.alone.module)


def test_best_of_n_draws_drafts_from_the_weak_model_only(
    task: tuple[Collaboration, Influence],
) -> None:
    program = together(weak_that_obeys(every=2), strong_that_reads())

    def known(args: dict[str, Any], prediction: dspy.Prediction) -> float:
        return float(prediction.answer == args["question"].split()[-1].rstrip("?"))

    best = dspy.BestOfN(program, N=4, reward_fn=known, threshold=1.0)
    assert best(question="Question number 5?").answer == "5"


def test_set_lm_tells_weak_from_strong_once_they_are_bound() -> None:
    one, other, third = (
        ScriptedEngine({}, model=f"scripted/{name}").lm() for name in ("one", "other", "third")
    )
    unbound = Collaboration("question -> answer")
    assert unbound.get_lm() is None
    unbound.set_lm(one)
    assert unbound.weak is one
    assert unbound.strong is one
    bound = Collaboration("question -> answer").bind(weak=one, strong=other)
    bound.set_lm(third)
    assert bound.weak is third
    assert bound.strong.model == "scripted/other"
    assert bound.get_lm() is third


def test_a_store_answers_dspys_own_threads_and_keeps_rollouts_apart(tmp_path: Path) -> None:
    program = together(weak_that_obeys(every=2), strong_that_reads())
    evaluate = dspy.Evaluate(devset=questions(6), metric=match, num_threads=3)
    with Store(tmp_path) as store, keeping(store):
        first = evaluate(program).score
        calls = store.calls()
        assert calls > 0
        assert evaluate(program).score == first
        assert store.calls() == calls
        lm = program.weak
        texts = [
            lm.copy(rollout_id=index, temperature=1.0)("Question number 7?")[0]
            for index in range(6)
        ]
        assert set(texts) == {"7", "I do not know."}
        assert texts == [
            lm.copy(rollout_id=index, temperature=1.0)("Question number 7?")[0]
            for index in range(6)
        ]
        assert store.calls() == calls + 6
