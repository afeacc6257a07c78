"""The toy task with a real tiny weak model that is really tuned, as files; and the command line on it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import toy

RECIPE = (
    toy.RECIPE
    + '''
import dspy

asked = []

def rows(split, seed=0):
    count = {"train": 10, "dev": 3, "test": 6}[split]
    same = {"answer": "yes", "notes": "all vowels: a e i o u"}
    return [{"id": f"{split}{i}", "question": f"{split} {i}?", **same} for i in range(count)]

def sft_rows(seed=0):
    texts = ["a e i", "b c d", "o u a", "x"]
    return [{"prompt": [{"role": "user", "content": f"Question: {i}?"}], "completion": [{"role": "assistant", "content": text}]}
            for i in range(4) for text in texts]

def program():
    return Collaboration("question -> answer", draft="knowledge")

def direct():
    return dspy.Predict("question -> answer")

def strong():
    """Says yes to a background with at least three different vowels in it; alone it says no."""
    def answer(request):
        asked.append(request)
        text = request["messages"][-1]["content"]
        return "yes" if len(set("aeiou") & set(text.partition("Background: ")[2])) >= 3 else "no"
    return ScriptedEngine(answer, model="scripted/strong")
'''
)


TASK = (
    toy.TASK
    + """
[sft]
drafts = "toy.py:sft_rows"
answers = "toy.py:sft_rows"
[sft.settings]
max_steps = 80
epochs = 80
learning_rate = 2e-2
precision = "fp32"
[sft.answer_settings]
max_steps = 80
epochs = 80
learning_rate = 2e-2
precision = "fp32"
[collect]
drafts = 6
max_failed = 1.0
[pairs]
least = 2
[dpo]
max_steps = 2
precision = "fp32"
batch_size = 2
[evaluate]
weak = "toy.py:direct"
oracle = "notes"
controls = ["shuffled", "sft_on_chosen"]
"""
)


@pytest.fixture
def task(tmp_path: Path, tiny_model: Path) -> list[Path]:
    """The toy task and its backend, as files."""
    (tmp_path / "toy.py").write_text(RECIPE)
    (tmp_path / "toy.toml").write_text(TASK)
    backend = f"""
[weak]
kind = "in_process"
model = "{tiny_model}"
max_tokens = 12
{toy.engine("strong")}"""
    (tmp_path / "backend.toml").write_text(backend)
    return [tmp_path / "toy.toml", tmp_path / "backend.toml"]


def cowest(*arguments: str, fails: bool = False) -> str:
    """What the command prints; its exit code must be 0, or not, as it is said."""
    done = subprocess.run(
        [sys.executable, "-m", "cowest_dspy.cli", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"},
        check=False,
    )
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr if fails else done.stdout


def rewrite(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


CYCLE = """
[rounds]
least_gain = -1.0
more_failures = 1.0
[cycle]
strategy = "sft -> shots -> weights -> own"
[cycle.steps.shots]
optimizer = "LabeledFewShot"
target = "refine"
settings = { k = 1 }
[cycle.steps.own]
optimizer = "toy.py:make"
settings = { shots = 2 }
"""


OWN = """

def make(tools, shots, longest=1024):
    assert tools.influence is not None and tools.lm.kwargs["max_tokens"] == longest and tools.threads > 0
    return dspy.LabeledFewShot(k=shots)
"""


@pytest.fixture
def cycle(task: list[Path]) -> list[Path]:
    with task[0].open("a") as file:
        file.write(CYCLE)
    with task[0].with_name("toy.py").open("a") as file:
        file.write(OWN)
    rewrite(task[0], 'controls = ["shuffled", "sft_on_chosen"]', "controls = []")
    return task
