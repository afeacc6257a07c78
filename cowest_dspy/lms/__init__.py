"""Language models: a ``[weak]``, ``[strong]`` or ``[judge]`` table -> a ``dspy.LM``.

    kind = "in_process"   LocalEngine: a transformers model in this process
    kind = "server"       ServerEngine: a server that speaks the OpenAI protocol, with adapters
    kind = "api"          ApiEngine: a hosted model, with limits, retries, a deadline and a price
    kind = "engine"       an engine of your own: an object with complete(Request) -> Response

config.py          the tables
build.py           a table -> dspy.LM
local/             LocalEngine, for processors and small models
server.py          ServerEngine, and how adapters get into vLLM and llama.cpp
server_process.py  a server that a `command` starts
lora_gguf.py       a PEFT adapter -> what llama.cpp's server takes
api.py             ApiEngine
protocol.py        HTTP within a deadline; the OpenAI protocol
base_engine.py     what these have in common, and `await lm.acall(...)`
endpoints.py       whether an endpoint is there, and what it serves
"""

from cowest_dspy.lms.api import ApiEngine
from cowest_dspy.lms.build import build_lm
from cowest_dspy.lms.local.engine import LocalEngine
from cowest_dspy.lms.server import ServerEngine

__all__ = ["ApiEngine", "LocalEngine", "ServerEngine", "build_lm"]
