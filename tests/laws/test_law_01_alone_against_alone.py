"""Law 1: alone against alone has influence 0 and gives no pair; a constant score gives no pair and
no training."""

from __future__ import annotations

import pytest
from scripted import match, questions, strong_that_reads, together, weak_that_varies

from cowest_dspy.errors import PairsError
from cowest_dspy.influence.collection import collect
from cowest_dspy.influence.trace import Sampling
from cowest_dspy.pairs import preference_pairs
from cowest_dspy.testing import ScriptedEngine


def test_law_1_alone_against_alone_has_no_influence_and_gives_no_pair() -> None:
    strong = ScriptedEngine(lambda request: "always this", model="scripted/strong")
    traces = collect(
        together(weak_that_varies(["a", "b", "c"]), strong), questions(4), match, Sampling(drafts=3)
    )
    assert {trace.influence for trace in traces} == {0.0}
    assert len(preference_pairs(traces)) == 0


def test_law_1_a_constant_score_gives_no_pair_and_no_training() -> None:
    traces = collect(
        together(weak_that_varies(["{n}", "x"]), strong_that_reads()),
        questions(4),
        lambda e, p, trace=None: 0.5,
        Sampling(drafts=2),
    )
    pairs = preference_pairs(traces)
    assert len(pairs) == 0
    with pytest.raises(PairsError, match="Sample more drafts"):
        pairs.to_dataset()
