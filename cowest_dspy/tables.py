"""The tables of a TOML, one frozen pydantic model each; config.py puts them together and reads files."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from cowest_dspy.errors import nearest
from cowest_dspy.masking import remember_secret

DraftFormat = Literal["direct", "knowledge", "chain_of_thought"]
"""What a draft is: an answer, what is known about it, or reasoning and an answer."""


MAX_FAILED = 0.3
"""The largest part of drafts that may fail, unless one says otherwise."""
LEAST_PAIRS = 8
"""Fewer preference pairs (or labelled drafts) are not trained on, unless one says otherwise."""


class Table(BaseModel):
    """A table of a TOML: frozen, and closed to keys that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class InProcess(Table):
    """A transformers model in this process (CPU or one GPU)."""

    kind: Literal["in_process"]
    model: str = Field(description="a folder with config.json and *.safetensors or a GGUF file, relative to this file, or a Hub id")
    adapter: str | None = Field(None, description="a folder with a PEFT adapter to start from")
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = Field(
        "auto", description="what weights are held in: auto is what the machine computes in best; int8 only where nothing is tuned"
    )
    temperature: float = Field(0.0, ge=0, le=2, description="of sampling; 0: the likeliest token; drafts have that of [collect]")
    max_tokens: int = Field(256, ge=1, description="tokens of one answer, at most; a longer one is cut off, and counts as failed")
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
    temperature: float | None = Field(
        0.0, ge=0, le=2, description="of sampling; 0: the likeliest token; drafts have that of [collect]"
    )
    max_tokens: int = Field(512, ge=1, description="tokens of one answer, at most; a longer one is cut off, and counts as failed")
    num_retries: int = Field(4, ge=0, description="retries of a passing failure, with exponential backoff")
    timeout: float = Field(120.0, gt=0, description="seconds")
    concurrency: int = Field(8, ge=1, description="calls under way at once, at most")
    requests_per_minute: int | None = Field(None, ge=1, description="respected across all threads")
    tokens_per_minute: int | None = Field(None, ge=1, description="prompt and generated tokens, respected across all threads")
    price: Price | None = Field(None, description="overrides the price table that DSPy ships")

    @field_validator("api_key_env")
    @classmethod
    def _is_a_name(cls, value: str | None) -> str | None:
        return name_of_a_variable(value)


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
    temperature: float = Field(0.0, ge=0, le=2, description="of sampling; 0: the likeliest token; drafts have that of [collect]")
    max_tokens: int = Field(256, ge=1, description="tokens of one answer, at most; a longer one is cut off, and counts as failed")
    num_retries: int = Field(4, ge=0, description="retries of a passing failure, with exponential backoff")
    timeout: float = Field(600.0, gt=0, description="seconds; an answer waits for those before it")
    concurrency: int = Field(32, ge=1, description="calls under way at once, at most")

    @field_validator("api_key_env")
    @classmethod
    def _is_a_name(cls, value: str | None) -> str | None:
        return name_of_a_variable(value)

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
    temperature: float = Field(0.0, ge=0, le=2, description="of sampling; 0: the likeliest token; drafts have that of [collect]")
    max_tokens: int = Field(256, ge=1, description="tokens of one answer, at most; a longer one is cut off, and counts as failed")
    concurrency: int = Field(8, ge=1, description="calls under way at once, at most")


LMSettings = Annotated[InProcess | Api | Server | Engine, Field(discriminator="kind")]
KINDS: dict[str, type[Table]] = {"in_process": InProcess, "api": Api, "server": Server, "engine": Engine}


def name_of_a_variable(value: str | None) -> str | None:
    """The value of an ``api_key_env``; an error where it cannot be a variable's name. The key that it holds is masked from now on,
    also by commands that need no key and only show what a run has written."""
    if (value is not None and not value.replace("_", "").isalnum()) or (value and value.startswith(("sk-", "hf_"))):
        raise ValueError("give the NAME of an environment variable, for instance OPENAI_API_KEY, never a key itself")
    remember_secret(os.environ.get(value or ""))
    return value


class Data(Table):
    """Where the examples come from, and how many of each split are used."""

    source: str = Field(
        description='"recipe.py:examples" (a function of split and seed), a .jsonl with a "split" field, or "hub:NAME"'
    )
    inputs: tuple[str, ...] = Field(min_length=1, description="the fields that the program is given")
    seed: int = Field(0, ge=0, description="given to a recipe's function; the same for every seed of the run")
    rows: str | None = Field(
        None, description='a folder with the rows of a dataset, or "hub:NAME": given to the recipe\'s functions as rows='
    )
    train: int | None = Field(None, ge=1, description="use the first so many; all by default")
    dev: int | None = Field(None, ge=1, description="as train: what rounds are taken or rolled back by")
    test: int | None = Field(None, ge=1, description="as train: what is only counted, at the end")


class Sft(Table):
    """[sft]: domain fine-tuning. ``drafts`` and ``answers`` name functions of a seed that give prompt/completion rows."""

    drafts: str = Field(description="rows that teach the weak model to draft")
    answers: str | None = Field(None, description="rows that teach it to answer alone: the fair weak baseline")
    settings: dict[str, Any] = Field(default_factory=dict, description="as cowest_dspy.tuning.SFT")
    answer_settings: dict[str, Any] = Field(default_factory=dict, description="as cowest_dspy.tuning.SFT")


class Collect(Table):
    """[collect]: sampling of drafts and measurement of their influence."""

    drafts: int = Field(4, ge=2, description="drafts sampled for each example")
    temperature: float = Field(1.0, gt=0, le=2, description="of the drafts: higher ones differ more, and fail more often")
    top_p: float = Field(1.0, gt=0, le=1, description="drafts are sampled from the likeliest tokens that together have this part")
    adaptive: bool = Field(False, description="stop sampling an example when it has a pair with [pairs] margin, or hardly will")
    answers: int = Field(
        1, ge=1, description="answers of a strong model that samples, with and without a draft: scores are averaged"
    )
    max_failed: float = Field(MAX_FAILED, ge=0, le=1, description="the run stops when a larger part of the drafts fails")
    engine: Literal["local", "ray"] | None = Field(
        None, description="where the models answer: on this machine, or on a cluster; by default ray where there is a [ray]"
    )


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
    least: int = Field(LEAST_PAIRS, ge=1, description="fewer pairs than this are not trained on")
    most: int | None = Field(None, ge=1, description="use so many pairs of a round, drawn with the run's seed; all by default")
    source: str | None = Field(None, pattern=r"\.jsonl$", description="pairs from elsewhere, instead of the run's own")


class InfluenceRules(Table):
    """[influence]: what gives an answer its score when drafts are compared; by default the metric alone."""

    metric: float = Field(1.0, ge=0, description="weight of the task's metric")
    judge: float = Field(0.0, ge=0, description="weight of the judge, a model that rates by a rubric: [judge], or the strong one")
    likelihood: float = Field(
        0.0, ge=0, description="weight of the gold answer's probability under the strong model (in_process only)"
    )
    gold: str = Field("answer", description="the field with the gold answer, for judge and likelihood")
    rubric: str | None = Field(None, description='"recipe.py:name", a Rubric; by default coherence and consistency, as in CoWest')
    repeats: int = Field(1, ge=1, description="how often a judge that samples is asked about one answer; ratings are averaged")
    noise: int = Field(
        0, ge=0, description="train examples that the strong model alone answers twice, for the noise floor: one call each"
    )

    @model_validator(mode="after")
    def _something_scores(self) -> InfluenceRules:
        if not self.metric + self.judge + self.likelihood:
            raise ValueError("metric, judge and likelihood are all 0: nothing would score an answer")
        if self.repeats > 1 and not self.judge:
            raise ValueError("repeats is of the judge, and judge is 0: give it a weight")
        return self

    @property
    def weights(self) -> dict[str, float]:
        """The evaluators that count, with their weights."""
        every = {"metric": self.metric, "judge": self.judge, "likelihood": self.likelihood}
        return {name: weight for name, weight in every.items() if weight}


class RoundRules(Table):
    """[rounds]: how often drafts are collected and the weak model is tuned, and when a tuned model is taken."""

    count: int = Field(1, ge=1, description="rounds, at most: each collects drafts of the model that the last one left")
    confidence: float = Field(0.9, gt=0, lt=1, description="of the paired bootstrap interval of the gain on the dev split")
    least_gain: float = Field(
        0.0, ge=-1, le=1, description="a tuned model is taken when the lower end of that interval is above this"
    )
    more_failures: float = Field(0.05, ge=0, le=1, description="the part of the dev split that may fail in addition, at most")
    patience: int = Field(1, ge=1, description="rounds in a row that may be rolled back before no more is tried")
    replay: bool = Field(False, description="tune on the pairs of earlier rounds too")


class StepRules(Table):
    """[cycle.steps.NAME]: one optimiser of the cycle."""

    optimizer: str = Field(description='"GEPA", "MIPROv2", "SIMBA", "BootstrapFewShot", "LabeledFewShot", or "recipe.py:make"')
    target: Literal["draft", "refine", "both"] = Field("both", description="whose prompts it may change; alone's never change")
    settings: dict[str, Any] = Field(default_factory=dict, description="its own keyword arguments")
    compile: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of its compile")
    max_tokens: int | None = Field(
        None, ge=1, description="of a proposal by the strong model; default: 1024, or [strong] max_tokens where that is more"
    )


class CycleRules(Table):
    """[cycle]: optimisers in order. "sft" is [sft], only as the first; "weights" are the [rounds]; others are in ``steps``."""

    strategy: str = Field(description='for instance "sft -> prompts -> weights -> prompts"')
    steps: dict[str, StepRules] = Field(default_factory=dict, description="the optimisers that strategy names, by name")

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the strategy, in order."""
        return tuple(name.strip() for name in self.strategy.split("->"))

    @model_validator(mode="after")
    def _known(self) -> CycleRules:
        known = ("sft", "weights", *self.steps)
        for place, name in enumerate(self.names):
            if name not in known:
                others = f"Add [cycle.steps.{name}], or use {', '.join(known)}"
                raise ValueError(f'strategy names "{name}", which is no step.{nearest(name, known)} {others}')
            if name == "sft" and place:
                raise ValueError('"sft" is domain fine-tuning, from the base model: it can only be the first step')
        taken = [name for name in ("sft", "weights") if name in self.steps]
        if taken:
            raise ValueError(f'"{taken[0]}" is a step of its own: give the optimiser in steps another name')
        return self


class Arms(Table):
    """[evaluate]: what is compared on the test split."""

    split: Literal["dev", "test"] = Field("test", description="whose questions are asked")
    weak: str | None = Field(None, description='the weak model alone: "recipe.py:program"')
    oracle: str | None = Field(None, description="a field with gold background: the ceiling arm")
    controls: tuple[Literal["shuffled", "sft_on_chosen", "more_sft", "by_correctness"], ...] = Field(
        (), description="arms that can say no"
    )


class Shown(Table):
    """[report]: what pages and the terminal show."""

    hide: tuple[str, ...] = Field((), description="inputs that are shown as their length only; the store and report.json keep them")


class TrackingRules(Table):
    """[tracking]: where else a run is logged while it goes on; nowhere by default."""

    to: tuple[Literal["mlflow", "trackio", "wandb"], ...] = Field(min_length=1, description="the trackers that are told")
    project: str | None = Field(
        None, min_length=1, description="MLflow's experiment, the project of trackio and W&B; by default the task's name"
    )
    name: str | None = Field(None, min_length=1, description='of the run; by default the task\'s name and its seed, "toy, seed 0"')
    uri: str | None = Field(
        None, description="of MLflow: http://..., sqlite:///FILE; by default MLFLOW_TRACKING_URI, otherwise what MLflow takes"
    )
    artifacts: bool = Field(True, description="upload report, configuration, pairs, comparison, and the bundle if there is one")
    wait: float = Field(60.0, gt=0, description="seconds that a command waits for a tracker, at its end, before it goes without")

    @field_validator("to")
    @classmethod
    def _each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(value))

    @field_validator("uri")
    @classmethod
    def _no_secret(cls, value: str | None) -> str | None:
        if value is not None and "@" in value.partition("://")[2].partition("/")[0]:
            raise ValueError(
                "a user and a password do not belong into a file: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
                "MLFLOW_TRACKING_URI, in the environment"
            )
        return value


# The options of each kind, besides kind and title.
_ARM_OPTIONS: dict[str, tuple[str, ...]] = {
    "alone": (),
    "strong": ("style",),
    "weak": ("weak", "shots"),
    "self_refine": ("rounds",),
    "self_consistency": ("samples", "temperature"),
    "rag": ("corpus", "passages"),
    "grounded": ("corpus", "passages", "weak"),
    "super_icl": ("weak", "shots", "samples", "temperature"),
    "collaboration": ("draft", "weak"),
    "oracle": ("field",),
    "control": ("control", "draft"),
    "module": ("program", "role"),
}


class ArmRules(Table):
    """[compare.arms.NAME]: one way to answer the examples. ``kind`` says which; the other keys are of some kinds only."""

    kind: Literal[
        "alone", "strong", "weak", "self_refine", "self_consistency", "rag", "grounded", "super_icl", "collaboration", "oracle",
        "control", "module",
    ] = Field(description="who answers, and how: the table in compare.md")  # fmt: skip
    title: str | None = Field(None, description="for people")
    weak: Literal["base", "sft", "tuned"] = Field("sft", description="the weak model: as it came, after [sft], after all tuning")
    draft: DraftFormat | None = Field(
        None, description="collaboration, control: another format of drafts, with its own SFT and tuning"
    )
    style: Literal["direct", "chain_of_thought"] = Field("direct", description="strong: how it answers by itself")
    shots: int = Field(0, ge=0, description="weak, super_icl: worked examples of the train split in the prompt")
    rounds: int = Field(1, ge=1, description="self_refine: how often the answer is criticised and written anew")
    samples: int = Field(5, ge=2, description="self_consistency, super_icl: answers that are sampled for each example")
    temperature: float = Field(0.7, gt=0, le=2, description="of these samples")
    corpus: str | None = Field(None, description='rag, grounded: "recipe.py:corpus", a function that gives texts')
    passages: int = Field(3, ge=1, description="rag, grounded: texts that are retrieved for each example")
    field: str | None = Field(None, description="oracle: the field with gold background; by default that of [evaluate]")
    control: Literal["shuffled", "sft_on_chosen", "more_sft", "by_correctness", "other_draft"] | None = Field(
        None, description="control: what is not influence"
    )
    program: str | None = Field(None, description='module: "recipe.py:make", a function that gives any dspy.Module')
    role: Literal["weak", "strong"] = Field("strong", description="module: which model it runs on")

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


class CompareRules(Table):
    """[compare]: the arms of ``cowest compare``, all on the same examples, and ablations as a grid."""

    against: str = Field("alone", description="the arm that every other one is tested against")
    split: Literal["dev", "test"] = Field("test", description="whose questions are asked")
    seeds: tuple[int, ...] = Field((), description="of runs that are compared as one; by default the run's own seed")
    also: tuple[str, ...] = Field((), description='more scores, beside the metric: "metric.py:macro_f1"')
    arms: dict[str, ArmRules] = Field(default_factory=dict, description="the ways to answer, by name")
    sweep: dict[str, tuple[Any, ...]] = Field(
        default_factory=dict, description='"dotted.key" = [values]: the tuned collaboration with every combination of them'
    )

    @field_validator("arms")
    @classmethod
    def _names_of_files(cls, value: dict[str, ArmRules]) -> dict[str, ArmRules]:
        for name in value:
            if not name.replace("_", "").replace("-", "").isalnum():
                raise ValueError(f'the name of an arm is made of letters, digits, "_" and "-"; given: "{name}"')
        return value

    @model_validator(mode="after")
    def _whole(self) -> CompareRules:
        if self.arms and self.against not in self.arms:
            raise ValueError(f'against names "{self.against}", which is no arm.{nearest(self.against, self.arms)}')
        if not self.arms and not self.sweep:
            raise ValueError("there is nothing to compare: declare [compare.arms.NAME] tables, or a [compare.sweep]")
        if any(not values for values in self.sweep.values()):
            raise ValueError("sweep: every key needs a list of values")
        return self
