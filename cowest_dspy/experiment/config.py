"""What a TOML may say: frozen pydantic models, one per table; a key that is not known is an error
that names the nearest one.

A run is configured by one or several files, read from left to right; a later file replaces whole
tables, so that nothing of an earlier backend survives in a later one:

    load_config(["programs/handbook.toml", "programs/backends/in_process.toml"])

A later [sft] or [judge] without any key takes the earlier one away. Single keys are changed by
``overrides``, which `cowest ... --set dpo.beta=0.2` gives.

Paths and references in a file are relative to that file, and those of an override to the current
folder. No secret stands in a file: an API key is
given by the NAME of an environment variable.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from cowest_dspy.errors import ConfigError, masked, nearest
from cowest_dspy.experiment.tables import Arms, CompareRules, Data, Shown, TrackingRules
from cowest_dspy.influence.config import Collect, InfluenceRules
from cowest_dspy.lms.config import KINDS, LMSettings, Server
from cowest_dspy.optimizers.config import CycleRules, RoundRules
from cowest_dspy.pairs.config import PairRules
from cowest_dspy.scale.config import RayRules
from cowest_dspy.serve.config import ServeRules
from cowest_dspy.store.budget import Budget
from cowest_dspy.tuning.config import Sft
from cowest_dspy.utils.reading import file_errors, read_toml
from cowest_dspy.utils.table import MOVED, Reference, TomlTable

Settings = TypeVar("Settings", bound=BaseModel)


class Config(TomlTable):
    """A whole configuration: one task and its backends."""

    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9_-]*$",
        description="of the task; the run's folder is runs/NAME by default",
    )
    program: Reference = Field(
        description='"recipe.py:program", a function that gives a Collaboration'
    )
    metric: Reference = Field(description='"metric.py:name", a DSPy metric with values in [0, 1]')
    draft: str | None = Field(
        None,
        description='the format of drafts, such as "direct", "knowledge" or "chain_of_thought": '
        "given to the program's and [sft]'s functions, which know their own",
    )
    seed: int = Field(0, ge=0, description="of sampling, order and training; --seed goes before it")
    data: Data
    weak: LMSettings
    strong: LMSettings
    judge: LMSettings | None = Field(
        None, description="an evaluator's LM; by default the strong one"
    )
    sft: Sft | None = None
    influence: InfluenceRules = InfluenceRules()  # pyright: ignore[reportCallIssue]
    collect: Collect = Collect()  # pyright: ignore[reportCallIssue]
    pairs: PairRules = PairRules()  # pyright: ignore[reportCallIssue]
    dpo: dict[str, Any] = Field(default_factory=dict, description="as cowest_dspy.tuning.DPO")
    kto: dict[str, Any] | None = Field(
        None, description="as cowest_dspy.tuning.KTO; tunes on labelled drafts, instead of [dpo]"
    )
    rounds: RoundRules = RoundRules()  # pyright: ignore[reportCallIssue]
    cycle: CycleRules | None = Field(
        None, description="optimisers in order; without it: sft, then weights"
    )
    evaluate: Arms = Arms()  # pyright: ignore[reportCallIssue]
    compare: CompareRules | None = Field(None, description="what `cowest compare` compares")
    report: Shown = Shown()  # pyright: ignore[reportCallIssue]
    tracking: TrackingRules | None = Field(
        None, description="where else the run is logged while it goes on"
    )
    serve: ServeRules = ServeRules()  # pyright: ignore[reportCallIssue]
    budget: Budget | None = Field(
        None, description="what the whole run may spend, over all its resumes"
    )
    ray: RayRules | None = Field(None, description="the cluster over which collections are spread")

    @field_validator("*", mode="wrap")
    @classmethod
    def _paths_are_relative_to_their_file(
        cls, value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo
    ) -> Any:
        if info.context:
            info.context["folder"] = info.context["folders"].get(info.field_name)
        return handler(value)

    @field_validator("sft", "judge", "budget", "cycle", "compare", "tracking", "ray", mode="before")
    @classmethod
    def _an_empty_table_takes_the_earlier_one_away(cls, value: Any) -> Any:
        return None if value == {} else value

    @model_validator(mode="after")
    def _only_inputs_are_hidden(self) -> Config:
        for name in self.report.hide:
            if name not in self.data.inputs:
                known = ", ".join(self.data.inputs)
                raise ValueError(
                    f'[report] hide: there is no input "{name}".{nearest(name, self.data.inputs)} '
                    f"Inputs: {known}"
                )
        return self

    @model_validator(mode="after")
    def _one_way_of_preference_tuning(self) -> Config:
        if self.dpo and self.kto is not None:
            raise ValueError(
                "[dpo] and [kto] are both given: keep one. [dpo] tunes on pairs, [kto] on "
                "labelled drafts; an empty [dpo] in a "
                "later file takes an earlier one away"
            )
        return self

    @model_validator(mode="after")
    def _servers_run_already_on_a_cluster(self) -> Config:
        for role in ROLES if self.ray else ():
            settings: LMSettings | None = getattr(self, role)
            if isinstance(settings, Server) and settings.command:
                raise ValueError(
                    f"[{role}] command: with [ray] every task would start a server of its own. "
                    "Start one yourself (vllm serve, Ray Serve), and give its api_base"
                )
        return self

    def settings_of(self, role: str) -> LMSettings:
        """The model in a role; the strong one judges where there is no [judge]."""
        return getattr(self, role) or self.strong

    def at_once(self, role: str) -> int:
        """Calls to a role's model that may be under way at once: its concurrency, on a cluster that
        of each shard."""
        return self.settings_of(role).concurrency


ROLES = ("weak", "strong", "judge")


def load_config(
    files: Iterable[str | Path],
    *,
    seed: int | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Config:
    """The configuration that ``files`` make together: a later file replaces whole tables of an
    earlier one.

    Args:
        files: TOML files, the task first and then the backend.
        seed: overrides the one in the files, and in ``overrides``.
        overrides: values of single keys, as if they stood in the files: ``{"dpo.beta": 0.2}``.
            A relative path among them is of the current folder.

    Raises:
        ConfigError: no such file, no TOML, an unknown key (with the nearest known one), a missing
            table, a value out of range.
    """
    merged: dict[str, Any] = {}
    folders: dict[str, Path] = {}
    names = [Path(file) for file in files]
    for file in names:
        values = _read(file)
        merged |= values
        folders |= dict.fromkeys(values, file.parent)
    changes = dict(overrides or {})
    if seed is not None:
        changes["seed"] = seed
    for key, value in changes.items():
        _put(merged, key, value)
    where = " + ".join(str(name) for name in names) or "no file"
    if overrides:
        where += f", with other values of {', '.join(overrides)}"
    with file_errors(ConfigError, where):  # A path that no file system can have.
        config = validate(Config, merged, where, {"folders": folders})
        if config.compare:
            config = _resolve_sweep(config, folders.get("compare", Path()))
        if overrides:  # Once more from here: what the files say is resolved by now.
            here = dict.fromkeys(Config.model_fields, Path())
            config = overridden(config, changes, {"folders": here})
            config = _resolve_sweep(config, Path()) if config.compare else config
        return config


def parse_override(text: str) -> tuple[str, Any]:
    """Key and value of ``"dpo.beta=0.2"``; a value that is no TOML is a string.

    Raises:
        ConfigError: there is no "=", or what stands before it is no key of TOML.

    >>> parse_override("weak.model=models/other")
    ('weak.model', 'models/other')
    >>> parse_override('dpo.loss_type=["sigmoid", "sft"]')
    ('dpo.loss_type', ['sigmoid', 'sft'])
    """
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {masked(text)}: write KEY=VALUE, for instance dpo.beta=0.2.")
    key, value = key.strip(), value.strip()
    _split_key(key)
    try:
        parsed = tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        return key, value
    return key, parsed["value"] if len(parsed) == 1 else value


def _split_key(dotted: str) -> Sequence[str]:
    """The parts of a dotted key of TOML: ``compare.sweep."dpo.beta"`` has three.

    Raises:
        ConfigError: it is none.
    """
    try:
        place: Any = tomllib.loads(f"{dotted} = 0")
    except tomllib.TOMLDecodeError:
        raise ConfigError(f"{masked(dotted)!r} is no key: give one such as dpo.beta.") from None
    parts: list[str] = []
    while isinstance(place, dict):
        name, place = cast("dict[str, Any]", place).popitem()
        parts.append(name)
    return parts


def _put(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Set one key in nested tables, which are made where there are none."""
    *tables, key = _split_key(dotted)
    for name in tables:
        if not isinstance(values.get(name), dict):
            values[name] = {}
        values = values[name]
    values[key] = value


def validate(
    model: type[Settings],
    values: Mapping[str, Any],
    where: str,
    context: dict[str, Any] | None = None,
) -> Settings:
    """``values`` as an instance of ``model``.

    Args:
        model: a table, or the whole configuration.
        values: as they are in TOML.
        where: what they are, for the message.
        context: "folders" has the folder of the file in which each table of a configuration stands;
            relative paths are resolved there.

    Raises:
        ConfigError: naming every key that is wrong, what was expected, and the nearest known key of
            one that is unknown.
    """
    try:
        return model.model_validate(values, context=context)
    except ValidationError as error:
        raise ConfigError(_explain(model, error, where)) from None


def fingerprint(config: Config) -> str:
    """The configuration as canonical JSON; equal for equal settings."""
    return json.dumps(config.model_dump(mode="json"), sort_keys=True)


def _read(file: Path) -> dict[str, Any]:
    with file_errors(ConfigError, file):
        if not file.exists():
            raise ConfigError(f"There is no file {file}.{_files_near(file)}")
        return read_toml(file, ConfigError)


def _files_near(file: Path) -> str:
    """What could have been meant: the TOML files of that folder, the nearest first; otherwise how
    to get some."""
    there = sorted(path.name for path in file.parent.glob("*.toml"))
    if not there:
        return (
            f" There is no TOML in {file.parent.resolve()}. `cowest new NAME` writes a task "
            "and its backends."
        )
    shown = ", ".join(str(file.parent / name) for name in there[:12])
    meant = nearest(str(file), [str(file.parent / name) for name in there])
    return f"{meant} There is: {shown}{', ...' if len(there) > 12 else ''}."


def _resolve_sweep(config: Config, folder: Path) -> Config:
    """The configuration with the paths in [compare.sweep] as they would be read in the tables that
    its keys name."""
    assert config.compare is not None
    plain = config.model_copy(update={"compare": None})
    context = {"folders": dict.fromkeys(Config.model_fields, folder)}

    def resolve(dotted: str, value: Any) -> Any:
        if not value or type(value) not in (str, dict):
            return value
        try:
            changed = overridden(plain, {dotted: value}, context)
        except ConfigError:  # It may hold beside other values; if not, the comparison says so.
            return value
        made: Any = changed.model_dump(mode="json", exclude_unset=True)
        for key in dotted.split("."):
            made = made[key]
        return made

    sweep = {
        dotted: tuple(resolve(dotted, value) for value in values)
        for dotted, values in config.compare.sweep.items()
    }
    return config.model_copy(update={"compare": config.compare.model_copy(update={"sweep": sweep})})


def overridden(
    config: Config, changes: Mapping[str, Any], context: dict[str, Any] | None = None
) -> Config:
    """``config`` with other values of dotted keys: ``overridden(config, {"pairs.most": 32, "draft":
    "direct"})``.

    Raises:
        ConfigError: an unknown key, or a value that cannot be.
    """
    values = config.model_dump(mode="json")
    for dotted, value in changes.items():
        _put(values, dotted, value)
    where = ", ".join(f"{key} = {json.dumps(value)}" for key, value in changes.items())
    return validate(Config, values, where, context)


def _explain(model: type[BaseModel], error: ValidationError, where: str) -> str:
    lines = [f"{where}:"]
    for problem in error.errors(include_url=False):
        location = problem["loc"]
        keys = [
            str(part) for part in (location[:1] + location[2:] if _has_kind(location) else location)
        ]
        dotted, given = ".".join(keys), problem.get("input")
        if problem["type"] == "extra_forbidden":
            known = _list_keys(model, location[:-1])
            moved = MOVED.get(".".join(keys[:-1]), {}).get(keys[-1])
            meant = f" Write {moved}." if moved else nearest(keys[-1], known)
            lines.append(
                f"  {dotted}: there is no such key.{meant} Known here: {', '.join(sorted(known))}"
            )
        elif (
            problem["type"] == "unknown_keys"
        ):  # of settings that say themselves what is known, as those of tuning do
            lines.append(f"  {dotted}{'.' if dotted else ''}{problem['msg']}")
        elif problem["type"] == "missing":
            lines.append(f"  {dotted}: is missing.{_hint(keys)}")
        elif problem["type"] == "union_tag_not_found":
            lines.append(f"  {dotted}.kind: is missing. Give one of: {', '.join(KINDS)}.")
        elif problem["type"] == "union_tag_invalid":
            kind = str(problem.get("ctx", {}).get("tag", ""))
            meant = nearest(_MEANT.get(kind, kind), KINDS)
            lines.append(
                f'  {dotted}.kind: there is no kind "{masked(kind)}".{meant} Known: '
                f"{', '.join(KINDS)}."
            )
        else:
            # What stands in the place of a variable's name may be a key: it is not repeated.
            shown = (
                "" if keys and keys[-1] == "api_key_env" else f" (given: {_format_value(given)})"
            )
            lines.append(
                f"  {dotted or model.__name__}: "
                f"{_EXPECTED.get(problem['type'], problem['msg'])}{shown}"
            )
    return "\n".join(lines).replace("Value error, ", "")


# What stands under "server" or in a model's id is easily taken for a kind.
_MEANT = {
    "openai": "api",
    "llama_cpp": "server",
    "vllm": "server",
    "ollama": "server",
    "hub": "in_process",
}
# pydantic's own words for these speak of Python, not of TOML.
_EXPECTED = {
    "dict_type": "a table is expected",
    "model_type": "a table is expected",
    "model_attributes_type": "a table is expected",
    "tuple_type": 'a list is expected, such as ["one", "two"]',
}


def _has_kind(location: tuple[int | str, ...]) -> bool:
    """Whether pydantic put the kind of an LM into the location: ``("weak", "server",
    "api_bas")``."""
    return len(location) > 1 and location[0] in ROLES and location[1] in KINDS


def _format_value(given: Any) -> str:
    """What was given, with secrets masked; of a whole table only the keys."""
    if isinstance(given, dict):
        return ", ".join(str(key) for key in cast("dict[Any, Any]", given)) or "an empty table"
    return masked(repr(given))


def _list_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The keys of the table at ``location``; a union's member is chosen by the tag that pydantic
    puts into the location."""
    current: Any = model
    for place, part in enumerate(location):
        if place == 1 and _has_kind(location):
            current = KINDS[str(part)]
            continue
        annotation = (
            current.model_fields[str(part)].annotation
            if str(part) in current.model_fields
            else None
        )
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        current = next(
            (c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), current
        )
    return list(current.model_fields)


def _hint(keys: list[str]) -> str:
    if len(keys) > 1:
        return ""
    if keys[0] in ROLES:
        return (
            " Name a backend's TOML after the task's, such as "
            "programs/backends/in_process.toml or one that `cowest new` wrote."
        )
    return (
        (
            " Name the task's TOML first, such as programs/handbook.toml or one that `cowest new` "
            "wrote."
        )
        if keys[0] in Config.model_fields
        else ""
    )
