"""The tables of a language model: in this process, a hosted API, a server, or an engine of one's
own."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from cowest_dspy.utils.table import Table, name_of_a_variable


class InProcess(Table):
    """A transformers model in this process (CPU or one GPU)."""

    kind: Literal["in_process"]
    model: str = Field(
        description="a folder with config.json and *.safetensors or a GGUF file, relative to this "
        "file, or a Hub id"
    )
    adapter: str | None = Field(None, description="a folder with a PEFT adapter to start from")
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = Field(
        "auto",
        description="what weights are held in: auto is what the machine computes in best; int8 "
        "only where nothing is tuned",
    )
    temperature: float = Field(
        0.0,
        ge=0,
        le=2,
        description="of sampling; 0: the likeliest token; drafts have that of [collect]",
    )
    max_tokens: int = Field(
        256,
        ge=1,
        description="tokens of one answer, at most; a longer one is cut off, and counts as failed",
    )
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
    api_key_env: str | None = Field(
        None, description="the NAME of the environment variable that holds the key"
    )
    temperature: float | None = Field(
        0.0,
        ge=0,
        le=2,
        description="of sampling; 0: the likeliest token; drafts have that of [collect]",
    )
    max_tokens: int = Field(
        512,
        ge=1,
        description="tokens of one answer, at most; a longer one is cut off, and counts as failed",
    )
    num_retries: int = Field(
        4, ge=0, description="retries of a passing failure, with exponential backoff"
    )
    timeout: float = Field(120.0, gt=0, description="seconds")
    concurrency: int = Field(8, ge=1, description="calls under way at once, at most")
    requests_per_minute: int | None = Field(None, ge=1, description="respected across all threads")
    tokens_per_minute: int | None = Field(
        None, ge=1, description="prompt and generated tokens, respected across all threads"
    )
    price: Price | None = Field(None, description="overrides the price table that DSPy ships")

    @field_validator("api_key_env")
    @classmethod
    def _is_a_name(cls, value: str | None) -> str | None:
        return name_of_a_variable(value)


class Server(Table):
    """A server that speaks the OpenAI protocol: one that runs already (``api_base``), or one that
    is started (``command``)."""

    kind: Literal["server"]
    server: Literal["openai", "llama_cpp", "vllm"] = Field(
        "openai",
        description="what speaks there: it decides how adapters are put in (openai: not at all)",
    )
    model: str = Field(description="the name under which it serves the model")
    api_base: str | None = Field(
        None, description="of a server that runs already, for instance http://127.0.0.1:8000/v1"
    )
    command: tuple[str, ...] = Field(
        (),
        description='starts it when needed; "{port}" becomes a free port, "{here}" this file\'s '
        'folder, "{python}" this Python',
    )
    weights: str | None = Field(
        None,
        description="the same model as a folder or Hub id: needed to tune it, and to name it by "
        "content",
    )
    adapter: str | None = Field(None, description="a folder with a PEFT adapter to start from")
    api_key_env: str | None = Field(
        None, description="the NAME of the environment variable that holds the key"
    )
    startup: float = Field(600.0, gt=0, description="seconds until a started server must answer")
    log: str | None = Field(
        None, description="the file that a started server writes to, relative to this file"
    )
    temperature: float = Field(
        0.0,
        ge=0,
        le=2,
        description="of sampling; 0: the likeliest token; drafts have that of [collect]",
    )
    max_tokens: int = Field(
        256,
        ge=1,
        description="tokens of one answer, at most; a longer one is cut off, and counts as failed",
    )
    num_retries: int = Field(
        4, ge=0, description="retries of a passing failure, with exponential backoff"
    )
    timeout: float = Field(600.0, gt=0, description="seconds; an answer waits for those before it")
    concurrency: int = Field(32, ge=1, description="calls under way at once, at most")

    @field_validator("api_key_env")
    @classmethod
    def _is_a_name(cls, value: str | None) -> str | None:
        return name_of_a_variable(value)

    @model_validator(mode="after")
    def _one_way(self) -> Server:
        if (self.api_base is None) == (not self.command):
            raise ValueError(
                "give either api_base (a server that runs already) or command (one that is to be "
                "started)"
            )
        if self.adapter and self.server == "openai":
            raise ValueError(
                'an adapter needs server = "llama_cpp" or "vllm": the OpenAI protocol has no way '
                "to load one"
            )
        return self


class Engine(Table):
    """An engine from your own code: a function that returns an object with complete(Request) ->
    Response."""

    kind: Literal["engine"]
    engine: str = Field(description='a reference such as "my_engine.py:make"')
    model: str = Field("engine/custom", description="the id under which its answers are stored")
    temperature: float = Field(
        0.0,
        ge=0,
        le=2,
        description="of sampling; 0: the likeliest token; drafts have that of [collect]",
    )
    max_tokens: int = Field(
        256,
        ge=1,
        description="tokens of one answer, at most; a longer one is cut off, and counts as failed",
    )
    concurrency: int = Field(8, ge=1, description="calls under way at once, at most")


LMSettings = Annotated[InProcess | Api | Server | Engine, Field(discriminator="kind")]


KINDS: dict[str, type[Table]] = {
    "in_process": InProcess,
    "api": Api,
    "server": Server,
    "engine": Engine,
}
