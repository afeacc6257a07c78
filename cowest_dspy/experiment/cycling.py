"""[cycle] as a Cycle: its optimisers by name, and the rounds of the experiment as a step among
them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import dspy
from dspy.teleprompt import Teleprompter

from cowest_dspy.experiment.config import Config
from cowest_dspy.experiment.settings import TuningSettings
from cowest_dspy.influence.metric import Influence, Metric
from cowest_dspy.optimizers.config import StepRules
from cowest_dspy.optimizers.cowest import Rounds
from cowest_dspy.optimizers.cycle import (
    Cycle,
    MakeOptimizer,
    Tools,
    build_optimizer,
    settings_of,
)
from cowest_dspy.optimizers.run import NoProgress
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.store.record import recorded, unrecorded
from cowest_dspy.store.serialize import digest


class RoundsStep(Teleprompter):
    """The rounds of an experiment as a step of its cycle: tunes the weak model of the program as it
    is then.

    Args:
        meaning: what answers of the experiment depend on.
        rounds: gives the rounds of a program, of what its answers depend on, and of the number of
            the first.
    """

    def __init__(self, meaning: str, rounds: Callable[[Collaboration, str, int], Rounds]) -> None:
        self._meaning, self._rounds = meaning, rounds

    def compile(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        student: Collaboration,
        *,
        trainset: Sequence[dspy.Example],
        valset: Sequence[dspy.Example] | None = None,
        first_round: int = 1,
    ) -> Collaboration:
        """The program with the weak model of the last round that was taken; rounds are numbered
        from ``first_round``."""
        depends_on = digest([self._meaning, student.dump_state()])
        rounds = self._rounds(student, depends_on, first_round)
        lm, _ = rounds.run_all(unrecorded(student.weak))
        return student.bind(weak=lm)


def build_cycle(
    config: Config,
    metric: Metric,
    evaluator: Metric,
    weights: RoundsStep,
    meaning: str,
    *,
    progress: NoProgress,
) -> Cycle:
    """The cycle of a configuration that has [cycle]. ``evaluator`` is what influence is made of."""
    rules, num_threads = config.cycle, config.at_once("strong")
    assert rules is not None

    def maker(name: str, step: StepRules) -> Callable[[Collaboration], Teleprompter]:
        longest = step.max_tokens or max(1024, config.strong.max_tokens)

        def make(now: Collaboration) -> Teleprompter:
            proposer = unrecorded(now.strong).copy(temperature=1.0, max_tokens=longest)
            influence = Influence(evaluator, now)
            tools = Tools(now, metric, influence, recorded(proposer), num_threads, config.seed)
            return build_optimizer(name, step, tools)

        return make

    steps: dict[str, MakeOptimizer] = {"weights": weights}
    steps |= {name: maker(name, step) for name, step in rules.steps.items()}
    tuner = TuningSettings.of(config).preferring.decisive()
    made_of = {"weights": [tuner, config.rounds.model_dump(), config.pairs.model_dump()]}
    made_of |= {name: settings_of(step) for name, step in rules.steps.items()}
    names = [name for name in rules.names if name != "sft"]
    return Cycle(
        metric,
        " -> ".join(names),
        steps,
        targets={name: step.target for name, step in rules.steps.items()},
        compile_args={name: step.compile for name, step in rules.steps.items() if step.compile},
        settings={name: digest([meaning, config.seed, made_of[name]]) for name in names},
        confidence=config.rounds.confidence,
        num_threads=num_threads,
        progress=progress,
    )
