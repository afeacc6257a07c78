"""Settings -> ``dspy.LM``: a model in this process, or anything that ``dspy.LM`` reaches over a network.

wire.py         DSPy's canonical Request and Response <-> plain dictionaries
gguf.py         a GGUF file -> an ordinary Hugging Face folder
weights.py      folders of weights and adapters: load, check, name by content
generation.py   one batch of prompts -> texts, the shared beginning computed once
engine.py       TransformersEngine: requests from any number of threads -> batches
processes.py    a server that we start: port, health, log, end (watched.py ends it when we cannot)
protocol.py     the OpenAI protocol: request -> body, answer -> Response, failure -> DSPy's error
lora_gguf.py    a PEFT adapter -> what llama.cpp's server takes
served_adapters.py  how adapters get into a running server: llama.cpp's way, vLLM's way
server.py       ServerEngine: a server that speaks the OpenAI protocol, running already or started by us
llama_server.py llama.cpp's server from a pip package, as a command
build.py        ``[weak]``, ``[strong]`` of a TOML -> dspy.LM
"""

from cowest_dspy.lms.build import build_lm
from cowest_dspy.lms.engine import TransformersEngine
from cowest_dspy.lms.server import ServerEngine

__all__ = ["ServerEngine", "TransformersEngine", "build_lm"]
