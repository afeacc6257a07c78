"""The tables [rounds] and [cycle]."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from cowest_dspy.errors import nearest
from cowest_dspy.utils.table import Reference, TomlTable


class RoundRules(TomlTable):
    """[rounds]: how often drafts are collected and the weak model is tuned, and when a tuned model
    is taken."""

    count: int = Field(
        1,
        ge=1,
        description="rounds, at most: each collects drafts of the model that the last one left",
    )
    confidence: float = Field(
        0.9, gt=0, lt=1, description="of the paired bootstrap interval of the gain on the dev split"
    )
    least_gain: float = Field(
        0.0,
        ge=-1,
        le=1,
        description="a tuned model is taken when the lower end of that interval is above this",
    )
    more_failures: float = Field(
        0.05, ge=0, le=1, description="the part of the dev split that may fail in addition, at most"
    )
    patience: int = Field(
        1, ge=1, description="rounds in a row that may be rolled back before no more is tried"
    )
    replay: bool = Field(False, description="tune on the pairs of earlier rounds too")


class StepRules(TomlTable):
    """[cycle.steps.NAME]: one optimiser of the cycle."""

    optimizer: Reference = Field(
        description='"GEPA", "MIPROv2", "SIMBA", "BootstrapFewShot", "LabeledFewShot", or '
        '"recipe.py:make"'
    )
    target: Literal["draft", "refine", "both"] = Field(
        "both", description="whose prompts it may change; alone's never change"
    )
    settings: dict[str, Any] = Field(default_factory=dict, description="its own keyword arguments")
    compile: dict[str, Any] = Field(
        default_factory=dict, description="keyword arguments of its compile"
    )
    max_tokens: int | None = Field(
        None,
        ge=1,
        description="of a proposal by the strong model; default: 1024, or [strong] max_tokens "
        "where that is more",
    )


class CycleRules(TomlTable):
    """[cycle]: optimisers in order. "sft" is [sft], only as the first; "weights" are the [rounds];
    others are in ``steps``."""

    strategy: str = Field(description='for instance "sft -> prompts -> weights -> prompts"')
    steps: dict[str, StepRules] = Field(
        default_factory=dict, description="the optimisers that strategy names, by name"
    )

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the strategy, in order."""
        return tuple(name.strip() for name in self.strategy.split("->"))

    @model_validator(mode="after")
    def _check_strategy(self) -> CycleRules:
        known = ("sft", "weights", *self.steps)
        for place, name in enumerate(self.names):
            if name not in known:
                others = f"Add [cycle.steps.{name}], or use {', '.join(known)}"
                raise ValueError(
                    f'strategy names "{name}", which is no step.{nearest(name, known)} {others}'
                )
            if name == "sft" and place:
                raise ValueError(
                    '"sft" is domain fine-tuning, from the base model: it can only be the first '
                    "step"
                )
        taken = [name for name in ("sft", "weights") if name in self.steps]
        if taken:
            raise ValueError(
                f'"{taken[0]}" is a step of its own: give the optimiser in steps another name'
            )
        return self
