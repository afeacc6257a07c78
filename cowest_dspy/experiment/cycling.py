"""[cycle] as optimisers: DSPy's by name, one's own by reference, and the rounds of the experiment
as a step among them."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import dspy
from dspy.teleprompt import Teleprompter

from cowest_dspy.errors import ConfigError, nearest
from cowest_dspy.experiment.config import Config
from cowest_dspy.experiment.desk import Desk
from cowest_dspy.influence.metric import Influence, Metric
from cowest_dspy.optimizers.config import StepRules
from cowest_dspy.optimizers.cycle import Cycle, Cycled, MakeOptimizer
from cowest_dspy.optimizers.rounds import Rounds, Task
from cowest_dspy.optimizers.stages import digest
from cowest_dspy.optimizers.trained import TrainedModels
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.store.record import keeping, recorded, unrecorded
from cowest_dspy.utils.importing import load_function


@dataclass(frozen=True)
class Tools:
    """What an optimiser is made with. ``metric`` scores answers, ``influence`` is that of the
    program's drafts with words for GEPA, ``lm`` is the strong model at temperature 1 for proposing,
    ``threads`` what may be asked at once, ``seed`` the run's."""

    program: Collaboration
    metric: Metric
    influence: Influence
    lm: dspy.LM
    threads: int
    seed: int


def _gepa(tools: Tools) -> dict[str, Any]:
    return {
        "metric": tools.influence,
        "reflection_lm": tools.lm,
        "num_threads": tools.threads,
        "seed": tools.seed,
    }


def _miprov2(tools: Tools) -> dict[str, Any]:
    return {
        "metric": tools.metric,
        "prompt_model": tools.lm,
        "task_model": tools.lm,
        "num_threads": tools.threads,
        "seed": tools.seed,
    }


def _simba(tools: Tools) -> dict[str, Any]:
    return {"metric": tools.metric, "prompt_model": tools.lm, "num_threads": tools.threads}


OPTIMIZERS: dict[str, Callable[[Tools], dict[str, Any]]] = {
    "GEPA": _gepa,
    "MIPROv2": _miprov2,
    "SIMBA": _simba,
    "BootstrapFewShot": lambda tools: {"metric": tools.metric},
    "BootstrapFewShotWithRandomSearch": lambda tools: {
        "metric": tools.metric,
        "num_threads": tools.threads,
    },
    "LabeledFewShot": lambda tools: {},
}
"""DSPy's optimisers that may be named, and what they are given unless the settings say otherwise.
"""


class Weights(Teleprompter):
    """The rounds of an experiment as a step: tunes the weak model of the program as it is then."""

    def __init__(
        self,
        desk: Desk,
        task: Callable[[], Task],
        seed: int,
        make_room: Callable[[], None],
        base: dspy.LM,
    ) -> None:
        self._desk, self.task, self._seed, self._make_room, self._base = (
            desk,
            task,
            seed,
            make_room,
            base,
        )

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

        def task() -> Task:
            of = self.task()
            return replace(of, program=student, meaning=digest([of.meaning, student.dump_state()]))

        models = TrainedModels(
            self._desk, lambda: self._base, self._seed, self._make_room, self._desk.processes
        )
        rounds = Rounds(self._desk, models, task, self._desk.config.rounds, first=first_round)
        lm, _ = rounds.run(unrecorded(student.weak))
        return student.bind(weak=lm)


def cycled(
    program: Collaboration,
    weights: Weights,
    desk: Desk,
    data: dict[str, list[dspy.Example]],
    tools: Metric,
) -> Cycled:
    """The best program that [cycle] finds, from a program on its LMs. ``tools`` is the evaluator
    that influence is made of."""
    config = desk.config
    assert config.cycle is not None
    metric = load_function(config.metric)
    longest = max(1024, config.strong.max_tokens)
    names = [name for name in config.cycle.names if name != "sft"]
    made: dict[str, MakeOptimizer] = {"weights": weights}
    for name, rules in config.cycle.steps.items():

        def make(now: Collaboration, name: str = name, rules: StepRules = rules) -> Teleprompter:
            strong = recorded(
                unrecorded(program.strong).copy(
                    temperature=1.0, max_tokens=rules.max_tokens or longest
                )
            )
            of = Tools(
                now, metric, Influence(tools, now), strong, config.at_once("strong"), config.seed
            )
            return optimizer(name, rules, of)

        made[name] = make
    if not data["dev"]:
        raise ConfigError(
            "[cycle] compares its candidates on the dev split, and there is none: give the data a "
            "dev split."
        )
    cycle = Cycle(
        metric,
        " -> ".join(names),
        made,
        targets={name: rules.target for name, rules in config.cycle.steps.items()},
        compile_args={
            name: rules.compile for name, rules in config.cycle.steps.items() if rules.compile
        },
        settings={name: _made_of(name, weights.task(), config) for name in names},
        confidence=config.rounds.confidence,
        num_threads=config.at_once("strong"),
        progress=desk.progress,
    )
    with keeping(desk.store):
        return cycle.compile(program, trainset=data["train"], valset=data["dev"])


def _made_of(name: str, task: Task, config: Config) -> str:
    """What a step's optimiser is made of: its settings, the code of one's own, and whatever answers
    depend on."""
    if name == "weights":
        made: list[Any] = [
            task.tuner.decisive(),
            config.rounds.model_dump(),
            config.pairs.model_dump(),
        ]
    else:
        assert config.cycle is not None
        rules = config.cycle.steps[name]
        file = Path(rules.optimizer.rpartition(":")[0])
        # A key that came later and is not given: a cycle from before it goes on where it stood.
        settings = rules.model_dump(exclude=set() if rules.max_tokens else {"max_tokens"})
        made = [settings, hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""]
    return digest([task.meaning, config.seed, made])


def check_steps(config: Config) -> None:
    """Sees, before anything is asked, that each optimiser of [cycle] exists and takes its settings.

    Raises:
        ConfigError: it does not.
    """
    for name, rules in config.cycle.steps.items() if config.cycle else ():
        if ".py" in rules.optimizer or ":" in rules.optimizer:
            load_function(rules.optimizer)
            continue
        taken = inspect.signature(_class(name, rules.optimizer).__init__).parameters
        unknown = [key for key in rules.settings if key not in taken]
        if unknown:
            raise ConfigError(
                f"[cycle.steps.{name}] settings: {rules.optimizer} has no "
                f"{unknown[0]}.{nearest(unknown[0], taken)} "
                f"It has {', '.join(key for key in taken if key != 'self')}."
            )


def optimizer(name: str, rules: StepRules, tools: Tools) -> Teleprompter:
    """The optimiser of one step. One's own is made by a function ``make(tools, **settings)``.

    Raises:
        ConfigError: it cannot be made with these settings.
    """
    try:
        if rules.optimizer in OPTIMIZERS:
            given = {**OPTIMIZERS[rules.optimizer](tools), **rules.settings}
            if rules.optimizer == "MIPROv2" and "num_candidates" in given:
                given.setdefault(
                    "auto", None
                )  # It takes one or the other, and a TOML cannot say None.
            made = _class(name, rules.optimizer)(**given)
        else:
            made = load_function(rules.optimizer)(tools, **rules.settings)
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"[cycle.steps.{name}]: {rules.optimizer} cannot be made with these settings: {error}"
        ) from error
    if not isinstance(made, Teleprompter):
        raise ConfigError(
            f"[cycle.steps.{name}]: {rules.optimizer} gave a {type(made).__name__}; a "
            "Teleprompter is expected."
        )
    return made


def _class(name: str, optimizer: str) -> Any:
    if optimizer not in OPTIMIZERS:
        raise ConfigError(
            f"[cycle.steps.{name}] optimizer: there is no "
            f'"{optimizer}".{nearest(optimizer, OPTIMIZERS)} '
            f'Known: {", ".join(OPTIMIZERS)}; or "recipe.py:make".'
        )
    return getattr(dspy, optimizer)
