"""A toy task with a budget, as files."""

from __future__ import annotations

from pathlib import Path

import toy

TASK = (
    toy.TASK
    + toy.engine("weak")
    + """
[strong]
{strong}
[collect]
drafts = 2
[budget]
{budget}
"""
)


RECIPE = (
    toy.RECIPE
    + toy.ROWS
    + """
def program():
    return Collaboration("question -> answer")

def weak():
    return ScriptedEngine(lambda request: f"draft {request['config'].get('seed')}", model="scripted/weak")

def strong():
    return ScriptedEngine(lambda request: "yes", model="scripted/strong")
"""
)


ENGINE = 'kind = "engine"\nengine = "toy.py:strong"\nmodel = "scripted/strong"'


def configured(folder: Path, budget: str, strong: str = ENGINE) -> Path:
    (folder / "toy.py").write_text(RECIPE)
    (folder / "toy.toml").write_text(TASK.format(strong=strong, budget=budget))
    return folder / "toy.toml"
