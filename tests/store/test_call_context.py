"""What calls are for reaches them through a user's own module and DSPy's own threads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dspy
import pytest

from cowest_dspy.store.call_context import (
    call_context,
    current_stopping,
    joining,
    keeping,
    listening,
    note,
    sampling,
    stoppable,
    with_context,
)
from cowest_dspy.store.record import recorded
from cowest_dspy.store.store import Store
from cowest_dspy.testing import ScriptedEngine


class Several(dspy.Module):
    """A user's module, which asks its model in threads of DSPy's."""

    def __init__(self, lm: dspy.LM) -> None:
        super().__init__()
        self.ask = dspy.Predict("question -> answer")
        self.ask.set_lm(lm)

    def forward(self, questions: list[str]) -> Any:
        work = [(self.ask, {"question": question}) for question in questions]
        return dspy.Parallel(num_threads=2, disable_progress_bar=True)(work)


def test_threads_of_dspy_sample_and_keep_and_are_listened_to(tmp_path: Path) -> None:
    engine = ScriptedEngine(lambda asked: "[[ ## answer ## ]]\nyes")
    program, questions = Several(recorded(engine.lm())), ["one", "two", "three"]
    with Store(tmp_path) as store:
        with keeping(store), sampling(temperature=0.7, seed=5), listening() as calls:
            program(questions=questions)
        assert store.calls() == len(calls) == 3
    configs = [asked["config"] for asked in engine.asked]
    assert {(config["temperature"], config["seed"]) for config in configs} == {(0.7, 5)}


def test_what_was_collected_inside_is_passed_on_where_it_is_noted() -> None:
    lm = recorded(ScriptedEngine({"?": "yes"}).lm())
    with listening() as outside:
        with listening() as inside:
            lm("Is it?")
        assert len(inside) == 1 and outside == []
        note(inside)
    assert outside == inside
    note(inside)  # Nobody listens here.
    assert call_context().calls is None


def test_a_change_of_the_context_leaves_the_rest_of_it() -> None:
    with sampling(seed=1), with_context(role="judge"):
        assert (call_context().sampling, call_context().role) == ({"seed": 1}, "judge")
    assert not call_context().sampling and call_context().role is None


def test_a_stretch_inside_another_is_stopped_with_it_and_not_the_other_way_round() -> None:
    with stoppable():
        outer, inner = current_stopping(), None
        with pytest.raises(ValueError), stoppable():  # noqa: PT012
            inner = current_stopping()
            raise ValueError
        assert inner is not None and inner.stopped and not outer.stopped
        with joining(outer), stoppable():
            outer.stop()
            assert current_stopping().stopped
