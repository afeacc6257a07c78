"""Cycles: optimisers in a declared order, also DSPy's own BetterTogether; all of them really run,
on scripted or tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dspy
import pytest
from round_parts import (  # noqa: F401 - fixtures
    ALWAYS,
    examples,
    quick_cowest,
    student,
    taught,
)
from scripted import (
    grading,
    instructions,
    match,
    miprov2,
    proposer,
    questions,
    strong_that_reads,
    together,
    weak_that_obeys,
)

from cowest_dspy import Collaboration, CoWest, Cycle, Influence, Store
from cowest_dspy.errors import ProgramError
from cowest_dspy.optimizers.cycle import StepResult, _mean  # pyright: ignore[reportPrivateUsage]
from cowest_dspy.optimizers.run import NoProgress
from cowest_dspy.store.journal import Event
from cowest_dspy.store.progress import Snapshot


def gepa(program: Collaboration) -> Any:
    return dspy.GEPA(
        metric=Influence(match, program),
        max_metric_calls=30,
        reflection_lm=proposer([]),
        reflection_minibatch_size=2,
        num_threads=1,
        component_selector="all",
    )


MIPRO = {
    "num_trials": 5,
    "minibatch": False,
    "program_aware_proposer": False,
    "data_aware_proposer": False,
}


def cowest(run: Path) -> CoWest:
    return quick_cowest(run, **ALWAYS)


# Cycle


def test_the_best_program_wins_and_its_interval_is_told(tmp_path: Path) -> None:
    program = together(weak_that_obeys(), strong_that_reads())
    cycle = Cycle(
        match,
        "few -> prompts",
        {"prompts": gepa, "few": dspy.LabeledFewShot(k=0)},
        log_dir=tmp_path / "run",
    )
    best = cycle.compile(program, trainset=questions(8), valset=questions(12)[8:])
    start, few, prompts = best.steps
    assert (start.name, start.score, start.gain, start.best) == ("start", 0.0, None, True)
    assert (few.name, few.score, few.best) == ("few", 0.0, False), (
        "no better than the start: the next step goes on from that"
    )
    assert prompts.score == 1.0 and prompts.best
    assert prompts.gain and (prompts.gain.mean, prompts.gain.better, prompts.gain.n) == (1.0, 4, 4)
    assert best(question="Question number 40?").answer == "40"
    assert instructions(best.alone.module) == instructions(program.alone.module)
    assert best.weak.model == program.weak.model and best.strong.model == program.strong.model
    assert "step 2, prompts: 1.000 on 4 examples, gain +1.000" in str(prompts)
    assert StepResult.from_dict({**vars(prompts), "gain": vars(prompts.gain)}) == prompts


def test_the_order_of_equal_scores_makes_no_candidate_better() -> None:
    scores = {"a": 0.1, "b": 0.2, "c": 0.3, "d": None}
    assert _mean(scores) == _mean(dict(reversed(scores.items())))
    assert 0.1 + 0.2 + 0.3 != 0.3 + 0.2 + 0.1, "a plain sum depends on it"


def test_finished_steps_are_read_and_an_interrupted_one_goes_on_with_kept_answers(
    tmp_path: Path,
) -> None:
    train, held = questions(8), questions(12)[8:]

    def breaks(program: Collaboration) -> Any:
        raise KeyboardInterrupt

    strong = strong_that_reads()
    program = together(weak_that_obeys(), strong)
    with pytest.raises(KeyboardInterrupt):
        Cycle(
            match, "prompts -> more", {"prompts": gepa, "more": breaks}, log_dir=tmp_path / "run"
        ).compile(program, trainset=train, valset=held)
    asked = len(strong.asked)
    made: list[str] = []

    def counted(program: Collaboration) -> dspy.LabeledFewShot:
        made.append(program.draft.signature.instructions)  # pyright: ignore
        return dspy.LabeledFewShot(k=1)

    steps = {"prompts": breaks, "more": counted}
    best = Cycle(match, "prompts -> more", steps, log_dir=tmp_path / "run").compile(
        program, trainset=train, valset=held
    )
    assert [step.name for step in best.steps] == ["start", "prompts", "more"], (
        "the first step was read, and not made again"
    )
    assert made == instructions(best.draft)[:1]
    assert best(question="Question number 40?").answer == "40"
    assert len(strong.asked) <= asked + len(held) + 1


@pytest.mark.parametrize(
    ("target", "changed", "kept"), [("draft", "draft", "refine"), ("refine", "refine", "draft")]
)
def test_a_target_closes_the_other_part(
    tmp_path: Path, target: Any, changed: str, kept: str
) -> None:
    program = together(weak_that_obeys(), strong_that_reads())
    steps = {"shots": dspy.LabeledFewShot(k=2)}
    cycle = Cycle(
        lambda *_, **__: 0.5, "shots", steps, targets={"shots": target}, log_dir=tmp_path / "run"
    )
    cycle.compile(program, trainset=questions(4), valset=questions(6)[4:])
    with Store(tmp_path / "run") as store:
        state = store.record("step", "1 shots") or {}
    assert state["state"][changed]["demos"] and not state["state"][kept]["demos"]


def test_what_a_strategy_cannot_name(tmp_path: Path) -> None:
    steps = {"prompts": dspy.LabeledFewShot(k=1)}
    with pytest.raises(
        ProgramError, match=r'names "promts", which is no step. Did you mean "prompts"'
    ):
        Cycle(match, "promts", steps)
    with pytest.raises(ProgramError, match='is "draft", "refine" or "both"'):
        Cycle(match, "prompts", steps, targets={"prompts": "all"})  # pyright: ignore
    cycle = Cycle(match, "prompts", steps, log_dir=tmp_path)
    predict: Any = dspy.Predict("question -> answer")
    with pytest.raises(ProgramError, match="a Predict was given"):
        cycle.compile(predict, trainset=questions(1), valset=questions(1))


def test_weights_and_prompts_in_one_run(student: Collaboration, tmp_path: Path) -> None:
    steps = {"weights": cowest(tmp_path / "unused"), "prompts": dspy.LabeledFewShot(k=1)}
    cycle = Cycle(
        match, "weights -> prompts", steps, targets={"prompts": "refine"}, log_dir=tmp_path / "run"
    )
    first = cycle.compile(student, trainset=examples("train", 10), valset=examples("dev", 4))
    assert not (tmp_path / "unused").exists(), "inside a cycle the rounds are in its run"
    assert first.steps[1].weak != first.steps[0].weak
    with Store(tmp_path / "run") as store:
        calls = store.calls()
        assert store.records("adapter") and store.records("round")
    again = cycle.compile(student, trainset=examples("train", 10), valset=examples("dev", 4))
    assert again.steps == first.steps and again.weak.model == first.weak.model
    with Store(tmp_path / "run") as store:
        assert store.calls() == calls


class InterruptedAt(NoProgress):
    """Interrupts the run when a stage of this title begins."""

    def __init__(self, title: str) -> None:
        self.title = title

    def update(self, event: Event, snapshot: Snapshot) -> None:
        if event == "stage_begin" and snapshot.stage and snapshot.stage.title == self.title:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_two_weights_steps_have_rounds_of_their_own(student: Collaboration, tmp_path: Path) -> None:
    def walk(run: Path, interrupted_at: str = "") -> Any:
        optimizer = cowest(tmp_path / "unused")
        optimizer.progress = InterruptedAt(interrupted_at)
        steps = {"weights": optimizer, "prompts": dspy.LabeledFewShot(k=1)}
        cycle = Cycle(
            match,
            "weights -> prompts -> weights",
            steps,
            targets={"prompts": "refine"},
            log_dir=run,
        )
        return cycle.compile(student, trainset=examples("train", 10), valset=examples("dev", 4))

    def kept(run: Path) -> Any:
        with Store(run) as store:
            adapters = {
                name: (record["model"], record["history"])
                for name, record in store.records("adapter").items()
            }
            traces = {
                key: (record["round"], record["completion"])
                for key, record in store.records("trace").items()
            }
            return (
                adapters,
                traces,
                store.records("round"),
                list(store.records("done")),
                store.calls(),
            )

    whole = walk(tmp_path / "whole")
    adapters, traces, rounds, done, calls = kept(tmp_path / "whole")
    assert list(adapters) == ["dpo", "dpo 2"] and done == ["collect", "collect 2"]
    assert [record["number"] for record in rounds.values()] == [1, 2] and {
        number for number, _ in traces.values()
    } == {1, 2}
    assert (rounds["1"]["start"], rounds["1"]["model"]) == (
        whole.steps[0].weak,
        whole.steps[1].weak,
    )
    assert (rounds["2"]["start"], rounds["2"]["model"]) == (
        whole.steps[2].weak,
        whole.steps[3].weak,
    )
    assert (tmp_path / "whole" / "pairs.jsonl").read_bytes() != (
        tmp_path / "whole" / "pairs-2.jsonl"
    ).read_bytes()
    again = walk(tmp_path / "whole")
    assert again.steps == whole.steps and kept(tmp_path / "whole") == (
        adapters,
        traces,
        rounds,
        done,
        calls,
    )
    for title in ("Collecting drafts and their influence, round 2", "Preference tuning, round 2"):
        run = tmp_path / title.split()[0]
        with pytest.raises(KeyboardInterrupt):
            walk(run, title)
        assert walk(run).steps == whole.steps
        assert kept(run) == (adapters, traces, rounds, done, calls)


# DSPy's BetterTogether


@pytest.mark.parametrize("strategy", ["p -> w", "w -> p"])
@pytest.mark.parametrize("prompts", ["gepa", "miprov2"])
def test_better_together(
    student: Collaboration, tmp_path: Path, strategy: str, prompts: str
) -> None:
    of = {
        "gepa": lambda: dspy.GEPA(
            metric=grading, max_metric_calls=12, reflection_lm=proposer([]), num_threads=1
        ),
        "miprov2": lambda: miprov2(grading, proposer([])),
    }
    both = dspy.BetterTogether(metric=grading, p=of[prompts](), w=cowest(tmp_path / "run"))
    arguments = {"p": MIPRO} if prompts == "miprov2" else {}
    best: Any = both.compile(
        student,
        trainset=examples("train", 10),
        valset=examples("dev", 3),
        strategy=strategy,
        optimizer_compile_args=arguments,
    )
    assert not best.flag_compilation_error_occurred
    weaks = {one["strategy"]: one["program"].weak.model for one in best.candidate_programs}
    assert len(weaks) == 3 and weaks[""] == student.weak.model
    assert weaks[strategy] != student.weak.model, "the weak model was tuned"
    assert {one["program"].strong.model for one in best.candidate_programs} == {
        student.strong.model
    }
