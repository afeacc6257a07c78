"""Real servers, llama.cpp's and (after `make vllm`) vLLM's, with the demo's weak model, beside the
engine in this process with the same weights. One smoke in `make test`, the rest in the long tier.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.lm15 import ContextLengthError
from forked import is_gone
from served import CONTEXT, LLAMA_SERVER, SMOL, llama_cpp_engine, make_mild_adapter, vllm_engine

from cowest_dspy import Experiment
from cowest_dspy.experiment.config import load_config
from cowest_dspy.lms import LocalEngine, ServerEngine
from cowest_dspy.store import serialize
from cowest_dspy.tuning import TunableEngine

QUESTIONS = [
    "What is the capital of France?",
    "Name a colour.",
    "How many days has a week?",
    "Write one sentence about the sea.",
    "What do bees make?",
    "Say hello to Ann.",
    "What is the opposite of hot?",
    "Which animal barks?",
    "What is 2 + 2?",
    "Name a fruit that is yellow.",
]


@pytest.fixture(scope="module", params=["llama_cpp", "vllm"])
def engine(
    request: pytest.FixtureRequest, real_models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerEngine]:
    log = tmp_path_factory.mktemp("log") / "vllm.log"
    made = (
        llama_cpp_engine(real_models)
        if request.param == "llama_cpp"
        else vllm_engine(real_models, log)
    )
    yield made
    made.close()


@pytest.fixture(scope="module")
def in_process(real_models: Path) -> LocalEngine:
    import torch

    torch.set_num_threads(1)
    return LocalEngine(real_models / SMOL, dtype="float32")


@pytest.fixture(scope="module")
def adapters(real_models: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [
        make_mild_adapter(real_models / SMOL, tmp_path_factory.mktemp("mild") / str(seed), seed)
        for seed in (1, 2)
    ]


def ask(engine: Any, question: str, model: str | None = None, **settings: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    return serialize.response_to_dict(
        engine.complete(
            serialize.request_from_messages(model or engine.model_id, messages, **settings)
        )
    )


def close(lm: dspy.LM) -> None:
    """Stops the server behind an LM."""
    assert isinstance(lm.engine, ServerEngine)
    lm.engine.close()


def agree(
    engine: ServerEngine,
    in_process: LocalEngine,
    models: tuple[str | None, str | None] = (None, None),
) -> int:
    """How many greedy answers are the same; as far as they are, so are the log-probabilities, to
    what BF16 sums allow."""
    same, apart = 0, list[float]()
    for question in QUESTIONS:
        served, ours = (
            ask(one, question, model, max_tokens=12, logprobs=0)
            for one, model in zip((engine, in_process), models, strict=False)
        )
        same += served["text"] == ours["text"]
        for one, other in zip(served["logprobs"], ours["logprobs"], strict=False):
            if one["token"] != other["token"]:
                break
            apart.append(abs(one["logprob"] - other["logprob"]))
    # What another adapter had computed, or rows in another order, is apart by 0.4 and more. This is
    # BF16 against float32: of the weights alone in llama.cpp, of everything in vLLM.
    assert max(apart) < 0.4 and sum(apart) / len(apart) < 0.05
    return same


def test_greedy_answers_and_usage_are_those_of_the_engine_in_this_process(
    engine: ServerEngine, in_process: LocalEngine
) -> None:
    assert agree(engine, in_process) >= 7
    served, ours = (ask(one, QUESTIONS[0], max_tokens=24) for one in (engine, in_process))
    assert "Paris" in served["text"] and served["finish_reason"] == "stop"
    assert (served["input_tokens"], served["output_tokens"]) == (
        ours["input_tokens"],
        ours["output_tokens"],
    )
    assert engine.model_id.split("@")[1] == in_process.model_id.split("@")[1]


@pytest.mark.slow
def test_drafts_differ_by_their_seed_and_repeat_with_it(engine: ServerEngine) -> None:
    story = "Tell a story about a mill."
    ask(engine, story, max_tokens=1)
    # One at a time, and after an equal prompt: what shares the batch, or is in the server's memory,
    # can change a sample.
    drafts = [
        ask(engine, story, max_tokens=12, temperature=1.0, seed=seed)["text"]
        for seed in (1, 2, 3, 4, 1)
    ]
    assert len(set(drafts)) == 4 and drafts[0] == drafts[-1]
    greedy = ask(engine, story, max_tokens=12)["text"]
    assert ask(engine, story, max_tokens=12, temperature=1.0, top_k=1)["text"] == greedy
    assert ask(engine, story, max_tokens=12, temperature=1.0, top_p=1e-6)["text"] == greedy


@pytest.mark.slow
def test_stop_strings_and_max_tokens_end_an_answer(engine: ServerEngine) -> None:
    whole = ask(engine, QUESTIONS[3], max_tokens=10)
    assert whole["finish_reason"] == "length" and whole["output_tokens"] == 10
    stop = whole["text"][8:11]
    cut = ask(engine, QUESTIONS[3], max_tokens=10, stop=(stop,), logprobs=0)
    assert cut["text"] == whole["text"].split(stop)[0] and cut["finish_reason"] == "stop"
    # Of a token that a stop string cuts in two, llama.cpp keeps the text alone, and vLLM gives the
    # log-probability of all of it.
    spelled = "".join(one["token"] for one in cut["logprobs"])
    assert spelled and (cut["text"].startswith(spelled) or spelled.startswith(cut["text"]))


@pytest.mark.slow
def test_any_text_goes_through_and_a_long_prompt_up_to_the_context(engine: ServerEngine) -> None:
    assert (
        ask(engine, "Grüße, 東京 🌊 \u200b\x07 <|im_end|> {{x}}", max_tokens=8)["output_tokens"] > 0
    )
    assert ask(engine, "word " * (CONTEXT - 80), max_tokens=4)["input_tokens"] > CONTEXT - 100
    with pytest.raises(ContextLengthError, match="exceeds"):
        ask(engine, "word " * CONTEXT, max_tokens=4)


@pytest.mark.slow
def test_32_threads_get_their_own_answers(engine: ServerEngine) -> None:
    asked = [f"Repeat this word: {word}" for word in ("apple", "river", "stone", "cloud")] * 16
    alone = {question: ask(engine, question, max_tokens=6)["text"] for question in asked[:4]}
    with ThreadPoolExecutor(32) as pool:
        answers = list(
            pool.map(lambda question: ask(engine, question, max_tokens=6)["text"], asked)
        )
    assert len(set(alone.values())) > 1
    assert (
        sum(answer == alone[question] for question, answer in zip(asked, answers, strict=True))
        >= 60
    )


@pytest.mark.slow
def test_adapters_speak_as_in_this_process_and_the_base_stays_as_it_was(
    engine: ServerEngine, in_process: LocalEngine, adapters: list[Path]
) -> None:
    before = [ask(engine, question, max_tokens=12)["text"] for question in QUESTIONS]
    for adapter in adapters:
        ids = (engine.load_adapter(adapter), in_process.load_adapter(adapter))
        assert ids[0].rpartition("+")[2] == ids[1].rpartition("+")[2]
        assert agree(engine, in_process, ids) >= 7
    models = [engine.model_id, *(engine.load_adapter(adapter) for adapter in adapters)]
    if engine.settings.server == "vllm":
        # On the CPU, vLLM 0.32 adds the adapter of its last slot to the base's rows of a mixed
        # batch (see VllmAdapters).
        assert [ask(engine, question, max_tokens=12)["text"] for question in QUESTIONS] == before
        models = models[1:]
    # Base and adapters at once, over and over: what one has computed of a prompt is never
    # another's.
    alone = [ask(engine, question, models[0], max_tokens=12)["text"] for question in QUESTIONS]
    asked = [(question, model) for question in QUESTIONS for model in models] * 2
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda one: ask(engine, *one, max_tokens=12)["text"], asked))
    spoken = {
        model: [a for a, (_, m) in zip(answers, asked, strict=True) if m == model]
        for model in models
    }
    assert sum(one == other for one, other in zip(spoken[models[0]], alone * 2, strict=True)) >= 14
    assert len({tuple(texts[:10]) for texts in spoken.values()}) == len(models)
    assert isinstance(engine, TunableEngine)


@pytest.mark.slow
def test_close_leaves_no_process_and_the_next_question_starts_another(real_models: Path) -> None:
    engine = llama_cpp_engine(real_models, parallel=1)
    for _ in range(2):
        ask(engine, "Hi", max_tokens=1)
        assert engine._process is not None and engine._process.pid is not None
        group = engine._process.pid
        engine.close()
        assert is_gone(group)


@pytest.mark.slow
def test_the_backend_file_of_llama_cpp_runs_as_it_stands_and_its_weak_model_is_tuned(
    real_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(__file__).parents[2]
    program = tmp_path / "bin" / "llama-server"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{LLAMA_SERVER}" "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    config = load_config(
        [root / "programs/handbook.toml", root / "programs/backends/llama_cpp.toml"]
    )
    llama_cpp_engine(real_models)  # skips where its file or its package is missing
    assert config.sft is not None
    once = config.sft.model_copy(update={"settings": {**config.sft.settings, "max_steps": 1}})
    config = config.model_copy(update={"sft": once})
    question = "What is the capital of France?"
    with Experiment(config, tmp_path / "run") as experiment:
        try:
            assert experiment.weak(question)[0].startswith("The capital of France is Paris")
            tuned = experiment.sft()
            assert tuned.model.startswith(f"{experiment.weak.model}+") and tuned(question)[0]
        finally:
            close(experiment.weak)
    with Experiment(config, tmp_path / "run") as again:
        try:
            assert again.sft().model == tuned.model
        finally:
            close(again.weak)
