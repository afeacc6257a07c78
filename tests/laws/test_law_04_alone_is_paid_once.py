"""Law 4: the counterfactual is paid once per example: N examples x n drafts cost N x (n + 1) strong
calls."""

from __future__ import annotations

from pathlib import Path

from scripted import match, questions, strong_that_reads, together, weak_that_varies

from cowest_dspy.influence.collection import collect
from cowest_dspy.influence.trace import Sampling
from cowest_dspy.store.store import Store
from cowest_dspy.testing import ScriptedEngine


def test_law_4_the_counterfactual_is_paid_once_per_example(tmp_path: Path) -> None:
    strong = strong_that_reads()
    with Store(tmp_path) as store:
        collect(
            together(weak_that_varies(["a", "b", "c"]), strong),
            questions(5),
            match,
            Sampling(drafts=3),
            store=store,
        )
    assert len(strong.asked) == 5 * (3 + 1)


def test_law_4_equal_drafts_are_refined_once() -> None:
    strong = strong_that_reads()
    traces = collect(
        together(weak_that_varies(["same", "same", "same"]), strong),
        questions(2),
        match,
        Sampling(drafts=3),
    )
    assert len(traces) == 6
    assert len(strong.asked) == 2 * (1 + 1)


def test_law_4_with_different_drafts_the_cost_is_n_times_drafts_and_one_more() -> None:
    strong = strong_that_reads()
    weak = ScriptedEngine(lambda request: f"draft {request['config']['seed']}")
    traces = collect(together(weak, strong), questions(5), match, Sampling(drafts=3))
    assert len(strong.asked) == 5 * (3 + 1) and traces.saved == {"weak_calls": 0, "strong_calls": 0}
