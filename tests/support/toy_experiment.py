"""The toy task with a real tiny weak model that is really tuned, as files; and the command line on
it."""

from __future__ import annotations

from pathlib import Path

import pytest
import toy

from cowest_dspy import Experiment, load_config

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
num_train_epochs = 80
learning_rate = 2e-2
bf16 = false
[sft.answer_settings]
max_steps = 80
num_train_epochs = 80
learning_rate = 2e-2
bf16 = false
[collect]
drafts = 6
max_errors = 1.0
[pairs]
least = 2
[dpo]
max_steps = 2
bf16 = false
per_device_train_batch_size = 1
gradient_accumulation_steps = 2
[evaluate]
weak = "toy.py:direct"
oracle = "notes"
controls = ["shuffled", "sft_on_chosen"]
"""
)


@pytest.fixture
def task(tmp_path: Path, tiny_model: Path) -> list[Path]:
    """The toy task and its backend, as files."""
    return write_toy(tmp_path, tiny_model)


def write_toy(folder: Path, tiny_model: Path, text: str = TASK) -> list[Path]:
    """The toy task and its backend as files in a folder; gives the two TOML files."""
    (folder / "toy.py").write_text(RECIPE)
    (folder / "toy.toml").write_text(text)
    weak = f'[weak]\nkind = "in_process"\nmodel = "{tiny_model}"\nmax_tokens = 12\n'
    (folder / "backend.toml").write_text(weak + toy.engine("strong"))
    return [folder / "toy.toml", folder / "backend.toml"]


def finish_toy(folder: Path, tiny_model: Path) -> None:
    """Write the toy task with a cycle of three steps into a folder, and run it whole into its
    `run`."""
    text = TASK.replace('controls = ["shuffled", "sft_on_chosen"]', "controls = []") + STEPS
    with Experiment(load_config(write_toy(folder, tiny_model, text)), folder / "run") as experiment:
        experiment.cycle()


def rewrite(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


STEPS = """
[rounds]
least_gain = -1.0
more_failures = 1.0
[cycle]
strategy = "sft -> weights -> shots"
[cycle.steps.shots]
optimizer = "LabeledFewShot"
target = "refine"
settings = { k = 1 }
"""


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
    assert tools.influence is not None and tools.lm.kwargs["max_tokens"] == longest and tools.num_threads > 0
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
