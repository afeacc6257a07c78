"""Settings -> ``dspy.LM``: a model in this process, or anything that ``dspy.LM`` reaches over a
network.

wire.py         DSPy's canonical Request and Response <-> plain dictionaries
recording.py    what was really said: noted for whoever listens, served from a ledger

In this process:
gguf.py         a GGUF file -> an ordinary Hugging Face folder
footprint.py    what a folder of weights says before it is loaded: context, memory
weights.py      folders of weights and adapters: load, check, name by content (mapped.py, int8.py)
lora.py         one model and its adapters: which of them speaks
attention.py    attention in parts: what rows have in common is stored and met once
blocks.py       where keys and values stand, without gaps
sampling.py     logits -> the next token of every row
generation.py   a batch that rows join and leave at any step (plain.py: for other kinds of
                attention)
likelihood.py   how likely texts are that the model has not written
prompts.py      chat messages -> tokens, and what of them can be shared
streaming.py    a text in pieces, as it comes into being
turns.py        engines of one process take turns
batching.py     requests from any number of threads -> batches
engine.py       LocalEngine: all of this behind dspy.LM

Elsewhere:
keys.py         API keys, held by environment variables
endpoints.py    whether an endpoint is there, and what it says of its model
attempts.py     one attempt over a network: its deadline, and no end before it by a stop
limits.py       requests and tokens per minute, across all threads
prices.py       what an answer cost
api.py          ApiEngine: a hosted model, with limits, retries and a deadline
processes.py    a server that we start: port, health, log, end (watched.py ends it when we cannot)
protocol.py     the OpenAI protocol: request -> body, answer -> Response, failure -> DSPy's error
lora_gguf.py    a PEFT adapter -> what llama.cpp's server takes
served_adapters.py  how adapters get into a running server: llama.cpp's way, vLLM's way
server.py       ServerEngine: a server that speaks the OpenAI protocol, running already or started
by us llama_server.py llama.cpp's server from a pip package, as a command
build.py        ``[weak]``, ``[strong]`` of a TOML -> dspy.LM
"""

from cowest_dspy.lms.build import build_lm
from cowest_dspy.lms.local.engine import LocalEngine
from cowest_dspy.lms.server import ServerEngine

__all__ = ["LocalEngine", "ServerEngine", "build_lm"]
