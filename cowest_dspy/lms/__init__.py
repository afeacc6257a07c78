"""Settings -> ``dspy.LM``: a model in this process, or anything that ``dspy.LM`` reaches over a network.

wire.py         DSPy's canonical Request and Response <-> plain dictionaries
gguf.py         a GGUF file -> an ordinary Hugging Face folder
weights.py      folders of weights and adapters: load, check, name by content
generation.py   one batch of prompts -> texts, the shared beginning computed once
engine.py       TransformersEngine: requests from any number of threads -> batches
footprint.py    what a folder of weights says before it is loaded: context, memory
endpoints.py    whether an endpoint is there, and what it says of its model
build.py        ``[weak]``, ``[strong]`` of a TOML -> dspy.LM
"""

from cowest_dspy.lms.build import build_lm
from cowest_dspy.lms.engine import TransformersEngine

__all__ = ["TransformersEngine", "build_lm"]
