"""What a shard's task needs of an experiment: the program on its models, and the evaluator, made
anew from the configuration on every node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import dspy

from cowest_dspy.errors import ModelError
from cowest_dspy.experiment.config import Config
from cowest_dspy.experiment.data import load_program
from cowest_dspy.experiment.settings import build_evaluator
from cowest_dspy.influence.metric import Metric
from cowest_dspy.influence.trace import Sampling, Traces
from cowest_dspy.lms import build_lm
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.scale import Cluster
from cowest_dspy.store.record import unrecorded
from cowest_dspy.utils.importing import load_function


@dataclass(frozen=True)
class ShardParts:
    """A function that builds the program and the evaluator of a configuration.

    config: as JSON; keys of APIs are read from the environment there. prompts: the program's state.
        adapter: the weak model's folder, None for the base. models: the ids of the weak and the
        strong model that must come out.
    """

    config: str
    prompts: dict[str, Any]
    adapter: Path | None
    models: tuple[str, str]

    @classmethod
    def of(cls, config: Config, program: Collaboration) -> ShardParts:
        """The parts of a program that is bound here."""
        weak = unrecorded(program.weak)
        find = getattr(weak.engine, "adapter_folder", None)
        return cls(
            config.model_dump_json(),
            program.dump_state(),
            find(weak.model) if find else None,
            (weak.model, program.strong.model),
        )

    def __call__(self) -> tuple[Collaboration, Metric]:
        """The program, bound, and the evaluator.

        Raises:
            ModelError: the models here are others.
        """
        config = Config.model_validate_json(self.config)
        weak, strong = build_lm(config.weak), build_lm(config.strong)
        if self.adapter is not None:
            weak = weak.copy(model=cast("Any", weak.engine).load_adapter(self.adapter))
        if (weak.model, strong.model) != self.models:
            raise ModelError(
                f"The models here are {weak.model} and {strong.model}, and not "
                f"{' and '.join(self.models)}: the weights on this node are others."
            )
        plain = load_program(config)
        program = plain.deepcopy()
        program.load_state(self.prompts)
        judge = build_lm(config.judge) if config.judge else strong
        metric = load_function(config.metric)
        scoring = build_evaluator(config.influence, metric, plain.bind(strong=strong), judge)
        return program.bind(weak=weak, strong=strong), scoring


def collect_on(cluster: Cluster, config: Config) -> Callable[..., Traces]:
    """A function that collects as ``collect`` does, on a cluster."""

    def collect(
        program: Collaboration,
        examples: Sequence[dspy.Example],
        metric: Metric,
        sampling: Sampling,
        **options: Any,
    ) -> Traces:
        return cluster.collect(ShardParts.of(config, program), examples, sampling, **options)

    return collect
