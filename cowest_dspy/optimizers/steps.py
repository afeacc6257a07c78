"""The optimisers of a cycle's steps: DSPy's by name, one's own by reference."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dspy
from dspy.teleprompt import Teleprompter

from cowest_dspy.errors import ConfigError, nearest
from cowest_dspy.influence.metric import Influence, Metric
from cowest_dspy.optimizers.config import CycleRules, StepRules
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.utils.importing import load_function


@dataclass(frozen=True)
class Tools:
    """What an optimiser is made with. ``metric`` scores answers, ``influence`` is that of the
    program's drafts with words for GEPA, ``lm`` is the strong model at temperature 1 for proposing,
    ``num_threads`` what may be asked at once, ``seed`` the run's."""

    program: Collaboration
    metric: Metric
    influence: Influence
    lm: dspy.LM
    num_threads: int
    seed: int


def _gepa(tools: Tools) -> dict[str, Any]:
    return {
        "metric": tools.influence,
        "reflection_lm": tools.lm,
        "num_threads": tools.num_threads,
        "seed": tools.seed,
    }


def _miprov2(tools: Tools) -> dict[str, Any]:
    return {
        "metric": tools.metric,
        "prompt_model": tools.lm,
        "task_model": tools.lm,
        "num_threads": tools.num_threads,
        "seed": tools.seed,
    }


def _simba(tools: Tools) -> dict[str, Any]:
    return {"metric": tools.metric, "prompt_model": tools.lm, "num_threads": tools.num_threads}


OPTIMIZERS: dict[str, Callable[[Tools], dict[str, Any]]] = {
    "GEPA": _gepa,
    "MIPROv2": _miprov2,
    "SIMBA": _simba,
    "BootstrapFewShot": lambda tools: {"metric": tools.metric},
    "BootstrapFewShotWithRandomSearch": lambda tools: {
        "metric": tools.metric,
        "num_threads": tools.num_threads,
    },
    "LabeledFewShot": lambda tools: {},
}
"""DSPy's optimisers that may be named, and what they are given unless the settings say otherwise.
"""


def settings_of(rules: StepRules) -> list[Any]:
    """What a step's optimiser is made of, JSON-able: its settings, and the digest of one's own
    code."""
    file = Path(rules.optimizer.rpartition(":")[0])
    # A key that came later and is not given: a cycle from before it goes on where it stood.
    settings = rules.model_dump(exclude=set() if rules.max_tokens else {"max_tokens"})
    return [settings, hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""]


def check_steps(cycle: CycleRules | None) -> None:
    """Sees, before anything is asked, that each optimiser of [cycle] exists and takes its settings.

    Raises:
        ConfigError: it does not.
    """
    for name, rules in cycle.steps.items() if cycle else ():
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


def build_optimizer(name: str, rules: StepRules, tools: Tools) -> Teleprompter:
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
