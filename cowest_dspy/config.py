"""What a TOML may say: frozen pydantic models, one per table; a key that is not known is an error that names the nearest one.

A run is configured by one or several files, read from left to right; a later file replaces whole tables, so that nothing of an
earlier backend survives in a later one:

    load_config(["programs/handbook.toml", "programs/backends/in_process.toml"])

A later [sft] or [judge] without any key takes the earlier one away.

Paths and references in a file are relative to that file. No secret stands in a file: an API key is given by the NAME of an
environment variable.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cowest_dspy.budget import Budget
from cowest_dspy.errors import ConfigError, masked, nearest

Settings = TypeVar("Settings", bound=BaseModel)


class Table(BaseModel):
    """A table of a TOML: frozen, and closed to keys that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class InProcess(Table):
    """A transformers model in this process (CPU or one GPU)."""

    kind: Literal["in_process"]
    model: str = Field(description="a folder with config.json and *.safetensors or a GGUF file, relative to this file, or a Hub id")
    adapter: str | None = Field(None, description="a folder with a PEFT adapter to start from")
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = "auto"
    temperature: float = Field(0.0, ge=0, le=2)
    max_tokens: int = Field(256, ge=1)
    concurrency: int = Field(32, ge=1, description="sequences computed together, at most")


class Price(Table):
    """What an API takes, in US dollars per million tokens."""

    input: float = Field(ge=0, description="USD per million prompt tokens")
    output: float = Field(ge=0, description="USD per million generated tokens")


class Api(Table):
    """A hosted model: anything that dspy.LM reaches over a network."""

    kind: Literal["api"]
    model: str = Field(description='as for dspy.LM, for instance "openai/gpt-5-mini"')
    api_base: str | None = Field(None, description="the endpoint of an OpenAI-compatible server")
    api_key_env: str | None = Field(None, description="the NAME of the environment variable that holds the key")
    temperature: float | None = Field(0.0, ge=0, le=2)
    max_tokens: int = Field(512, ge=1)
    num_retries: int = Field(4, ge=0, description="retries of a passing failure, with exponential backoff")
    timeout: float = Field(120.0, gt=0, description="seconds")
    concurrency: int = Field(8, ge=1, description="calls under way at once, at most")
    requests_per_minute: int | None = Field(None, ge=1, description="respected across all threads")
    tokens_per_minute: int | None = Field(None, ge=1, description="prompt and generated tokens, respected across all threads")
    price: Price | None = Field(None, description="overrides the price table that DSPy ships")

    @field_validator("api_key_env")
    @classmethod
    def _is_a_name(cls, value: str | None) -> str | None:
        return _name_of_a_variable(value)


class Server(Table):
    """A server that speaks the OpenAI protocol: one that runs already (``api_base``), or one that is started (``command``)."""

    kind: Literal["server"]
    server: Literal["openai", "llama_cpp", "vllm"] = Field(
        "openai", description="what speaks there: it decides how adapters are put in (openai: not at all)"
    )
    model: str = Field(description="the name under which it serves the model")
    api_base: str | None = Field(None, description="of a server that runs already, for instance http://127.0.0.1:8000/v1")
    command: tuple[str, ...] = Field(
        (),
        description='starts it when needed; "{port}" becomes a free port, "{here}" this file\'s folder, "{python}" this Python',
    )
    weights: str | None = Field(
        None, description="the same model as a folder or Hub id: needed to tune it, and to name it by content"
    )
    adapter: str | None = Field(None, description="a folder with a PEFT adapter to start from")
    api_key_env: str | None = Field(None, description="the NAME of the environment variable that holds the key")
    startup: float = Field(600.0, gt=0, description="seconds until a started server must answer")
    log: str | None = Field(None, description="the file that a started server writes to, relative to this file")
    temperature: float = Field(0.0, ge=0, le=2)
    max_tokens: int = Field(256, ge=1)
    num_retries: int = Field(4, ge=0, description="retries of a passing failure, with exponential backoff")
    timeout: float = Field(600.0, gt=0, description="seconds; an answer waits for those before it")
    concurrency: int = Field(32, ge=1, description="calls under way at once, at most")

    @field_validator("api_key_env")
    @classmethod
    def _is_a_name(cls, value: str | None) -> str | None:
        return _name_of_a_variable(value)

    @model_validator(mode="after")
    def _one_way(self) -> Server:
        if (self.api_base is None) == (not self.command):
            raise ValueError("give either api_base (a server that runs already) or command (one that is to be started)")
        if self.adapter and self.server == "openai":
            raise ValueError('an adapter needs server = "llama_cpp" or "vllm": the OpenAI protocol has no way to load one')
        return self


class Engine(Table):
    """An engine from your own code: a function that returns an object with complete(Request) -> Response."""

    kind: Literal["engine"]
    engine: str = Field(description='a reference such as "my_engine.py:make"')
    model: str = Field("engine/custom", description="the id under which its answers are stored")
    temperature: float = Field(0.0, ge=0, le=2)
    max_tokens: int = Field(256, ge=1)
    concurrency: int = Field(8, ge=1)


LMSettings = Annotated[InProcess | Api | Server | Engine, Field(discriminator="kind")]
KINDS: dict[str, type[Table]] = {"in_process": InProcess, "api": Api, "server": Server, "engine": Engine}


def _name_of_a_variable(value: str | None) -> str | None:
    if (value is not None and not value.replace("_", "").isalnum()) or (value and value.startswith(("sk-", "hf_"))):
        raise ValueError("give the NAME of an environment variable, for instance OPENAI_API_KEY, never a key itself")
    return value


class Data(Table):
    """Where the examples come from, and how many of each split are used."""

    source: str = Field(
        description='"recipe.py:examples" (a function of split and seed), a .jsonl with a "split" field, or "hub:NAME"'
    )
    inputs: tuple[str, ...] = Field(min_length=1, description="the fields that the program is given")
    seed: int = Field(0, ge=0, description="given to a recipe's function; the same for every seed of the run")
    train: int | None = Field(None, ge=1, description="use the first so many; all by default")
    dev: int | None = Field(None, ge=1)
    test: int | None = Field(None, ge=1)


class Sft(Table):
    """[sft]: domain fine-tuning. ``drafts`` and ``answers`` name functions of a seed that give prompt/completion rows."""

    drafts: str = Field(description="rows that teach the weak model to draft")
    answers: str | None = Field(None, description="rows that teach it to answer alone: the fair weak baseline")
    settings: dict[str, Any] = Field(default_factory=dict, description="as cowest_dspy.tuning.SFT")
    answer_settings: dict[str, Any] = Field(default_factory=dict, description="as cowest_dspy.tuning.SFT")


class Collect(Table):
    """[collect]: sampling of drafts and measurement of their influence."""

    drafts: int = Field(4, ge=2, description="drafts sampled for each example")
    temperature: float = Field(1.0, gt=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    adaptive: bool = Field(False, description="stop sampling an example when it has a pair with [pairs] margin, or hardly will")
    answers: int = Field(
        1, ge=1, description="answers of a strong model that samples, with and without a draft: scores are averaged"
    )
    max_failed: float = Field(0.3, ge=0, le=1, description="the run stops when a larger part of the drafts fails")


class PairRules(Table):
    """[pairs]: which drafts become a preference pair."""

    margin: float = Field(0.5, gt=0, le=2, description="smallest difference of influence between chosen and rejected")
    strategy: Literal["ranked", "paper", "all"] = Field(
        "ranked", description="best against worst; all that helped against all that did not; all with the margin"
    )
    per_example: int | None = Field(
        None, ge=1, description='pairs of one example, at most; by default 1 if "ranked", else any number'
    )
    near: float = Field(0.95, gt=0, le=1, description="texts that are at least so similar are no pair")
    leak: str | None = Field(None, description="a gold field that a chosen draft must not say, where that is cheating")
    length_ratio: float | None = Field(None, ge=1, description="the longer text of a pair by the shorter one, in words, at most")
    least: int = Field(8, ge=1, description="fewer pairs than this are not trained on")
    source: str | None = Field(None, pattern=r"\.jsonl$", description="pairs from elsewhere, instead of the run's own")


class Arms(Table):
    """[evaluate]: what is compared on the test split."""

    split: Literal["dev", "test"] = "test"
    weak: str | None = Field(None, description='the weak model alone: "recipe.py:program"')
    oracle: str | None = Field(None, description="a field with gold background: the ceiling arm")
    controls: tuple[Literal["shuffled", "sft_on_chosen", "more_sft"], ...] = Field((), description="arms that can say no")


class Config(Table):
    """A whole configuration: one task and its backends."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    program: str = Field(description='"recipe.py:program", a function that gives a Collaboration')
    metric: str = Field(description='"metric.py:name", a DSPy metric with values in [0, 1]')
    seed: int = Field(0, ge=0)
    rounds: Literal[1] = 1
    data: Data
    weak: LMSettings
    strong: LMSettings
    judge: LMSettings | None = Field(None, description="an evaluator's LM; by default the strong one")
    sft: Sft | None = None
    collect: Collect = Collect()  # pyright: ignore[reportCallIssue]
    pairs: PairRules = PairRules()  # pyright: ignore[reportCallIssue]
    dpo: dict[str, Any] = Field(default_factory=dict, description="as cowest_dspy.tuning.DPO")
    evaluate: Arms = Arms()  # pyright: ignore[reportCallIssue]
    budget: Budget | None = Field(None, description="what the whole run may spend, over all its resumes")

    @field_validator("sft", "judge", "budget", mode="before")
    @classmethod
    def _an_empty_table_takes_the_earlier_one_away(cls, value: Any) -> Any:
        return None if value == {} else value


ROLES = ("weak", "strong", "judge")

# Where a file may name another file or code: these values are read relative to the file in which they stand.
_REFERENCES = (
    "program",
    "metric",
    "data.source",
    "sft.drafts",
    "sft.answers",
    "pairs.source",
    "evaluate.weak",
    *(f"{role}.engine" for role in ROLES),
)
_FOLDERS = tuple(f"{role}.{key}" for role in ROLES for key in ("model", "weights", "adapter"))


def load_config(files: Iterable[str | Path], *, seed: int | None = None) -> Config:
    """The configuration that ``files`` make together: a later file replaces whole tables of an earlier one.

    ``seed`` overrides the one in the files.

    Raises:
        ConfigError: no such file, no TOML, an unknown key (with the nearest known one), a missing table, a value out of range.
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
        ConfigError: naming every key that is wrong, what was expected, and the nearest known key of one that is unknown.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(model, error, where)) from None


def fingerprint(config: Config) -> str:
    """The configuration as canonical JSON; equal for equal settings."""
    return json.dumps(config.model_dump(mode="json"), sort_keys=True)


def _read(file: Path) -> dict[str, Any]:
    try:
        raw = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"There is no file {file}. Tasks are in programs/*.toml, backends in programs/backends/*.toml.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise ConfigError(f"{file} is not TOML: {error}") from None
    for dotted in _REFERENCES:
        _replace(raw, dotted, _anchored_reference, file.parent)
    for dotted in _FOLDERS:
        _replace(raw, dotted, _anchored_folder, file.parent)
    for role in ROLES:
        _replace(raw, f"{role}.log", _anchored_file, file.parent)
        _replace(raw, f"{role}.command", _anchored_command, file.parent)
    return raw


def _replace(raw: dict[str, Any], dotted: str, change: Callable[[Any, Path], Any], folder: Path) -> None:
    table_name, _, key = dotted.rpartition(".")
    table: Any = raw.get(table_name) if table_name else raw
    value = cast("dict[str, Any]", table).get(key) if isinstance(table, dict) else None
    if isinstance(value, str | list):
        table[key] = change(value, folder)


def _anchored_file(value: Any, folder: Path) -> Any:
    return str((folder / Path(value).expanduser()).resolve()) if isinstance(value, str) else value


def _anchored_command(value: Any, folder: Path) -> Any:
    if not isinstance(value, list):
        return value
    return [part.replace("{here}", str(folder.resolve())) if isinstance(part, str) else part for part in cast("list[Any]", value)]


def _anchored_reference(value: Any, folder: Path) -> Any:
    """ "recipe.py:name" or "rows.jsonl" as an absolute path; an installed "package.module:name" or "hub:..." as it is."""
    if not isinstance(value, str):
        return value
    path, colon, name = value.rpartition(":") if value.rpartition(":")[2].isidentifier() else (value, "", "")
    if not path.endswith((".py", ".jsonl")):
        return value
    return str((folder / Path(path).expanduser()).resolve()) + colon + name


def _anchored_folder(value: Any, folder: Path) -> Any:
    """A folder or GGUF file relative to the file, when it is one or is written like one; otherwise a Hub id or a name as it is."""
    if not isinstance(value, str):
        return value
    path = folder / Path(value).expanduser()
    return str(path.resolve()) if value.startswith((".", "~", "/")) or path.is_dir() or path.suffix == ".gguf" else value


def _explain(model: type[BaseModel], error: ValidationError, where: str) -> str:
    lines = [f"{where}:"]
    for problem in error.errors(include_url=False):
        location = problem["loc"]
        keys = [str(part) for part in (location[:1] + location[2:] if _has_kind(location) else location)]
        dotted, given = ".".join(keys), problem.get("input")
        if problem["type"] == "extra_forbidden":
            known = _known_keys(model, location[:-1])
            lines.append(f"  {dotted}: there is no such key.{nearest(keys[-1], known)} Known here: {', '.join(sorted(known))}")
        elif problem["type"] == "missing":
            lines.append(f"  {dotted}: is missing.{_hint(keys)}")
        elif problem["type"] == "union_tag_not_found":
            lines.append(f"  {dotted}.kind: is missing. Give one of: {', '.join(KINDS)}.")
        elif problem["type"] == "union_tag_invalid":
            kind = str(problem.get("ctx", {}).get("tag", ""))
            meant = nearest(_MEANT.get(kind, kind), KINDS)
            lines.append(f'  {dotted}.kind: there is no kind "{masked(kind)}".{meant} Known: {", ".join(KINDS)}.')
        else:
            # What stands in the place of a variable's name may be a key: it is not repeated.
            shown = "" if keys and keys[-1] == "api_key_env" else f" (given: {_shown(given)})"
            lines.append(f"  {dotted or model.__name__}: {_EXPECTED.get(problem['type'], problem['msg'])}{shown}")
    return "\n".join(lines).replace("Value error, ", "")


# What stands under "server" or in a model's id is easily taken for a kind.
_MEANT = {"openai": "api", "llama_cpp": "server", "vllm": "server", "ollama": "server", "hub": "in_process"}
# pydantic's own words for these speak of Python, not of TOML.
_EXPECTED = {
    "dict_type": "a table is expected",
    "model_type": "a table is expected",
    "model_attributes_type": "a table is expected",
    "tuple_type": 'a list is expected, such as ["one", "two"]',
}


def _has_kind(location: tuple[int | str, ...]) -> bool:
    """Whether pydantic put the kind of an LM into the location: ``("weak", "server", "api_bas")``."""
    return len(location) > 1 and location[0] in ROLES and location[1] in KINDS


def _shown(given: Any) -> str:
    """What was given, with secrets masked; of a whole table only the keys."""
    if isinstance(given, dict):
        return ", ".join(str(key) for key in cast("dict[Any, Any]", given)) or "an empty table"
    return masked(repr(given))


def _known_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The keys of the table at ``location``; a union's member is chosen by the tag that pydantic puts into the location."""
    current: Any = model
    for place, part in enumerate(location):
        if place == 1 and _has_kind(location):
            current = KINDS[str(part)]
            continue
        annotation = current.model_fields[str(part)].annotation if str(part) in current.model_fields else None
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        current = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), current)
    return list(current.model_fields)


def _hint(keys: list[str]) -> str:
    if len(keys) > 1:
        return ""
    if keys[0] in ROLES:
        return " Add a backend file, for instance programs/backends/in_process.toml."
    return " It belongs into a task file, for instance programs/handbook.toml." if keys[0] in Config.model_fields else ""
