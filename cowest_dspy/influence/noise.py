"""noise_floor(): the strong model asked twice, so that its own sampling is told from what a draft
does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dspy

from cowest_dspy.influence.collection import Plan
from cowest_dspy.influence.metric import Metric
from cowest_dspy.influence.report import NoiseFloor
from cowest_dspy.influence.trace import Sampling
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.program.examples import Examples, prepare_examples
from cowest_dspy.store.call_context import keeping
from cowest_dspy.store.pool import OnProgress, map_in_threads
from cowest_dspy.store.store import Store
from cowest_dspy.utils.settings import read_settings


def noise_floor(
    program: Collaboration,
    examples: Examples,
    metric: Metric,
    sampling: Sampling | Mapping[str, Any] | None = None,
    *,
    store: Store | None = None,
    num_threads: int = 8,
    on_progress: OnProgress | None = None,
) -> NoiseFloor | None:
    """Asks the strong model alone twice for each example, as :func:`collect` does and again with
    another seed.

    The first answer is the one that collecting asked for, so that a store has it: the floor costs
    one strong call per example. Examples of which an answer failed are left out. A strong model of
    temperature 0 is not asked: what it says does not change.

    Returns:
        the floor, or None where every example failed.
    """
    if program.strong.kwargs.get("temperature") == 0:
        return NoiseFloor(0, 0, 0.0, 0.0)
    plan = Plan(program, metric, read_settings(sampling, Sampling, "sampling"))
    examples = prepare_examples(examples, program)

    def one(example: dspy.Example) -> list[float]:
        ask = lambda: program.ask_alone(**example.inputs())  # noqa: E731
        scores = [plan.ask(ask, example, number).score for number in (0, 1)]
        return [score for score in scores if score is not None]

    with keeping(store):
        return NoiseFloor.of(
            map_in_threads(one, examples, num_threads=num_threads, on_progress=on_progress)
        )
