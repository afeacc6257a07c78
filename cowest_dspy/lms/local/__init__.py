"""A transformers model in this process, for processors and small models. On CUDA use vLLM.

engine.py      LocalEngine: chat messages -> tokens -> batches -> answers, behind dspy.LM
scheduler.py   requests of any number of threads -> batches; engines take turns
generate.py    a batch that rows join and leave at any step
attention.py   attention in parts: what rows share is stored and met once
sampling.py    logits -> the next token of every row, and when a row is done
likelihood.py  how likely given texts are
weights.py     folders, Hub ids and GGUF files: load, check, name by content
lora.py        which adapters there are, and which of them compute
int8.py        linear layers in 8-bit integers
"""

from cowest_dspy.lms.local.engine import LocalEngine

__all__ = ["LocalEngine"]
