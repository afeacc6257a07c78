"""What a TOML may say: frozen pydantic models, one per table; a key that is not known is an error
that names the nearest one.

A run is configured by one or several files, read from left to right; a later file replaces whole
tables, so that nothing of an earlier backend survives in a later one:

    load_config(["programs/handbook.toml", "programs/backends/in_process.toml"])

A later [sft] or [judge] without any key takes the earlier one away.

Paths and references in a file are relative to that file. No secret stands in a file: an API key is
given by the NAME of an environment variable.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from cowest_dspy.errors import ConfigError, masked, nearest
from cowest_dspy.experiment.tables import Arms, CompareRules, Data, Shown, TrackingRules
from cowest_dspy.influence.config import Collect, InfluenceRules
from cowest_dspy.lms.config import KINDS, LMSettings, Server
from cowest_dspy.optimizers.config import CycleRules, RoundRules
from cowest_dspy.pairs.config import PairRules
from cowest_dspy.program.collaboration import DraftFormat
from cowest_dspy.scale.config import RayRules
from cowest_dspy.serve.config import ServeRules
from cowest_dspy.store.budget import Budget
from cowest_dspy.tuning.config import Sft
from cowest_dspy.utils.reading import expand_user, file_errors, read_toml
from cowest_dspy.utils.table import Table

Settings = TypeVar("Settings", bound=BaseModel)


class Config(Table):
    """A whole configuration: one task and its backends."""

    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9_-]*$",
        description="of the task; the run's folder is runs/NAME by default",
    )
    program: str = Field(description='"recipe.py:program", a function that gives a Collaboration')
    metric: str = Field(description='"metric.py:name", a DSPy metric with values in [0, 1]')
    draft: DraftFormat | None = Field(
        None, description="the format of drafts, given to the program's and [sft]'s functions"
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

    def at_once(self, role: str) -> int:
        """Calls to a role's model that may be under way at once: its concurrency, on a cluster that
        of each shard."""
        settings: LMSettings = getattr(self, role) or self.strong
        return settings.concurrency


ROLES = ("weak", "strong", "judge")

# Where a file may name another file or code: these values are read relative to the file in which
# they stand.
_REFERENCES = (
    "program",
    "metric",
    "data.source",
    "sft.drafts",
    "sft.answers",
    "influence.rubric",
    "pairs.source",
    "evaluate.weak",
    *(f"{role}.engine" for role in ROLES),
)
_FOLDERS = (
    "data.rows",
    *(f"{role}.{key}" for role in ROLES for key in ("model", "weights", "adapter")),
)


def load_config(files: Iterable[str | Path], *, seed: int | None = None) -> Config:
    """The configuration that ``files`` make together: a later file replaces whole tables of an
    earlier one.

    ``seed`` overrides the one in the files.

    Raises:
        ConfigError: no such file, no TOML, an unknown key (with the nearest known one), a missing
            table, a value out of range.
    """
    merged: dict[str, Any] = {}
    names = [Path(file) for file in files]
    for file in names:
        merged.update(_read(file))
    if seed is not None:
        merged["seed"] = seed
    return validate(Config, merged, " + ".join(str(name) for name in names) or "no file")


def validate(model: type[Settings], values: Mapping[str, Any], where: str) -> Settings:
    """``values`` as an instance of ``model``.

    Raises:
        ConfigError: naming every key that is wrong, what was expected, and the nearest known key of
            one that is unknown.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(model, error, where)) from None


def fingerprint(config: Config) -> str:
    """The configuration as canonical JSON; equal for equal settings."""
    return json.dumps(config.model_dump(mode="json"), sort_keys=True)


def _read(file: Path) -> dict[str, Any]:
    with file_errors(ConfigError, file):
        if not file.exists():
            raise ConfigError(f"There is no file {file}.{_files_near(file)}")
        return _anchored_in(file.parent, read_toml(file, ConfigError))


def _anchored_in(folder: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """The tables of a file in ``folder``, with every path and reference in them made absolute."""
    for dotted in _REFERENCES:
        _replace(raw, dotted, _anchored_reference, folder)
    for dotted in _FOLDERS:
        _replace(raw, dotted, _anchored_folder, folder)
    _replace(raw, "tracking.uri", _anchored_uri, folder)
    for dotted, values in _tables(raw, "compare", "sweep").items():
        if isinstance(values, list):
            raw["compare"]["sweep"][dotted] = [
                _anchored(dotted, value, folder) for value in cast("list[Any]", values)
            ]
    for step in _tables(raw, "cycle", "steps").values():
        _replace({"step": step}, "step.optimizer", _anchored_reference, folder)
    for arm in _tables(raw, "compare", "arms").values():
        for key in ("corpus", "program"):
            _replace({"arm": arm}, f"arm.{key}", _anchored_reference, folder)
    also: Any = raw["compare"].get("also") if isinstance(raw.get("compare"), dict) else None
    if isinstance(also, list):
        raw["compare"]["also"] = [
            _anchored_reference(one, folder) for one in cast("list[Any]", also)
        ]
    for role in ROLES:
        _replace(raw, f"{role}.log", _anchored_file, folder)
        _replace(raw, f"{role}.command", _anchored_command, folder)
    return raw


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


def _tables(raw: dict[str, Any], table: str, key: str) -> dict[str, Any]:
    """The tables under ``[table.key]``, none where there is something else."""
    found: Any = raw[table].get(key) if isinstance(raw.get(table), dict) else None
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}


def _anchored(dotted: str, value: Any, folder: Path) -> Any:
    """The value of a dotted key as it would be read in the file itself; a whole table is read key
    by key."""
    if isinstance(value, dict):
        table = cast("dict[str, Any]", value)
        return {key: _anchored(f"{dotted}.{key}", one, folder) for key, one in table.items()}
    if dotted in _REFERENCES:
        return _anchored_reference(value, folder)
    return _anchored_folder(value, folder) if dotted in _FOLDERS else value


def overridden(config: Config, changes: Mapping[str, Any]) -> Config:
    """``config`` with other values of dotted keys: ``overridden(config, {"pairs.most": 32, "draft":
    "direct"})``.

    Raises:
        ConfigError: an unknown key, or a value that cannot be.
    """
    values = config.model_dump(mode="json")
    for dotted, value in changes.items():
        *tables, key = dotted.split(".")
        place = values
        for name in tables:
            if not isinstance(place.get(name), dict):
                place[name] = {}
            place = place[name]
        place[key] = value
    return validate(
        Config, values, ", ".join(f"{key} = {json.dumps(value)}" for key, value in changes.items())
    )


def _replace(
    raw: dict[str, Any], dotted: str, change: Callable[[Any, Path], Any], folder: Path
) -> None:
    table_name, _, key = dotted.rpartition(".")
    table: Any = raw.get(table_name) if table_name else raw
    value = cast("dict[str, Any]", table).get(key) if isinstance(table, dict) else None
    if isinstance(value, str | list):
        table[key] = change(value, folder)


def _anchored_file(value: Any, folder: Path) -> Any:
    return str((folder / expand_user(value)).resolve()) if isinstance(value, str) else value


def _anchored_uri(value: Any, folder: Path) -> Any:
    """A file of SQLite, or a folder, relative to the file in which it stands; another address as it
    is."""
    scheme, found, path = str(value).rpartition("sqlite:///")
    if found and not scheme and not path.startswith("/"):
        return found + str((folder / path).resolve())
    return value if found else _anchored_folder(value, folder)


def _anchored_command(value: Any, folder: Path) -> Any:
    if not isinstance(value, list):
        return value
    return [
        part.replace("{here}", str(folder.resolve())) if isinstance(part, str) else part
        for part in cast("list[Any]", value)
    ]


def split_reference(value: str) -> tuple[str, str, str]:
    """``"recipe.py:name"`` as ``("recipe.py", ":", "name")``; what names nothing in a file, as it
    is with two empty strings."""
    return value.rpartition(":") if value.rpartition(":")[2].isidentifier() else (value, "", "")


def _anchored_reference(value: Any, folder: Path) -> Any:
    """ "recipe.py:name" or "rows.jsonl" as an absolute path; an installed "package.module:name" or
    "hub:..." as it is."""
    if not isinstance(value, str):
        return value
    path, colon, name = split_reference(value)
    if not path.endswith((".py", ".jsonl")):
        return value
    return str((folder / expand_user(path)).resolve()) + colon + name


def _anchored_folder(value: Any, folder: Path) -> Any:
    """A folder or GGUF file relative to the file, when it is one or is written like one; otherwise
    a Hub id or a name as it is."""
    if not isinstance(value, str):
        return value
    path = folder / expand_user(value)
    return (
        str(path.resolve())
        if value.startswith((".", "~", "/")) or path.is_dir() or path.suffix == ".gguf"
        else value
    )


# Keys that had another name once.
RENAMED = {"collect.max_failed": "max_errors"}


def _explain(model: type[BaseModel], error: ValidationError, where: str) -> str:
    lines = [f"{where}:"]
    for problem in error.errors(include_url=False):
        location = problem["loc"]
        keys = [
            str(part) for part in (location[:1] + location[2:] if _has_kind(location) else location)
        ]
        dotted, given = ".".join(keys), problem.get("input")
        if problem["type"] == "extra_forbidden":
            known = _known_keys(model, location[:-1])
            new = RENAMED.get(dotted)
            renamed = f' It is called "{new}" now.' if new else nearest(keys[-1], known)
            meant = GONE.get(dotted) or renamed
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
            shown = "" if keys and keys[-1] == "api_key_env" else f" (given: {_shown(given)})"
            lines.append(
                f"  {dotted or model.__name__}: "
                f"{_EXPECTED.get(problem['type'], problem['msg'])}{shown}"
            )
    return "\n".join(lines).replace("Value error, ", "")


# Keys of earlier versions, and what there is instead.
GONE = {
    "collect.engine": " A [ray] table alone spreads a collection over a cluster; leave it out, or "
    "write an empty one in a later file, to stay on this machine.",
}
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


def _shown(given: Any) -> str:
    """What was given, with secrets masked; of a whole table only the keys."""
    if isinstance(given, dict):
        return ", ".join(str(key) for key in cast("dict[Any, Any]", given)) or "an empty table"
    return masked(repr(given))


def _known_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
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
