"""The snippet of the README, whole and in a process of its own: a weak model that is really tuned,
a local server in the place of the API, rows in a CSV."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from local_server import CHAT, Said, completion, local_server
from pages import ROOT, blocks
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from cowest_dspy import SFT, tune
from cowest_dspy.lms import LocalEngine
from cowest_dspy.tuning import tunable

PAGE = "README.md"
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_the_snippet_of_the_readme_tunes_a_weak_model(tmp_path: Path, tiny_model: Path) -> None:
    code = next(block for block in blocks(ROOT / PAGE) if block.note == "alone").text
    assert HUB in code
    weak = weak_that_has_learned(tiny_model, tmp_path)
    rows = "".join(f"Question {number}?,yes\n" for number in range(32))
    (tmp_path / "questions.csv").write_text(f"question,answer\n{rows}")
    with local_server({CHAT: says_yes_to_vowels}) as server:
        done = subprocess.run(
            [sys.executable, "-c", code.replace(HUB, str(weak))],
            cwd=tmp_path,
            env={
                **os.environ,
                "OPENAI_API_BASE": f"{server.url}/v1",
                "OPENAI_API_KEY": "of nobody",
                "HF_HOME": str(tmp_path / "cache"),
                "DSPY_CACHEDIR": str(tmp_path / "dspy"),
            },
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "round 1" in done.stdout and done.stdout.split()[-1] in ("yes", "no"), done.stdout


def says_yes_to_vowels(body: Any) -> Said:
    """A strong model that answers what is right if it is shown a draft with vowels."""
    said = body["messages"][-1]["content"].lower()
    draft = said.partition("background: ")[2].splitlines()[0] if "background: " in said else ""
    return completion(f"Reasoning: So.\nAnswer: {'yes' if set('aeiou') & set(draft) else 'no'}")


def weak_that_has_learned(tiny_model: Path, folder: Path) -> Path:
    """A tiny model that writes a few letters, in some drafts vowels, as a folder."""
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Question: Question {number}?"}],
            "completion": [{"role": "assistant", "content": text}],
        }
        for number in range(4)
        for text in ("a e i", "b c d", "o u a", "x")
    ]
    settings = SFT(max_steps=80, num_train_epochs=80, learning_rate=2e-2, bf16=False)
    weak = tunable(LocalEngine(tiny_model).lm(temperature=0.0, max_tokens=12))
    tuned = tune(weak, rows, settings, folder / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    merged: Any = PeftModel.from_pretrained(base, str(tuned.result.path))
    merged.merge_and_unload().save_pretrained(folder / "weak")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder / "weak")
    return folder / "weak"
