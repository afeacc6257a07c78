"""The toy task that tests take through a configuration: what its recipe and its TOML have in common
everywhere.

A test adds its own functions (or ``ROWS``) to ``RECIPE`` (written as toy.py) and its own tables to
``TASK`` (written as toy.toml).
"""

from __future__ import annotations

RECIPE = """
from cowest_dspy import Collaboration
from cowest_dspy.testing import ScriptedEngine

def match(example, prediction, trace=None):
    return float(prediction.answer == example.answer)
"""

ROWS = """
def rows(split, seed=0):
    return [{"id": f"{split}{i}", "question": f"{split} {i}?", "answer": "yes"} for i in range(4)]
"""

TASK = """
name = "toy"
program = "toy.py:program"
metric = "toy.py:match"
[data]
source = "toy.py:rows"
inputs = ["question"]
"""


def engine(role: str) -> str:
    """The table of a model that the recipe's function of that name makes, as scripted/ROLE."""
    return f'[{role}]\nkind = "engine"\nengine = "toy.py:{role}"\nmodel = "scripted/{role}"\n'
