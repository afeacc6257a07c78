"""A toy task for ``cowest compare``: a tiny weak model that is really tuned, and a strong model
that is a rule."""

from __future__ import annotations

from pathlib import Path

import pytest
import toy

from cowest_dspy import Experiment, load_config
from cowest_dspy.experiment import Compared
from cowest_dspy.report.compared import Comparison

RECIPE = (
    toy.RECIPE
    + '''
import dspy
from cowest_dspy import LineAdapter
from cowest_dspy.report.corpus import corpus_metric

ASKED = []

def rows(split, seed=0, rows=None):
    count = {"train": 8, "dev": 3, "test": 6}[split]
    same = {"answer": "yes", "notes": "all vowels: a e i o u"}
    return [{"id": f"{split}{i}", "question": f"{split} {i}?", **same} for i in range(count)]

def sft_rows(seed=0, draft="knowledge"):
    texts = ["a e i", "b c d", "o u a", "x"]
    return [{"prompt": [{"role": "user", "content": f"Question: {i}?"}], "completion": [{"role": "assistant", "content": text}]}
            for i in range(4) for text in texts]

def answers(seed=0):
    return sft_rows()

def passages(seed=0):
    return [f"train {i}? a e i" for i in range(8)] + ["x", "y"]

def program(draft="knowledge"):
    return Collaboration("question -> answer", draft=draft, adapter=LineAdapter())

def direct():
    return dspy.Predict("question -> answer")

def length(example, prediction, trace=None):
    return 1.0 if len(prediction.answer) < 3 else 0.5

@corpus_metric
def share(examples, predictions):
    return sum(one is not None and one.answer == "yes" for one in predictions) / len(examples)

def strong():
    """Says yes to a background with a vowel in it; alone it says no. Feedback and reasoning are given. A vowel is in some drafts
    and not in others whatever the tiny model has learned: that differs with the processor."""
    def answer(request):
        ASKED.append(request)
        text = request["messages"][-1]["content"]
        said = "yes" if set("aeiou") & set(text.partition("Background: ")[2]) else "no"
        if "easoning" in request["messages"][0]["content"]:
            return f"Reasoning: so\\nAnswer: {said}"
        return said
    return ScriptedEngine(answer, model="scripted/strong")
'''
)

TRAINING = "max_steps = 60\nnum_train_epochs = 60\nlearning_rate = 2e-2\nbf16 = false\n"
TASK = (
    toy.TASK
    + f"""
[sft]
drafts = "toy.py:sft_rows"
answers = "toy.py:answers"
[sft.settings]
{TRAINING}
[sft.answer_settings]
{TRAINING}
[collect]
drafts = 6
max_errors = 1.0
[pairs]
least = 2
[dpo]
max_steps = 2
bf16 = false
per_device_train_batch_size = 2
gradient_accumulation_steps = 1
[rounds]
least_gain = -1
confidence = 0.5
[evaluate]
weak = "toy.py:direct"
oracle = "notes"
"""
)

ALL_ARMS = """
[compare]
against = "alone"
also = ["toy.py:length", "toy.py:share"]
[compare.arms.alone]
kind = "alone"
[compare.arms.thought]
kind = "strong"
style = "chain_of_thought"
[compare.arms.criticised]
kind = "self_refine"
[compare.arms.voted]
kind = "self_consistency"
samples = 3
[compare.arms.weak]
kind = "weak"
[compare.arms.bare]
kind = "weak"
weak = "base"
shots = 2
[compare.arms.rag]
kind = "rag"
corpus = "toy.py:passages"
passages = 1
[compare.arms.grounded]
kind = "grounded"
corpus = "toy.py:passages"
[compare.arms.plugin]
kind = "super_icl"
shots = 2
samples = 2
[compare.arms.before]
kind = "collaboration"
[compare.arms.after]
kind = "collaboration"
weak = "tuned"
[compare.arms.mine]
kind = "module"
program = "toy.py:direct"
title = "mine"
[compare.arms.oracle]
kind = "oracle"
[compare.arms.control_shuffled]
kind = "control"
control = "shuffled"
[compare.arms.control_other]
kind = "control"
control = "other_draft"
"""


@pytest.fixture
def task(tmp_path: Path, tiny_model: Path) -> list[Path]:
    """The toy task and its backend, as files; a test adds a file with [compare]."""
    (tmp_path / "toy.py").write_text(RECIPE)
    (tmp_path / "toy.toml").write_text(TASK)
    weak = f'[weak]\nkind = "in_process"\nmodel = "{tiny_model}"\nmax_tokens = 12\n'
    (tmp_path / "backend.toml").write_text(weak + toy.engine("strong"))
    return [tmp_path / "toy.toml", tmp_path / "backend.toml"]


def declared(task: list[Path], compare: str) -> list[Path]:
    file = task[0].parent / "compare.toml"
    file.write_text(compare)
    return [*task, file]


def compared(files: list[Path], run: Path, only: list[str] | None = None) -> tuple[Comparison, int]:
    with Experiment(load_config(files), run) as experiment:
        made = Compared(experiment).run(only)
        return made, experiment.store.calls()
