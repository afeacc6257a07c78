"""The tables of a TOML, one frozen pydantic model each; config.py puts them together and reads
files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from cowest_dspy.errors import nearest
from cowest_dspy.influence.statistics import SMALLEST
from cowest_dspy.lms.config import LMSettings
from cowest_dspy.utils.table import Folder, Reference, TomlTable, Uri

RESERVED = ("seed", "rows")
"""Keys of [data] that are given to a recipe's functions by their own names."""


def recipe_arguments(data: Mapping[str, Any]) -> dict[str, Any]:
    """What is given to a recipe's functions by keyword: seed and rows of [data], as far as they are
    set, and what stands in [data.arguments]."""
    named = {name: data[name] for name in RESERVED if data.get(name) is not None}
    return {**named, **data.get("arguments", {})}


class Data(TomlTable):
    """Where the examples come from, and how many of each split are used."""

    source: Reference = Field(
        description='"recipe.py:examples" (a function of split and seed), a .jsonl with a "split" '
        'field, or "hub:NAME"'
    )
    inputs: tuple[str, ...] = Field(
        min_length=1, description="the fields that the program is given"
    )
    seed: int = Field(
        0, ge=0, description="given to a recipe's function; the same for every seed of the run"
    )
    rows: Folder | None = Field(
        None,
        description='a folder with the rows of a dataset, or "hub:NAME": given to the recipe\'s '
        "functions as rows=",
    )
    arguments: dict[str, bool | int | float | str] = Field(
        default_factory=dict,
        description="more keyword arguments of the recipe's functions: [data.arguments] fold = 1. "
        "Those of source, [sft] and corpus have to take each; the others get what they ask for",
    )
    train: int | None = Field(None, ge=1, description="use the first so many; all by default")
    dev: int | None = Field(
        None, ge=1, description="as train: what rounds are taken or rolled back by"
    )
    test: int | None = Field(None, ge=1, description="as train: what is only counted, at the end")

    @field_validator("arguments")
    @classmethod
    def _of_the_recipe(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if name in (*RESERVED, "split", "draft") or not name.isidentifier():
                raise ValueError(
                    f'"{name}" cannot be an argument here: a name of Python is expected, and not '
                    "split, draft, seed or rows, which have their own places"
                )
        return value

    @property
    def given(self) -> dict[str, Any]:
        """What is given to a recipe's functions by keyword."""
        return recipe_arguments(vars(self))


class Arms(TomlTable):
    """[evaluate]: what is compared on the test split."""

    split: Literal["dev", "test"] = Field("test", description="whose questions are asked")
    weak: Reference | None = Field(None, description='the weak model alone: "recipe.py:program"')
    oracle: str | None = Field(None, description="a field with gold background: the ceiling arm")
    controls: tuple[Literal["shuffled", "sft_on_chosen", "more_sft", "by_correctness"], ...] = (
        Field((), description="arms that can say no")
    )


class Shown(TomlTable):
    """[report]: what pages and the terminal show."""

    hide: tuple[str, ...] = Field(
        (),
        description="inputs that are shown as their length only; the store and report.json keep "
        "them",
    )


class TrackingRules(TomlTable):
    """[tracking]: where else a run is logged while it goes on; nowhere by default."""

    to: tuple[Literal["mlflow", "trackio", "wandb"], ...] = Field(
        min_length=1, description="the trackers that are told"
    )
    project: str | None = Field(
        None,
        min_length=1,
        description="MLflow's experiment, the project of trackio and W&B; by default the task's "
        "name",
    )
    name: str | None = Field(
        None,
        min_length=1,
        description='of the run; by default the task\'s name and its seed, "toy, seed 0"',
    )
    uri: Uri | None = Field(
        None,
        description="of MLflow: http://..., sqlite:///FILE; by default MLFLOW_TRACKING_URI, "
        "otherwise what MLflow takes",
    )
    artifacts: bool = Field(
        True,
        description="upload report, configuration, pairs, comparison, and the bundle if there is "
        "one",
    )
    wait: float = Field(
        10.0,
        gt=0,
        description="seconds that a tracker may take to answer, before the run goes on without it",
    )

    @field_validator("to")
    @classmethod
    def _each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(value))

    @field_validator("uri")
    @classmethod
    def _no_secret(cls, value: str | None) -> str | None:
        if value is not None and "@" in value.partition("://")[2].partition("/")[0]:
            raise ValueError(
                "a user and a password do not belong into a file: set MLFLOW_TRACKING_USERNAME "
                "and MLFLOW_TRACKING_PASSWORD, or "
                "MLFLOW_TRACKING_URI, in the environment"
            )
        return value


# The options of each kind, besides kind and title.
_ARM_OPTIONS: dict[str, tuple[str, ...]] = {
    "alone": ("transfer",),
    "strong": ("style",),
    "weak": ("weak", "shots"),
    "self_refine": ("rounds",),
    "self_consistency": ("samples", "temperature"),
    "rag": ("corpus", "passages"),
    "grounded": ("corpus", "passages", "weak"),
    "super_icl": ("weak", "shots", "samples", "temperature"),
    "collaboration": ("draft", "weak", "transfer"),
    "oracle": ("field", "transfer"),
    "control": ("control", "draft"),
    "routed": ("router",),
    "module": ("program", "role"),
}


class ArmRules(TomlTable):
    """[compare.arms.NAME]: one way to answer the examples. ``kind`` says which; the other keys are
    of some kinds only."""

    kind: Literal[
        "alone", "strong", "weak", "self_refine", "self_consistency", "rag", "grounded",
        "super_icl", "collaboration", "routed", "oracle", "control", "module",
    ] = Field(description="who answers, and how: the table in compare.md")  # fmt: skip
    title: str | None = Field(None, description="for people")
    weak: Literal["base", "sft", "tuned"] = Field(
        "sft", description="the weak model: as it came, after [sft], after all tuning"
    )
    draft: str | None = Field(
        None,
        description="collaboration, control: another format of drafts, with its own SFT and tuning",
    )
    style: Literal["direct", "chain_of_thought"] = Field(
        "direct", description="strong: how it answers by itself"
    )
    shots: int = Field(
        0, ge=0, description="weak, super_icl: worked examples of the train split in the prompt"
    )
    rounds: int = Field(
        1, ge=1, description="self_refine: how often the answer is criticised and written anew"
    )
    samples: int = Field(
        5,
        ge=2,
        description="self_consistency, super_icl: answers that are sampled for each example",
    )
    temperature: float = Field(0.7, gt=0, le=2, description="of these samples")
    corpus: Reference | None = Field(
        None, description='rag, grounded: "recipe.py:corpus", a function that gives texts'
    )
    passages: int = Field(
        3, ge=1, description="rag, grounded: texts that are retrieved for each example"
    )
    field: str | None = Field(
        None, description="oracle: the field with gold background; by default that of [evaluate]"
    )
    control: (
        Literal["shuffled", "sft_on_chosen", "more_sft", "by_correctness", "other_draft"] | None
    ) = Field(None, description="control: what is not influence")
    program: Reference | None = Field(
        None, description='module: "recipe.py:make", a function that gives any dspy.Module'
    )
    router: Reference | None = Field(
        None,
        description='routed: "recipe.py:rule", a function that gives a Router; by default one is '
        "fitted, for the best weak model",
    )
    role: Literal["weak", "strong"] = Field("strong", description="module: which model it runs on")
    transfer: bool = Field(
        False,
        description="alone, collaboration, oracle: with the strong model of [compare.transfer]",
    )

    @model_validator(mode="after")
    def _fits_its_kind(self) -> ArmRules:
        known = _ARM_OPTIONS[self.kind]
        for key in sorted(self.model_fields_set - {"kind", "title"}):
            if key not in known and getattr(self, key) != type(self).model_fields[key].default:
                takes = ", ".join(known) or "no other key"
                raise ValueError(f'an arm of kind "{self.kind}" has no "{key}": it takes {takes}')
        for key in ("corpus", "control", "program"):
            if key in known and getattr(self, key) is None:
                raise ValueError(f'an arm of kind "{self.kind}" needs "{key}"')
        return self


class CompareRules(TomlTable):
    """[compare]: the arms of ``cowest compare``, all on the same examples, and ablations as a
    grid."""

    against: str = Field("alone", description="the arm that every other one is tested against")
    split: Literal["dev", "test"] = Field("test", description="whose questions are asked")
    seeds: tuple[int, ...] = Field(
        (), description="of runs that are compared as one; by default the run's own seed"
    )
    also: tuple[Reference, ...] = Field(
        (), description='more scores, beside the metric: "metric.py:macro_f1"'
    )
    smallest: float = Field(
        SMALLEST,
        gt=0,
        lt=100,
        description="points: the smallest difference worth finding, which verdicts and "
        "`cowest quote` name",
    )
    transfer: LMSettings | None = Field(
        None,
        description="another strong model, for arms with transfer = true: whether drafts that were "
        "tuned for the one help the other",
    )
    arms: dict[str, ArmRules] = Field(
        default_factory=dict, description="the ways to answer, by name"
    )
    sweep: dict[str, tuple[Any, ...]] = Field(
        default_factory=dict,
        description='"dotted.key" = [values]: the tuned collaboration with every combination of '
        "them",
    )

    @field_validator("arms")
    @classmethod
    def _names_of_files(cls, value: dict[str, ArmRules]) -> dict[str, ArmRules]:
        for name in value:
            if not name.replace("_", "").replace("-", "").isalnum():
                raise ValueError(
                    f'the name of an arm is made of letters, digits, "_" and "-"; given: "{name}"'
                )
        return value

    @model_validator(mode="after")
    def _whole(self) -> CompareRules:
        if self.arms and self.against not in self.arms:
            raise ValueError(
                f'against names "{self.against}", which is no '
                f"arm.{nearest(self.against, self.arms)}"
            )
        missing = [name for name, arm in self.arms.items() if arm.transfer and not self.transfer]
        if missing:
            raise ValueError(
                f"arms.{missing[0]} has transfer = true: it needs [compare.transfer], the table of "
                "another strong model, as [strong] is one"
            )
        if not self.arms and not self.sweep:
            raise ValueError(
                "there is nothing to compare: declare [compare.arms.NAME] tables, or a "
                "[compare.sweep]"
            )
        if any(not values for values in self.sweep.values()):
            raise ValueError("sweep: every key needs a list of values")
        return self
