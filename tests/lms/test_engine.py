"""The in-process engine, on a real model that is tiny, beside transformers' own generate."""

from __future__ import annotations

import copy
import pickle
import shutil
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.lm15 import ContextLengthError, InvalidRequestError
from engine_parts import SHOTS, SYSTEM, adapter, ask_all, engine, generated, prompts  # noqa: F401 - fixtures

from cowest_dspy.errors import ModelError
from cowest_dspy.lms import LocalEngine
from cowest_dspy.lms.local import generate
from cowest_dspy.lms.local.engine import shared_engine
from cowest_dspy.lms.local.sampling import PromptRow
from cowest_dspy.lms.local.weights import adapter_hash, locate
from cowest_dspy.store import serialize
from cowest_dspy.store.store import Store


def test_a_batch_with_a_shared_beginning_says_what_generate_says_one_by_one(
    engine: LocalEngine, tiny_model: Path
) -> None:
    asked = prompts(5)
    assert ask_all(engine, asked, max_tokens=12, temperature=0.0) == [
        generated(tiny_model, m, 12) for m in asked
    ]


def test_a_prompt_without_anything_to_share_says_what_generate_says(
    engine: LocalEngine, tiny_model: Path
) -> None:
    asked = [[{"role": "user", "content": text}] for text in ("a", "something longer than that")]
    assert ask_all(engine, asked, max_tokens=8, temperature=0.0) == [
        generated(tiny_model, m, 8) for m in asked
    ]


def test_base_and_adapters_share_the_weights_and_keep_apart(
    engine: LocalEngine, tiny_model: Path, adapter: Path
) -> None:
    tuned = engine.load_adapter(adapter)
    asked = prompts(2)
    base_before = ask_all(engine, asked, max_tokens=8)
    assert ask_all(engine, asked, tuned, max_tokens=8) == [
        generated(tiny_model, m, 8, adapter) for m in asked
    ]
    assert ask_all(engine, asked, max_tokens=8) == base_before
    assert tuned == f"{engine.model_id}+{adapter_hash(adapter)}"


def test_the_same_seed_gives_the_same_sample_whatever_shares_the_batch(
    engine: LocalEngine,
) -> None:
    asked = prompts(6)
    alone = [
        ask_all(engine, [messages], temperature=1.0, seed=7, max_tokens=8)[0] for messages in asked
    ]
    assert ask_all(engine, asked, temperature=1.0, seed=7, max_tokens=8) == alone
    assert ask_all(engine, asked, temperature=1.0, seed=8, max_tokens=8) != alone


def test_several_drafts_of_one_prompt_are_prefilled_once_and_differ_by_their_seed(
    engine: LocalEngine,
) -> None:
    asked = prompts(3)
    alone = [
        [
            ask_all(engine, [messages], temperature=1.0, seed=seed, max_tokens=8)[0]
            for seed in (1, 2)
        ]
        for messages in asked
    ]
    loaded = engine._load()
    rows = [
        PromptRow(engine._tokens(messages)[0], 8, temperature=1.0, seed=seed)
        for messages in asked
        for seed in (1, 2)
    ]
    sizes: list[tuple[int, ...]] = []

    def counting(**given: Any) -> Any:
        sizes.append(tuple(given["input_ids"].shape))
        return loaded.lora.model(**given)

    session = generate.Session(
        loaded.lora.model, loaded.tokenizer, loaded.end_tokens, lambda names: counting
    )
    made = generate.run(session, rows)
    assert [one.text for one in made] == [text for texts in alone for text in texts]
    assert sum(count for count, length in sizes if length > 1) == 3


def test_a_padded_prompt_is_not_taken_for_one_that_begins_with_the_padding_token(
    engine: LocalEngine,
) -> None:
    rows = [PromptRow(tokens, 6) for tokens in ([0, 70, 80], [70, 80])]
    begin = engine._load().begin
    together = generate.run(begin(), rows)
    one_by_one = [generate.run(begin(), [row])[0] for row in rows]
    assert [one.tokens for one in together] == [one.tokens for one in one_by_one]


def test_top_k_1_and_a_tiny_top_p_are_greedy(engine: LocalEngine) -> None:
    asked = prompts(3)
    greedy = ask_all(engine, asked, max_tokens=6)
    assert ask_all(engine, asked, max_tokens=6, temperature=1.0, top_k=1) == greedy
    assert ask_all(engine, asked, max_tokens=6, temperature=1.0, top_p=1e-6) == greedy


def test_stop_strings_max_tokens_and_usage(engine: LocalEngine) -> None:
    messages = prompts(1)[0]
    whole = engine.complete(
        serialize.request_from_messages(engine.model_id, messages, max_tokens=10)
    )
    answer = serialize.response_to_dict(whole)
    assert (
        answer["finish_reason"] == "length"
        and answer["output_tokens"] == 10
        and answer["input_tokens"] > 50
    )
    stop = answer["text"][3:5]
    cut = serialize.response_to_dict(
        engine.complete(
            serialize.request_from_messages(engine.model_id, messages, max_tokens=10, stop=(stop,))
        )
    )
    assert cut["text"] == answer["text"].split(stop)[0] and cut["finish_reason"] == "stop"


def logprobs_of(
    folder: Path, messages: list[dict[str, str]], text: str | list[int], adapter: Path | None = None
) -> Any:
    """``[tokens, vocabulary]``: what transformers alone gives for each token of a text and its end
    (or for these tokens), and the tokens."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter) if adapter else model
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if isinstance(text, str):
        text = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    tokens = list(text)
    with torch.no_grad():
        logits = model(torch.tensor([[*before, *tokens]])).logits[0, len(before) - 1 : -1]
    return logits.log_softmax(-1), tokens


TEXTS = ["yes", "no, it is not", "12 bar"]


def test_the_likelihood_of_a_text_is_what_transformers_gives(
    engine: LocalEngine, tiny_model: Path, adapter: Path
) -> None:
    asked = [*zip(prompts(3), TEXTS, strict=True), ([{"role": "user", "content": "a"}], "b")]
    tuned = engine.load_adapter(adapter)
    for model, folder in ((None, None), (tuned, adapter)):
        for one, (messages, text) in zip(engine.score(asked, model), asked, strict=True):
            logprobs, tokens = logprobs_of(tiny_model, messages, text, folder)
            assert one.logprob == pytest.approx(
                float(logprobs[range(len(tokens)), tokens].sum()), abs=1e-3
            )
            assert one.tokens == len(tokens) and one.per_token == one.logprob / len(tokens)
    assert engine.score(asked, tuned) != engine.score(asked)
    assert engine.score([]) == []


def test_a_text_beyond_the_context_has_no_likelihood(engine: LocalEngine) -> None:
    with pytest.raises(ContextLengthError, match="a text of"):
        engine.score([(prompts(1)[0], "far too long " * 500)])


def test_logprobs_are_those_of_the_model_and_cover_the_text(
    engine: LocalEngine, tiny_model: Path
) -> None:
    messages = prompts(1)[0]
    answer = serialize.response_to_dict(
        engine.complete(
            serialize.request_from_messages(
                engine.model_id, messages, max_tokens=6, temperature=1.5, seed=3, logprobs=2
            )
        )
    )
    expected, _ = logprobs_of(tiny_model, messages, [one["token_id"] for one in answer["logprobs"]])
    assert "".join(one["token"] for one in answer["logprobs"]) == answer["text"]
    for place, one in enumerate(answer["logprobs"]):
        assert one["logprob"] == pytest.approx(float(expected[place, one["token_id"]]), abs=1e-3)
        best = [other["logprob"] for other in one["top"]]
        assert best == pytest.approx(expected[place].topk(2).values.tolist(), abs=1e-3)


def test_logprobs_end_where_a_stop_string_cuts_the_text(engine: LocalEngine) -> None:
    messages = prompts(1)[0]
    whole = engine.complete(
        serialize.request_from_messages(engine.model_id, messages, max_tokens=10)
    )
    stop = serialize.response_text(whole)[3:5]
    request = serialize.request_from_messages(
        engine.model_id, messages, max_tokens=10, stop=(stop,), logprobs=0
    )
    cut = serialize.response_to_dict(engine.complete(request))
    assert "".join(one["token"] for one in cut["logprobs"])[: len(cut["text"])] == cut["text"]
    assert sum(len(one["token"]) for one in cut["logprobs"][:-1]) < len(cut["text"])


def test_logprobs_reach_a_prediction_and_survive_the_store(
    engine: LocalEngine, tmp_path: Path
) -> None:
    first = engine.lm(max_tokens=4)("Hello?", logprobs=True)
    assert first[0]["logprobs"]["content"]
    request = serialize.request_from_messages(
        engine.model_id, prompts(1)[0], max_tokens=4, logprobs=1
    )
    with Store(tmp_path) as store:
        answered, _ = store.answer(request, lambda: engine.complete(request))
        assert store.answer(request, lambda: pytest.fail("asked again")) == (answered, True)
    assert answered.logprobs is not None and len(answered.logprobs[0].top) == 1


def test_what_the_engine_does_not_know_is_refused(engine: LocalEngine) -> None:
    messages = prompts(1)[0]
    with pytest.raises(InvalidRequestError, match="does not know the model"):
        engine.complete(serialize.request_from_messages("local/other", messages))
    with pytest.raises(InvalidRequestError, match="frequency_penalty"):
        engine.complete(
            serialize.request_from_messages(engine.model_id, messages, frequency_penalty=0.5)
        )
    with pytest.raises(ContextLengthError, match="do not fit"):
        engine.complete(
            serialize.request_from_messages(engine.model_id, messages, max_tokens=10_000_000)
        )


def test_a_failure_in_one_batch_loses_nothing_else(engine: LocalEngine) -> None:
    with pytest.raises(InvalidRequestError):
        engine.complete(serialize.request_from_messages("local/other", prompts(1)[0]))
    assert ask_all(engine, prompts(2), max_tokens=3)


def test_an_engine_is_never_copied_and_travels_as_settings(
    engine: LocalEngine, adapter: Path, tiny_model: Path
) -> None:
    assert copy.deepcopy(engine) is engine
    shared = shared_engine(tiny_model, dtype="float32")
    shared.load_adapter(adapter)
    assert len(pickle.dumps(shared)) < 2000
    assert pickle.loads(pickle.dumps(shared)) is shared
    lm = shared.lm(max_tokens=4)
    assert dspy.LM.load_state(lm.dump_state(), allow_custom_lm_class=True)("Hello?") == lm("Hello?")


async def _ask(lm: dspy.LM) -> Any:
    return await lm.acall("Hello?")


def test_the_engine_answers_asyncio(engine: LocalEngine) -> None:
    import asyncio

    lm = engine.lm(max_tokens=4)
    assert asyncio.run(_ask(lm)) == lm("Hello?")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: folder / "missing", "There is no model folder"),
        (lambda folder: folder, "it has no config.json"),
    ],
)
def test_a_folder_that_is_no_model_says_so(tmp_path: Path, make: Any, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        locate(str(make(tmp_path)))


def test_a_tokenizer_without_a_chat_template_says_so(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "bare")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = folder / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"chat_template"', '"no_template"'))
    engine = LocalEngine(folder)
    with pytest.raises(ModelError, match="no chat template"):
        engine.complete(serialize.request_from_messages(engine.model_id, prompts(1)[0]))
