"""Adaptive collection: when an example needs no more drafts, and what it saves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import toy
from dspy.lm15 import ServerError
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import made_trace, match, questions, strong_that_reads, together
from scripted_weak import weak_by_seed

from cowest_dspy.cli import main
from cowest_dspy.influence.collection import collect
from cowest_dspy.influence.trace import HOPELESS, Sampling, Trace, Traces, chance_of_another
from cowest_dspy.pairs import preference_pairs
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.store.store import Store
from cowest_dspy.testing import ScriptedEngine

# Adaptive


def adaptive(seed: int, drafts: int = 6) -> Sampling:
    return Sampling(drafts=drafts, seed=seed, adaptive=True)


@settings(max_examples=15)
@given(st.integers(0, 1000), st.integers(2, 7))
def test_an_adaptive_run_is_a_prefix_of_the_full_run_and_finds_a_pair_wherever_it_stopped_for_one(
    seed: int, drafts: int
) -> None:
    def run(sampling: Sampling) -> Sequence[Trace]:
        return collect(
            together(weak_by_seed(), strong_that_reads()),
            questions(6),
            match,
            sampling,
            num_threads=2,
        )

    full, short = run(Sampling(drafts=drafts, seed=seed)), run(adaptive(seed, drafts))
    paired = {pair.example_id for pair in preference_pairs(short)}
    for example in {trace.example_id for trace in full}:
        whole = [trace for trace in full if trace.example_id == example]
        part = [trace for trace in short if trace.example_id == example]
        assert part == whole[: len(part)] and len(part) >= 2
        assert not any(
            adaptive(seed, drafts).enough(part[:some]) for some in range(2, len(part))
        ), "it stops as soon as it can"
        alike = len({trace.influence for trace in part}) == 1
        assert (
            len(part) == drafts
            or example in paired
            or (alike and chance_of_another(len(part), drafts - len(part)) < HOPELESS)
        )


@pytest.mark.parametrize("answers", [1, 3])
@pytest.mark.parametrize("stop", [False, True])
def test_strong_calls_are_all_of_them_less_what_is_said_to_be_saved(
    tmp_path: Path, stop: bool, answers: int
) -> None:
    weak, strong = weak_by_seed(), strong_that_reads()
    program = Collaboration("question -> answer").bind(
        weak=weak.lm(), strong=strong.lm(temperature=0.7)
    )
    with Store(tmp_path) as store:
        rules = Sampling(drafts=8, adaptive=stop)
        traces = collect(program, questions(8), match, rules, store=store, answers=answers)
        saved = Traces.load(store).saved
    assert traces.saved == saved and (saved["weak_calls"] > 0) == stop and saved["strong_calls"] > 0
    assert len(weak.asked) == 8 * 8 - saved["weak_calls"] == len(traces)
    assert len(strong.asked) == 8 * (8 + 1) * answers - saved["strong_calls"]
    texts = {(trace.example_id, trace.draft) for trace in traces}
    assert len(strong.asked) == (8 + len(texts)) * answers, "equal drafts are refined once"


def test_an_example_whose_alone_failed_is_not_sampled_to_the_end() -> None:
    def strong(request: dict[str, Any]) -> str | Exception:
        return "yes" if "Background" in request["messages"][-1]["content"] else ServerError("down")

    weak = weak_by_seed()
    traces = collect(
        together(weak, ScriptedEngine(strong)), questions(1), match, adaptive(0), max_errors=1.0
    )
    assert len(traces) == len(weak.asked) == 2
    assert all(trace.error and trace.error.startswith("alone server:") for trace in traces)


def test_the_chance_of_another_influence_is_laplaces_rule_of_succession() -> None:
    """Against the product that it abbreviates: each further draw is alike with probability (k + 1)
    / (k + 2)."""
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
def test_when_there_are_enough_drafts(
    influences: list[float | None], texts: str, drafts: int, stops: bool
) -> None:
    made = [
        made_trace(index, value, text)
        for index, (value, text) in enumerate(zip(influences, texts, strict=True))
    ]
    assert Sampling(drafts=drafts, adaptive=True).enough(made) is stops


RECIPE = (
    toy.RECIPE
    + """
def rows(split, seed=0):
    return [{"id": f"{split}{i}", "question": f"{split} {i}?", "answer": str(i)} for i in range(4)]

def program():
    return Collaboration("question -> answer")

def number(request):
    return request["messages"][-1]["content"].split("?")[0].split()[-1]

def weak():
    return ScriptedEngine(lambda request: number(request) if request["config"]["seed"] % 2 else "no", model="scripted/weak")

def strong():
    def answer(request):
        return request["messages"][-1]["content"].partition("Background: ")[2] or "no"
    return ScriptedEngine(answer, model="scripted/strong")
"""
)

TASK = (
    toy.TASK
    + """
[collect]
drafts = 12
adaptive = true
answers = 2
"""
    + toy.engine("weak")
    + toy.engine("strong")
    + "temperature = 0.5\n"
)


def test_a_toml_asks_for_adaptive_drafts_and_several_answers_and_the_command_says_what_was_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "toy.py").write_text(RECIPE)
    (tmp_path / "toy.toml").write_text(TASK)
    for _ in range(2):  # collected, and read again
        main.collect([tmp_path / "toy.toml"], tmp_path / "run")
        with Store(tmp_path / "run") as store:
            traces = Traces.load(store)
            saved = traces.saved
            assert 8 <= len(traces) < 4 * 12 and {len(trace.alone_scores) for trace in traces} == {
                2
            }
        assert saved["weak_calls"] == 4 * 12 - len(traces)
        assert (
            f"saved: {saved['weak_calls']} drafts, {saved['strong_calls']} answers of the strong "
            "model"
        ) in capsys.readouterr().out
