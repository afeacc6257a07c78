"""The tables of a language model: in this process, a hosted API, a server, or an engine of one's
own."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from cowest_dspy.errors import ConfigError
from cowest_dspy.utils.masking import remember_secret
from cowest_dspy.utils.table import Argument, File, Folder, Reference, TomlTable, name_of_a_variable

_SAMPLING = "of sampling; 0: the likeliest token; drafts have that of [collect]"
Temperature = Annotated[float, Field(ge=0, le=2, description=_SAMPLING)]
MaxTokens = Annotated[
    int,
    Field(
        ge=1,
        description="tokens of one answer, at most; a longer one is cut off, and counts as failed",
    ),
]
KeyEnv = Annotated[
    str | None,
    Field(description="the NAME of the environment variable that holds the key"),
    AfterValidator(name_of_a_variable),
]
Retries = Annotated[
    int, Field(ge=0, description="retries of a passing failure, with exponential backoff")
]
Calls = Annotated[int, Field(ge=1, description="calls under way at once, at most")]
Adapter = Annotated[Folder | None, Field(description="a folder with a PEFT adapter to start from")]


class InProcess(TomlTable):
    """A transformers model in this process: for processors and small models. On CUDA serve it with
    vLLM instead (kind = "server")."""

    kind: Literal["in_process"]
    model: Folder = Field(
        description="a folder with config.json and *.safetensors or a GGUF file, relative to this "
        "file, or a Hub id"
    )
    adapter: Adapter = None
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = Field(
        "auto",
        description="what weights are held in: auto is what the machine computes in best; int8 "
        "only where nothing is tuned",
    )
    temperature: Temperature = 0.0
    max_tokens: MaxTokens = 256
    concurrency: int = Field(32, ge=1, description="sequences computed together, at most")


class Price(TomlTable):
    """The price of an API, in US dollars per million tokens."""

    input: float = Field(ge=0, description="USD per million prompt tokens")
    output: float = Field(ge=0, description="USD per million generated tokens")


class Api(TomlTable):
    """A hosted model: anything that dspy.LM reaches over a network."""

    kind: Literal["api"]
    model: str = Field(description='as for dspy.LM, for instance "openai/gpt-5-mini"')
    api_base: str | None = Field(None, description="the endpoint of an OpenAI-compatible server")
    api_key_env: KeyEnv = None
    temperature: float | None = Field(0.0, ge=0, le=2, description=_SAMPLING)
    max_tokens: MaxTokens = 512
    num_retries: Retries = 4
    timeout: float = Field(120.0, gt=0, description="seconds")
    concurrency: Calls = 8
    requests_per_minute: int | None = Field(None, ge=1, description="respected across all threads")
    tokens_per_minute: int | None = Field(
        None, ge=1, description="prompt and generated tokens, respected across all threads"
    )
    price: Price | None = Field(None, description="overrides the price table that DSPy ships")


class Server(TomlTable):
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
    command: tuple[Argument, ...] = Field(
        (),
        description='starts it when needed; "{port}" becomes a free port, "{here}" this file\'s '
        'folder, "{python}" this Python',
    )
    weights: Folder | None = Field(
        None,
        description="the same model as a folder or Hub id: needed to tune it, and to name it by "
        "content",
    )
    adapter: Adapter = None
    api_key_env: KeyEnv = None
    startup: float = Field(600.0, gt=0, description="seconds until a started server must answer")
    log: File | None = Field(
        None, description="the file that a started server writes to, relative to this file"
    )
    temperature: Temperature = 0.0
    max_tokens: MaxTokens = 256
    num_retries: Retries = 4
    timeout: float = Field(600.0, gt=0, description="seconds; an answer waits for those before it")
    concurrency: Calls = 32

    @model_validator(mode="after")
    def _one_way(self) -> Server:
        if (self.api_base is None) == (not self.command):
            raise ValueError(
                "give either api_base (a server that runs already) or command (one that is to be "
                "started)"
            )
        if "cowest_dspy.lms.llama_server" in self.command:
            raise ValueError(
                'write "llama-server", llama.cpp\'s own program with the same flags, in place of '
                '"{python}", "-m", "cowest_dspy.lms.llama_server"'
            )
        if self.adapter and self.server == "openai":
            raise ValueError(
                'an adapter needs server = "llama_cpp" or "vllm": the OpenAI protocol has no way '
                "to load one"
            )
        return self


class Engine(TomlTable):
    """An engine from your own code: a function that returns an object with complete(Request) ->
    Response."""

    kind: Literal["engine"]
    engine: Reference = Field(description='a reference such as "my_engine.py:make"')
    model: str = Field("engine/custom", description="the id under which its answers are stored")
    temperature: Temperature = 0.0
    max_tokens: MaxTokens = 256
    concurrency: Calls = 8


LMSettings = Annotated[InProcess | Api | Server | Engine, Field(discriminator="kind")]


KINDS: dict[str, type[TomlTable]] = {
    "in_process": InProcess,
    "api": Api,
    "server": Server,
    "engine": Engine,
}


def read_key(variable: str) -> str:
    """The API key that an environment variable holds; from now on every output masks it.

    Raises:
        ConfigError: it is not set.
    """
    key = os.environ.get(variable)
    if not key:
        raise ConfigError(
            f"The environment variable {variable} is not set: export it, it holds the API key."
        )
    remember_secret(key)
    return key
