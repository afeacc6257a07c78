"""The noise floor: the strong model alone, asked again. What changes then, no draft has changed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import dspy

from cowest_dspy.influence.metric import Metric
from cowest_dspy.influence.report import NoiseFloor
from cowest_dspy.influence.rollout import asked
from cowest_dspy.influence.trace import Sampling, Trace
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.store.pool import Progress, all_in_order
from cowest_dspy.store.record import keeping
from cowest_dspy.store.store import Store


def noise_floor(
    program: Collaboration,
    examples: Sequence[dspy.Example],
    metric: Metric,
    rules: Sampling | None = None,
    *,
    store: Store | None = None,
    num_threads: int = 8,
    on_progress: Progress | None = None,
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
    seeds = rules or Sampling()

    def one(example: dspy.Example) -> list[float]:
        made = [
            asked(lambda: program.ask_alone(**example.inputs()), example, metric, seeds, number)
            for number in (0, 1)
        ]
        return [answer.scored.score for answer in made if answer.scored.score is not None]

    with keeping(store):
        return NoiseFloor.of(
            all_in_order(one, examples, threads=num_threads, on_progress=on_progress)
        )


def noise_in(traces: Iterable[Trace]) -> NoiseFloor | None:
    """The floor of a collection that asked for several answers, from those it has; None where it
    asked for one each."""
    alone = {(trace.round, trace.example_id): trace.alone_scores for trace in traces}
    return NoiseFloor.of(alone.values())
