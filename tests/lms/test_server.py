"""ServerEngine beside a strict server of the test's own: what it sends, what it makes of answers
and failures, adapters."""

from __future__ import annotations

import asyncio
import copy
import email.utils
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy import lm15
from local_server import CHAT, LocalServer, Said, completion, local_server
from tiny import make_adapter

from cowest_dspy.errors import ConfigError, ModelError, TuningError
from cowest_dspy.lms import ServerEngine, build_lm
from cowest_dspy.lms.config import Server
from cowest_dspy.lms.local.weights import adapter_hash, folder_hash
from cowest_dspy.store import serialize
from cowest_dspy.tuning import TunableEngine, engine_of

ASKED = [{"role": "system", "content": "Be terse."}, {"role": "user", "content": "Ready?"}]
LORA = "/v1/load_lora_adapter"


def settings_for(place: LocalServer | str, **settings: Any) -> Server:
    url = place if isinstance(place, str) else place.url
    return Server.model_validate(
        {"kind": "server", "model": "m", "api_base": f"{url}/v1", **settings}
    )


def ask(engine: ServerEngine, model: str | None = None, **settings: Any) -> dict[str, Any]:
    return serialize.response_to_dict(
        engine.complete(
            serialize.request_from_messages(model or engine.model_id, ASKED, **settings)
        )
    )


@pytest.fixture(scope="module")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [
        make_adapter(tiny_model, tmp_path_factory.mktemp("adapters") / str(seed), seed)
        for seed in (1, 2)
    ]


def test_a_request_is_sent_as_it_is_and_the_answer_counted() -> None:
    with local_server({CHAT: lambda _: completion("yes", "length")}) as server:
        answer = ask(
            ServerEngine(settings_for(server)),
            temperature=0.5,
            max_tokens=4,
            stop=("\n",),
            seed=3,
            top_k=5,
        )
    sent = {
        "model": "m",
        "messages": ASKED,
        "stream": False,
        "temperature": 0.5,
        "max_tokens": 4,
        "stop": ["\n"],
        "seed": 3,
    }
    assert server.bodies() == [sent | {"top_k": 5}]
    counted = {"finish_reason": "length", "input_tokens": 7, "output_tokens": 3}
    assert answer == {"model": "server/m", "text": "yes", "usd": 0.0, **counted}


@pytest.mark.parametrize("kind", ["llama_cpp", "vllm"])
def test_a_server_of_known_kind_samples_as_asked_and_not_by_its_own_defaults(kind: str) -> None:
    with local_server(
        {CHAT: lambda _: completion(), "/lora-adapters": lambda _: Said([])}
    ) as server:
        ask(ServerEngine(settings_for(server, server=kind)), temperature=1.0)
    sent = server.bodies()[0]
    assert (sent["temperature"], sent["top_p"], sent["min_p"], sent["seed"]) == (
        1.0,
        1.0,
        0.0,
        0,
    ) and sent["top_k"] <= 0


def test_logprobs_cover_the_text_and_end_where_a_stop_string_cut_it() -> None:
    tokens = [
        {"token": text, "logprob": -0.1, "bytes": list(text.encode())}
        for text in ("1", " 2", " 3", "!")
    ]
    content = [{**one, "top_logprobs": [one]} for one in tokens]
    with local_server({CHAT: lambda _: completion("1 2", logprobs={"content": content})}) as server:
        engine = ServerEngine(settings_for(server))
        chosen, ranked = ask(engine, logprobs=0)["logprobs"], ask(engine, logprobs=1)["logprobs"]
    assert (
        [one["token"] for one in chosen] == ["1", " 2"]
        and chosen[0]["top"] == []
        and len(ranked[0]["top"]) == 1
    )
    assert "top_logprobs" not in server.bodies()[0] and server.bodies()[1]["top_logprobs"] == 1


FAILURES = [
    (Said({"error": {"message": "slow down"}}, 429, {"retry-after": "7"}), lm15.RateLimitError),
    (
        Said({"error": {"message": "no money", "code": "insufficient_quota"}}, 429),
        lm15.BillingError,
    ),
    (Said({"error": {"message": "who?"}}, 401), lm15.AuthError),
    (Said({"error": {"message": "Loading model", "code": 503}}, 503), lm15.ServerError),
    (Said("<html>bad gateway</html>", 502), lm15.ServerError),
    (Said({"error": {"message": "too slow"}}, 504), lm15.TimeoutError),
    (Said({"error": {"message": "bad temperature"}}, 400), lm15.InvalidRequestError),
    (Said({"error": {"message": "no such model"}}, 404), lm15.InvalidRequestError),
    (
        Said(
            {
                "error": {
                    "message": "request (9 tokens) exceeds",
                    "type": "exceed_context_size_error",
                }
            },
            400,
        ),
        lm15.ContextLengthError,
    ),
    (
        Said(
            {"object": "error", "message": "This model's maximum context length is 8 tokens"}, 400
        ),
        lm15.ContextLengthError,
    ),
    (Said('{"choices": [{"mess', 200), lm15.ServerError),
    (Said("", 200), lm15.ServerError),
    (Said([1], 200), lm15.ServerError),
    (Said({"choices": []}, 200), lm15.ServerError),
    (
        Said({"choices": [{"finish_reason": "stop", "message": {"content": 3}}]}, 200),
        lm15.ServerError,
    ),
    (Said({"choices": "none"}, 200, cut=4), lm15.TransportError),
    (Said("", 302, {"location": "http://127.0.0.1:1/"}), lm15.ProviderError),
]


@pytest.mark.parametrize(
    ("said", "kind"),
    FAILURES,
    ids=lambda given: getattr(given, "__name__", None) or str(given.body)[:30],
)
def test_every_failure_is_an_error_of_its_kind(said: Said, kind: type[Exception]) -> None:
    with local_server({CHAT: lambda _: said}) as server, pytest.raises(lm15.LM15Error) as raised:
        ask(ServerEngine(settings_for(server)))
    assert type(raised.value) is kind
    assert raised.value.retry_after == (7.0 if said.headers.get("retry-after") else None)


def test_retry_after_may_be_a_date() -> None:
    soon = email.utils.formatdate(time.time() + 30, usegmt=True)
    with (
        local_server({CHAT: lambda _: Said("{}", 429, {"retry-after": soon})}) as server,
        pytest.raises(lm15.RateLimitError) as raised,
    ):
        ask(ServerEngine(settings_for(server)))
    assert raised.value.retry_after is not None and 20 < raised.value.retry_after <= 30


def test_a_server_that_is_silent_or_away_is_a_failure_that_passes() -> None:
    with local_server({CHAT: lambda _: (time.sleep(0.5), completion())[1]}) as server:
        with pytest.raises(lm15.TimeoutError, match=r"0\.1 seconds"):
            ask(ServerEngine(settings_for(server, timeout=0.1)))
        away = server.url
    with pytest.raises(lm15.TransportError):
        ask(ServerEngine(settings_for(away)))


def test_a_server_that_must_be_there_and_is_not_is_one_clear_error(
    tiny_model: Path, adapters: list[Path]
) -> None:
    engine = ServerEngine(
        settings_for("http://127.0.0.1:9", server="vllm", weights=str(tiny_model))
    )
    with pytest.raises(
        ModelError, match=r"cannot be had from http://127\.0\.0\.1:9/v1: .*ConnectError"
    ):
        engine.require(engine.load_adapter(adapters[0]))


def test_dspy_tries_a_failure_that_passes_again() -> None:
    said = iter(
        [
            Said("{}", 500, {"retry-after": "0"}),
            Said("{}", 429, {"retry-after": "0"}),
            completion("at last"),
        ]
    )
    with local_server({CHAT: lambda _: next(said)}) as server:
        assert build_lm(settings_for(server))("Ready?") == ["at last"]
    assert len(server.asked) == 3


def test_no_more_calls_are_under_way_than_allowed() -> None:
    under_way, most, counting = 0, 0, threading.Lock()

    def slowly(_: Any) -> Said:
        nonlocal under_way, most
        with counting:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.02)
        with counting:
            under_way -= 1
        return completion()

    with local_server({CHAT: slowly}) as server, ThreadPoolExecutor(16) as pool:
        engine = ServerEngine(settings_for(server, concurrency=3))
        list(pool.map(lambda _: ask(engine), range(24)))
    assert most == 3


async def _ask_at_once(lm: dspy.LM) -> list[Any]:
    return await asyncio.gather(*(lm.acall("Ready?") for _ in range(5)))


def test_asyncio_gets_its_answers_at_once() -> None:
    together = threading.Barrier(5)
    with local_server({CHAT: lambda _: (together.wait(10), completion())[1]}) as server:
        assert asyncio.run(_ask_at_once(build_lm(settings_for(server)))) == [["yes"]] * 5


def test_what_the_engine_does_not_know_is_refused_before_it_is_sent() -> None:
    with local_server({}) as server:
        engine = ServerEngine(settings_for(server))
        with pytest.raises(lm15.InvalidRequestError, match="frequency_penalty"):
            ask(engine, frequency_penalty=0.5)
        with pytest.raises(lm15.InvalidRequestError, match="does not know the model server/other"):
            ask(engine, "server/other")


def test_a_key_is_sent_and_never_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret-1234567890abc")
    with local_server({CHAT: lambda _: completion()}) as server:
        lm = build_lm(settings_for(server, api_key_env="MY_KEY"))
        lm("Ready?")
    assert server.headers[0]["authorization"] == "Bearer sk-secret-1234567890abc"
    assert "sk-secret" not in str(lm.dump_state()) + repr(pickle.dumps(lm.engine))
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(ConfigError, match="MY_KEY is not set"):
        build_lm(settings_for(server, api_key_env="MY_KEY"))


def test_an_engine_is_never_copied_and_travels_as_settings(
    tiny_model: Path, adapters: list[Path]
) -> None:
    settings = settings_for("http://127.0.0.1:9", server="vllm", weights=str(tiny_model))
    lm = build_lm(settings.model_copy(update={"adapter": str(adapters[0])}))
    assert lm.model == f"server/m@{folder_hash(tiny_model)}+{adapter_hash(adapters[0])}"
    assert (
        copy.deepcopy(lm.engine) is lm.engine and pickle.loads(pickle.dumps(lm.engine)) is lm.engine
    )
    loaded = dspy.LM.load_state(lm.dump_state(), allow_custom_lm_class=True)
    assert isinstance(loaded, dspy.LM) and loaded.engine is lm.engine
    assert build_lm(settings.model_copy(update={"temperature": 1.0})).engine is lm.engine


def test_vllm_is_given_an_adapter_once_under_the_name_of_its_content(
    tiny_model: Path, adapters: list[Path]
) -> None:
    with (
        local_server({CHAT: lambda _: completion(), LORA: lambda _: Said("Success")}) as server,
        ThreadPoolExecutor(8) as pool,
    ):
        engine = ServerEngine(settings_for(server, server="vllm", weights=str(tiny_model)))
        one, two = map(engine.load_adapter, adapters)
        list(pool.map(lambda model: ask(engine, model), [one, two, engine.model_id] * 4))
    names = [f"cowest-{adapter_hash(folder)}" for folder in adapters]
    posted = sorted(server.bodies(LORA), key=lambda body: names.index(body["lora_name"]))
    assert posted == [
        {"lora_name": name, "lora_path": str(folder)}
        for name, folder in zip(names, adapters, strict=True)
    ]
    assert sorted(body["model"] for body in server.bodies()) == sorted([*names, "m"] * 4)


@pytest.mark.parametrize(
    ("said", "works"),
    [
        (
            Said(
                {
                    "object": "error",
                    "message": "The lora adapter 'x' has already been loaded.",
                    "code": 400,
                },
                400,
            ),
            True,
        ),
        (Said({"detail": "Not Found"}, 404), False),
    ],
)
def test_an_adapter_that_vllm_has_is_fine_and_one_that_it_refuses_says_what_to_type(
    said: Said, works: bool, tiny_model: Path, adapters: list[Path]
) -> None:
    with local_server({CHAT: lambda _: completion(), LORA: lambda _: said}) as server:
        engine = ServerEngine(settings_for(server, server="vllm", weights=str(tiny_model)))
        model = engine.load_adapter(adapters[0])
        if works:
            assert ask(engine, model)["model"] == model
            return
        with pytest.raises(ModelError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"):
            engine.require(model)


def test_llama_cpp_lets_the_named_adapter_speak_and_all_others_be_silent(
    tiny_model: Path, adapters: list[Path]
) -> None:
    names = [f"/elsewhere/cowest-{adapter_hash(folder)}.gguf" for folder in adapters]
    listed = [
        {"id": 1, "path": names[0], "scale": 1.0},
        {"id": 0, "path": "other.gguf", "scale": 1.0},
    ]
    with local_server(
        {CHAT: lambda _: completion(), "/lora-adapters": lambda _: Said(listed)}
    ) as server:
        engine = ServerEngine(settings_for(server, server="llama_cpp", weights=str(tiny_model)))
        one, two = map(engine.load_adapter, adapters)
        ask(engine)
        ask(engine, one)
        with pytest.raises(
            ModelError,
            match=r"Start it again with: --lora .*cowest-.*gguf --lora-init-without-apply",
        ):
            engine.require(two)
    scales = [[row["scale"] for row in body["lora"]] for body in server.bodies()]
    assert scales == [[0.0, 0.0], [0.0, 1.0]] and not any(
        body["cache_prompt"] for body in server.bodies()
    )


def test_the_launcher_that_was_here_names_what_took_its_place() -> None:
    command = ["{python}", "-m", "cowest_dspy.lms.llama_server", "--port", "{port}"]
    with pytest.raises(ValueError, match=r'write "llama-server".*in place of "\{python\}"'):
        Server.model_validate({"kind": "server", "model": "m", "command": command})


def test_only_a_server_that_takes_adapters_and_names_its_weights_is_tunable(
    tiny_model: Path, adapters: list[Path]
) -> None:

    def make(**more: Any) -> ServerEngine:
        return ServerEngine(settings_for("http://127.0.0.1:9", **more))

    assert isinstance(make(server="vllm", weights=str(tiny_model)), TunableEngine)
    for engine in (make(server="vllm"), make(weights=str(tiny_model))):
        assert not isinstance(engine, TunableEngine)
        with pytest.raises(TuningError, match="a server of llama\\.cpp or vLLM"):
            engine_of(engine.lm())
    with pytest.raises(ModelError, match="adapters need weights"):
        make(server="vllm").load_adapter(adapters[0])
    with pytest.raises(ModelError, match="no way to load an adapter"):
        make(weights=str(tiny_model)).load_adapter(adapters[0])
    with pytest.raises(ModelError, match="holds no adapter"):
        make(server="vllm", weights=str(tiny_model)).load_adapter(tiny_model)
