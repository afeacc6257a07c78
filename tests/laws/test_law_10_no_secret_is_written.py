"""Law 10: nothing secret is written: not in a saved program, a log, a store, a report, an error message."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dspy
import pytest
import toy
from dspy.lm15 import AuthError, ServerError
from hypothesis import given
from hypothesis import strategies as st
from scripted import match, questions, strong_that_reads, together

from cowest_dspy import Experiment, Store, collect, load_config
from cowest_dspy.config_text import effective_toml
from cowest_dspy.errors import MASK, ConfigError, StoreError, masked
from cowest_dspy.lms import build_lm
from cowest_dspy.lms.recording import keeping, recorded
from cowest_dspy.store import Store
from cowest_dspy.tables import Api, Server
from cowest_dspy.testing import Fault, OpenAIServer, ScriptedEngine
from cowest_dspy.traces import Sampling, collect


def test_law_10_no_secret_is_written(tmp_path: Path) -> None:
    secret = "sk-abcdefghijklmnop1234"
    weak = ScriptedEngine(lambda request: ServerError(f"bad key {secret}"))
    program = together(weak, strong_that_reads())
    with Store(tmp_path) as store:
        traces = collect(program, questions(1), match, Sampling(drafts=2), store=store, max_failed=1.0)
    program.save(tmp_path / "program.json")
    assert "***" in (traces[0].error or "")
    for file in tmp_path.iterdir():
        assert secret.encode() not in file.read_bytes()


RANDOM = "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8"


HIDDEN = "Q7wE8rT9yU0iO1pA2sD3"


# Of each shape: the text in which it would stand, and the part of it that must not be seen again. In two parts, so that this file
# holds none.
SECRETS: dict[str, tuple[str, str]] = {
    "openai": ("s" + "k-" + RANDOM, RANDOM),
    "openai project": ("s" + "k-proj-" + RANDOM + "_x-Y9", RANDOM),
    "anthropic": ("s" + "k-ant-api03-" + RANDOM, RANDOM),
    "hugging face": ("h" + "f_" + RANDOM[:34], RANDOM[:34]),
    "aws": ("AK" + "IA" + "Q3EGRIPXWHYNT7ZB", "Q3EGRIPXWHYNT7ZB"),
    "google": ("AI" + "za" + RANDOM[:35], RANDOM[:35]),
    "github": ("gh" + "p_" + RANDOM, RANDOM),
    "slack": ("xo" + "xb-1234567890-" + RANDOM, RANDOM),
    "bearer header": ("Authorization: Bearer " + HIDDEN, HIDDEN),
    "password in a url": ("https://me:" + HIDDEN + "@db.example.org/x", HIDDEN),
    "json web token": ("ey" + "JhbGciOiJIUzI1NiJ9." + "ey" + "JzdWIiOiIxMjM0In0." + RANDOM, RANDOM),
    "private key": ("-----BEGIN " + "PRIVATE KEY-----\n" + RANDOM + "\n" + RANDOM + "\n-----END " + "PRIVATE KEY-----", RANDOM),
}


@pytest.fixture(params=SECRETS)
def secret(request: pytest.FixtureRequest) -> tuple[str, str]:
    return SECRETS[request.param]


def seen(part: str, folder: Path, *texts: str) -> list[str]:
    """Where the secret's part is: names of files of the folder, and numbers of texts."""
    parts = {part.encode(), json.dumps(part).encode()[1:-1], part[:-2].encode()}
    found = [str(file) for file in folder.rglob("*") if file.is_file() and any(one in file.read_bytes() for one in parts)]
    return found + [f"text {place}" for place, text in enumerate(texts) if any(one.decode() in text for one in parts)]


def test_every_shape_is_masked_and_what_stands_around_it_stays(secret: tuple[str, str]) -> None:
    text, part = secret
    told = masked(f"The server said: {text} is not valid, ask again.")
    assert part not in told and part[:-2] not in told and MASK in told
    assert told.startswith("The server said: ") and told.endswith("is not valid, ask again.")
    assert masked(" ".join(f"before {text} after".split())).endswith(" after"), "as a failure is told, on one line"


NORMAL = [
    "Take sk-learn and max_tokens = 12, hf_hub_download and key_value pairs.",
    "A risk-averse task-specific model; the bearer certificate of the company.",
    "See https://example.org:8080/a@b and mailto:me@example.org at 10:30.",
    "The key-value store has 12 pages; eyJ is how it begins. AKIA is a word.",
    "local/SmolLM2-135M-Instruct@3f9a1c2b7d4e+0011aabbccdd, seed 123456789012345",
    "BEGIN PRIVATE matters; the public key is here.",
    "sha256 e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
]


@pytest.mark.parametrize("text", NORMAL)
def test_normal_text_is_left_as_it_is(text: str) -> None:
    assert masked(text) == text


@given(st.text(st.characters(categories=("Lu", "Ll", "Zs", "Po"), max_codepoint=0x24F), max_size=200))
def test_words_without_digits_signs_or_addresses_are_never_masked(text: str) -> None:
    if not any(sign in text for sign in ("://", "Bearer", "_", "-")):
        assert masked(text) == text


@given(st.sampled_from(sorted(SECRETS)), st.text(max_size=30), st.text(max_size=30))
def test_masking_twice_is_masking_once(name: str, before: str, after: str) -> None:
    once = masked(f"{before} {SECRETS[name][0]} {after}")
    assert masked(once) == once


def test_law_10_an_error_that_holds_a_secret_is_written_without_it(
    secret: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text, part = secret
    caplog.set_level(logging.DEBUG)
    weak = ScriptedEngine(lambda request: AuthError(f"refused: {text}"), model="scripted/weak")
    program = together(weak, strong_that_reads())
    with Store(tmp_path) as store:
        traces = list(collect(program, questions(2), match, Sampling(drafts=2), store=store, max_failed=1.0))
        assert seen(part, tmp_path, *(repr(trace) for trace in traces)) == [], "also in the log of the open file"
    program.save(tmp_path / "program.json")
    assert all(MASK in (trace.error or "") for trace in traces)
    assert seen(part, tmp_path, caplog.text, json.dumps(program.dump_state(), default=str)) == []


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Puts a key into the environment."""

    def plant(value: str) -> str:
        monkeypatch.setenv("COWEST_PLANTED_KEY", value)
        return "COWEST_PLANTED_KEY"

    return plant


def hosted(kind: str, address: str, variable: str) -> dspy.LM:
    name = "openai/scripted" if kind == "api" else "scripted"
    table = {"kind": kind, "model": name, "api_base": address, "api_key_env": variable, "num_retries": 0}
    return build_lm((Api if kind == "api" else Server).model_validate(table))


ODD = "correct-horse-battery-staple"


@pytest.mark.parametrize("kind", ["api", "server"])
@pytest.mark.parametrize("status", [400, 401, 429, 500])
def test_law_10_a_key_that_a_server_repeats_is_written_nowhere(
    kind: str, status: int, tmp_path: Path, planted: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    keys = [ODD, SECRETS["openai"][0], SECRETS["hugging face"][0]]
    for number, key in enumerate(keys):
        folder = tmp_path / str(number)
        faults = [Fault.status(status, message=f"Incorrect API key provided: {key}. Bearer {key}") for _ in range(50)]
        with OpenAIServer(lambda request: "fine", faults=faults) as server, Store(folder) as store, keeping(store):
            lm = hosted(kind, server.api_base, planted(key))
            with pytest.raises(dspy.LMError) as caught:
                recorded(lm)("hello")
            (folder / "state.json").write_text(json.dumps(lm.dump_state(), default=str))
            assert seen(key, folder, str(caught.value), caplog.text, repr(lm.history)) == []


RECIPE = (
    toy.RECIPE
    + """
import os
from dspy.lm15 import AuthError

def rows(split, seed=0):
    return [{"id": f"{split}{i}", "question": f"{split} {i}?", "answer": "yes"} for i in range(4)]

def program():
    return Collaboration("question -> answer")

def weak():
    def answer(request):
        if "1?" in request["messages"][-1]["content"]:
            return AuthError("not with " + os.environ["COWEST_PLANTED_ERROR"])
        return "a draft " + str(request["config"].get("seed"))
    return ScriptedEngine(answer, model="scripted/weak")
"""
)


TASK = (
    toy.TASK
    + toy.engine("weak")
    + """
[strong]
kind = "api"
model = "openai/scripted"
api_base = "{address}"
api_key_env = "COWEST_PLANTED_KEY"
num_retries = 0
[collect]
drafts = 2
max_failed = 1.0
"""
)


def test_law_10_of_a_whole_run_nothing_secret_is_left(
    secret: tuple[str, str], tmp_path: Path, planted: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    text, part = secret
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("COWEST_PLANTED_ERROR", text)
    planted(ODD)
    (tmp_path / "toy.py").write_text(RECIPE)

    def strong(request: dict[str, Any]) -> str | Fault:
        about = request["messages"][-1]["content"]
        return Fault.status(400, message=f"{text} and {ODD} were refused") if "2?" in about else "yes"

    with OpenAIServer(strong, key=ODD) as server:
        (tmp_path / "toy.toml").write_text(TASK.format(address=server.api_base))
        config = load_config([tmp_path / "toy.toml"])
        with Experiment(config, tmp_path / "run") as experiment:
            traces = list(experiment.collect())
            experiment.evaluate(["strong"])
            experiment.report()
            for hidden in (part, ODD):
                assert seen(hidden, tmp_path / "run", caplog.text, repr(traces), effective_toml(config)) == []
    failed = [trace.error for trace in traces if trace.error]
    assert len(failed) == 4 and all(MASK in error for error in failed), failed
    report = (tmp_path / "run/report.json").read_text()
    assert MASK in report and "were refused" in report
    for hidden in (part, ODD):
        assert seen(hidden, tmp_path / "run", caplog.text) == []


def test_a_secret_in_a_configuration_is_in_no_message_and_no_report(secret: tuple[str, str], tmp_path: Path, planted: Any) -> None:
    text, part = secret
    (tmp_path / "toy.py").write_text(RECIPE)
    wrong = TASK.format(address="http://127.0.0.1:9/v1").replace("num_retries = 0", f"num_retries = {json.dumps(text)}")
    (tmp_path / "toy.toml").write_text(wrong)
    with pytest.raises(ConfigError) as caught:
        load_config([tmp_path / "toy.toml"])
    planted(ODD)
    (tmp_path / "toy.toml").write_text(
        TASK.format(address="http://127.0.0.1:9/v1").replace("scripted/weak", text.replace("\n", " "))
    )
    config = load_config([tmp_path / "toy.toml"])
    with Experiment(config, tmp_path / "run") as experiment:
        experiment.report()
    assert seen(part, tmp_path / "run", str(caught.value), effective_toml(config)) == []


def test_a_failure_of_the_store_says_no_secret(secret: tuple[str, str], tmp_path: Path) -> None:
    text, part = secret
    with Store(tmp_path) as store:
        quoted = text.replace("'", "").replace("\n", " ")
        store._db.execute(f"CREATE TRIGGER no BEFORE INSERT ON calls BEGIN SELECT RAISE(ABORT, 'no {quoted}'); END")
        lm = recorded(ScriptedEngine({"": "fine"}).lm())
        with keeping(store), pytest.raises(StoreError) as caught:
            lm("hello")
    assert part not in masked(str(caught.value))


def test_a_passing_failure_is_noted_without_its_secret(secret: tuple[str, str], tmp_path: Path) -> None:
    text, part = secret
    down = recorded(ScriptedEngine(lambda request: ServerError(f"down: {text}")).lm())
    with Store(tmp_path) as store, keeping(store):
        with pytest.raises(dspy.LMError):
            down("hello")
        assert seen(part, tmp_path) == []
