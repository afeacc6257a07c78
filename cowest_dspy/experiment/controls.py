"""Controls: training and drafts like those of influence, but for the influence. What works as well
with them was not it."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import dspy

from cowest_dspy.errors import PairsError
from cowest_dspy.influence import arms
from cowest_dspy.influence.trace import Trace
from cowest_dspy.pairs import PreferencePairs, preference_pairs
from cowest_dspy.program.collaboration import Collaboration


def shuffled(rows: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Rows of pairs with chosen and rejected exchanged in a random half, labelled rows with their
    labels dealt out anew: the same texts, as many of each label, no preference in them."""
    chance, rows = random.Random(seed), [dict(row) for row in rows]
    if rows and "label" in rows[0]:
        labels = chance.sample([row["label"] for row in rows], len(rows))
        return [{**row, "label": label} for row, label in zip(rows, labels, strict=True)]
    for place in chance.sample(range(len(rows)), len(rows) // 2):
        rows[place]["chosen"], rows[place]["rejected"] = (
            rows[place]["rejected"],
            rows[place]["chosen"],
        )
    return rows


def by_correctness(traces: Iterable[Trace], gate: Mapping[str, Any]) -> PreferencePairs:
    """Pairs of the same drafts, ranked by how right each draft is as an answer instead of by what
    it does to the strong model's.

    Raises:
        PairsError: no draft holds an answer that could be scored, as in the format "knowledge".
    """
    scored = [
        replace(trace, influence=trace.draft_score)
        for trace in traces
        if trace.draft_score is not None
    ]
    if not scored:
        raise PairsError(
            "The control by_correctness ranks drafts by their own answers, and these hold none: "
            'it needs draft = "direct" or '
            '"chain_of_thought".'
        )
    return preference_pairs(scored, **gate)


def other_draft_arm(
    program: Collaboration, examples: Sequence[dspy.Example], seed: int
) -> arms.Answering:
    """The collaboration with each example's draft replaced by that of another one: the next in a
    random order of ``examples``."""
    order = random.Random(seed).sample(range(len(examples)), len(examples))
    following = {
        examples[one].id: examples[other]
        for one, other in zip(order, [*order[1:], order[0]], strict=True)
    }

    def answer(example: dspy.Example) -> dspy.Prediction:
        return program.refined(
            program.drafted(**following[example.id].inputs()), **example.inputs()
        )

    return answer
