"""The real models of the demo: what the tiny ones cannot show. One smoke in `make test`, the rest
in the long tier."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cowest_dspy import Experiment, load_config
from cowest_dspy.experiment.config import Config
from cowest_dspy.lms import LocalEngine
from cowest_dspy.store import serialize

ROOT = Path(__file__).parents[2]
TASK = [ROOT / "programs/handbook.toml", ROOT / "programs/backends/in_process.toml"]


def small(train: int, dev: int, test: int, steps: int, **settings: Any) -> Config:
    """The handbook with few questions, two drafts of each and few steps of training: enough that
    a sampled draft comes to its end, whatever a machine's rounding makes of the sample."""
    config = load_config(TASK)
    assert config.sft is not None
    taught = {
        "settings": {**config.sft.settings, **settings, "max_steps": steps},
        "answer_settings": {"max_steps": 1},
    }
    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"train": train, "dev": dev, "test": test}),
            "sft": config.sft.model_copy(update=taught),
            "collect": config.collect.model_copy(update={"drafts": 2}),
        }
    )


def test_both_models_answer_and_the_weak_one_is_tuned(real_models: Path, tmp_path: Path) -> None:
    with Experiment(
        small(1, 1, 1, steps=12, per_device_train_batch_size=2, gradient_accumulation_steps=1),
        tmp_path / "run",
    ) as experiment:
        base = experiment.weak.model
        traces = experiment.collect()
        (strong,) = experiment.evaluate(["strong"])
    assert len(traces) == 2 and all(trace.completion and trace.error is None for trace in traces)
    assert {trace.weak_model for trace in traces} != {base} and all(
        t.weak_model.startswith(f"{base}+") for t in traces
    )
    assert all(trace.refined and trace.alone and trace.influence is not None for trace in traces)
    assert [answer.error for answer in strong.answers] == [None]


@pytest.mark.slow
def test_the_weak_model_says_in_a_batch_what_generate_says_alone(real_models: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = real_models / "SmolLM2-135M-Instruct"
    engine = LocalEngine(folder, dtype="float32")
    head = {"role": "system", "content": "You are a terse assistant. " * 12}
    asked = [
        [head, {"role": "user", "content": text}]
        for text in ("What is the capital of France?", "Name a colour.", "2 + 2?")
    ]
    requests = [
        serialize.request_from_messages(engine.model_id, messages, max_tokens=12, temperature=0.0)
        for messages in asked
    ]
    with ThreadPoolExecutor(3) as pool:
        ours = [
            serialize.response_text(response) for response in pool.map(engine.complete, requests)
        ]
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for messages, text in zip(asked, ours, strict=True):
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        out = model.generate(**ids, max_new_tokens=12, do_sample=False)
        assert (
            tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True) == text
        )


@pytest.mark.slow
def test_the_strong_model_in_int8_shares_prompts(real_models: Path) -> None:
    """Without it the demo's collection took ten times as long."""
    engine = LocalEngine(real_models / "Qwen2.5-Coder-1.5B-Instruct", dtype="int8")
    assert engine._load().joinable
    engine.close()


@pytest.mark.slow
def test_the_whole_path_runs_on_real_models_and_facts_help_the_strong_one(
    real_models: Path, tmp_path: Path
) -> None:
    with Experiment(small(6, 4, 10, steps=12), tmp_path / "run") as experiment:
        traces = experiment.collect()
        arms = experiment.evaluate(["weak", "strong", "oracle"])
        report = experiment.report()
    assert len(traces) == 12 and all(trace.completion for trace in traces)
    right = {arm.name: sum(answer.score or 0 for answer in arm.answers) for arm in arms}
    assert right["oracle"] >= 8 and right["oracle"] > right["strong"]
    assert {stage.name for stage in report.stages} >= {
        "drafts",
        "answers",
        "collect",
        "evaluate strong",
    }
    assert (tmp_path / "run/report.html").stat().st_size > 10_000
