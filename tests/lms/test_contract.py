"""One contract for every kind of backend: whoever passes it can stand behind [weak], [strong] and
[judge].

In process (a tiny model) and behind the OpenAI protocol (the strict server) in the default tier;
SmolLM2 in process and in the real servers of llama.cpp and (after `make vllm`) vLLM in the slow
one. A new backend gets a fixture here, and passes or is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.utils.exceptions import LMError
from served import CONTEXT, SMOL, llama_cpp_engine, make_mild_adapter, vllm_engine
from tiny import make_adapter

from cowest_dspy.lms import LocalEngine, ServerEngine, build_lm
from cowest_dspy.lms.config import Api, Server
from cowest_dspy.store import serialize
from cowest_dspy.store.call_context import listening
from cowest_dspy.store.record import failure, recorded
from cowest_dspy.testing import OpenAIServer

QUESTION = "What is the capital of France?"
UNICODE = "Straße, 東京, 🦉, e\u0301 and \u200bzero width: what is that?"
LONG = "The mill is old. " * 20 + QUESTION


@dataclass
class Backend:
    """A backend under test. ``adapter`` makes one for it, or is None; ``samples``: seeds decide
    what it says, one by one; ``beyond`` is a prompt that its context cannot hold, or None where
    nobody says how much it holds."""

    lm: dspy.LM
    adapter: Callable[[], str] | None = None
    samples: bool = True
    beyond: str | None = "too long " * 2000
    settings: dict[str, Any] = field(default_factory=dict)

    def ask(self, question: str, **settings: Any) -> dict[str, Any]:
        model = settings.pop("model", self.lm.model)
        messages = [{"role": "user", "content": question}]
        lm = self.lm if model == self.lm.model else self.lm.copy(model=model)
        return serialize.response_to_dict(
            lm(serialize.request_from_messages(model, messages, **{"max_tokens": 8, **settings}))
        )


def echo(request: dict[str, Any]) -> str:
    """What the strict server says: words that the prompt and the settings decide."""
    text = request["messages"][-1]["content"]
    warm = request["config"].get("temperature", 0.0) > 0
    words = text.split()[-6:] + ([f"seed {request['config'].get('seed', 0)}"] if warm else [])
    return " ".join([*words, "and", "that", "is", "all", "there", "is", "to", "say"])


def in_process(request: pytest.FixtureRequest) -> Iterator[Backend]:
    folder: Path = request.getfixturevalue("tiny_model")
    engine = LocalEngine(folder, dtype="float32")
    made = request.getfixturevalue("tmp_path_factory").mktemp("contract")
    yield Backend(
        engine.lm(temperature=0.0),
        lambda: engine.load_adapter(make_adapter(folder, made / "adapter", 3)),
    )


def smol_in_process(request: pytest.FixtureRequest) -> Iterator[Backend]:
    folder: Path = request.getfixturevalue("real_models") / SMOL
    engine = LocalEngine(folder, dtype="float32")
    made = request.getfixturevalue("tmp_path_factory").mktemp("contract")
    adapter = lambda: engine.load_adapter(make_mild_adapter(folder, made / "mild", 3))  # noqa: E731
    yield Backend(engine.lm(temperature=0.0), adapter, beyond="too long " * 9000)
    engine.close()


def llama_cpp(request: pytest.FixtureRequest) -> Iterator[Backend]:
    models: Path = request.getfixturevalue("real_models")
    engine = llama_cpp_engine(models)
    made = request.getfixturevalue("tmp_path_factory").mktemp("contract")
    adapter = lambda: engine.load_adapter(make_mild_adapter(models / SMOL, made / "mild", 3))  # noqa: E731
    # Its seeds repeat only one request at a time after an equal prompt: see ServerEngine.
    yield Backend(engine.lm(temperature=0.0), adapter, samples=False, beyond="too long " * CONTEXT)
    engine.close()


def vllm(request: pytest.FixtureRequest) -> Iterator[Backend]:
    models: Path = request.getfixturevalue("real_models")
    made = request.getfixturevalue("tmp_path_factory").mktemp("contract")
    engine = vllm_engine(models, made / "vllm.log")
    adapter = lambda: engine.load_adapter(make_mild_adapter(models / SMOL, made / "mild", 3))  # noqa: E731
    # What shares a batch changes the last bits of its sums, and so now and then a sample.
    yield Backend(engine.lm(temperature=0.0), adapter, samples=False, beyond="too long " * CONTEXT)
    engine.close()


def openai_server(request: pytest.FixtureRequest) -> Iterator[Backend]:
    with OpenAIServer(echo) as server:
        settings = {
            "kind": "server",
            "model": server.model,
            "api_base": server.api_base,
            "num_retries": 0,
        }
        yield Backend(
            ServerEngine(Server.model_validate(settings)).lm(temperature=0.0), beyond=None
        )


def openai_api(request: pytest.FixtureRequest) -> Iterator[Backend]:
    with (
        OpenAIServer(echo, key="a key of the contract") as server,
        pytest.MonkeyPatch.context() as environment,
    ):
        environment.setenv("CONTRACT_KEY", "a key of the contract")
        settings = {
            "kind": "api",
            "model": f"openai/{server.model}",
            "api_base": server.api_base,
            "num_retries": 0,
        }
        yield Backend(
            build_lm(Api.model_validate({**settings, "api_key_env": "CONTRACT_KEY"})), beyond=None
        )


BACKENDS = {
    made.__name__: made
    for made in (in_process, openai_server, openai_api, smol_in_process, llama_cpp, vllm)
}
SLOW = ("smol_in_process", "llama_cpp", "vllm")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in BACKENDS
    ],
)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    yield from BACKENDS[request.param](request)


def test_it_answers_with_text_and_counts_tokens(backend: Backend) -> None:
    answer = backend.ask(QUESTION)
    # A hosted model may name itself more closely, or without its provider.
    assert answer["text"] and answer["model"].split("/")[-1] in backend.lm.model
    assert answer["input_tokens"] > 3 and 0 < answer["output_tokens"] <= 8


def test_greedy_answers_repeat(backend: Backend) -> None:
    assert backend.ask(QUESTION) == backend.ask(QUESTION)


def test_max_tokens_cuts_and_says_so(backend: Backend) -> None:
    answer = backend.ask(LONG, max_tokens=3)
    assert answer["finish_reason"] == "length" and answer["output_tokens"] == 3


def test_a_stop_string_cuts_before_itself_and_says_so(backend: Backend) -> None:
    whole = backend.ask(QUESTION)["text"]
    stop = whole.strip()[2:4]
    cut = backend.ask(QUESTION, stop=(stop,))
    assert cut["finish_reason"] == "stop" and cut["text"] == whole[: whole.index(stop)]


def test_drafts_differ_by_their_seed_and_repeat_with_it(backend: Backend) -> None:
    drafts = [backend.ask(QUESTION, temperature=1.0, seed=seed)["text"] for seed in range(4)]
    assert len(set(drafts)) > 1
    if backend.samples:
        assert [
            backend.ask(QUESTION, temperature=1.0, seed=seed)["text"] for seed in range(4)
        ] == drafts


def test_n_drafts_of_one_call_are_n_texts(backend: Backend) -> None:
    made = backend.lm(QUESTION, n=3, temperature=1.0, max_tokens=6)
    assert len(made) == 3 and all(isinstance(text, str) for text in made)


def test_unicode_goes_through(backend: Backend) -> None:
    assert backend.ask(UNICODE)["input_tokens"] > 3
    assert backend.ask(UNICODE) == backend.ask(UNICODE)


def test_a_long_prompt_is_read_to_its_end(backend: Backend) -> None:
    assert backend.ask(LONG)["input_tokens"] > backend.ask(QUESTION)["input_tokens"] + 60


def test_32_threads_are_answered_each_its_own(backend: Backend) -> None:
    questions = [f"{QUESTION} {number}" for number in range(32)]
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(lambda question: backend.ask(question, max_tokens=4), questions))
    counted = [answer["input_tokens"] for answer in together]
    assert counted == [
        backend.ask(question, max_tokens=1)["input_tokens"] for question in questions
    ]
    assert all(answer["text"] is not None and answer["output_tokens"] <= 4 for answer in together)


def test_an_adapter_speaks_otherwise_and_the_base_stays(backend: Backend) -> None:
    if backend.adapter is None:
        pytest.skip("this protocol has no way to load an adapter")
    before = backend.ask(QUESTION, max_tokens=16)["text"]
    tuned = backend.adapter()
    assert tuned.startswith(f"{backend.lm.model}+")
    assert backend.ask(QUESTION, max_tokens=16, model=tuned)["text"] != before
    assert backend.ask(QUESTION, max_tokens=16)["text"] == before


def test_a_prompt_beyond_the_context_is_a_context_failure(backend: Backend) -> None:
    if backend.beyond is None:
        pytest.skip("nobody says how much context this one has")
    with pytest.raises(LMError) as caught:
        backend.ask(backend.beyond)
    assert failure(caught.value).startswith("context: ")


def test_a_recorded_lm_hears_what_was_said(backend: Backend) -> None:
    lm = recorded(backend.lm)
    with listening() as calls:
        text = lm(QUESTION, max_tokens=5)
    assert [call.text for call in calls] == text and calls[0].messages[-1]["content"] == QUESTION


def test_a_program_runs_on_it(backend: Backend) -> None:
    from cowest_dspy.program.adapters import LineAdapter

    predict = dspy.Predict("question -> answer")
    with dspy.context(lm=backend.lm, adapter=LineAdapter()):
        assert isinstance(predict(question=QUESTION, config={"max_tokens": 6}).answer, str)
