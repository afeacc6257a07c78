"""Law 10: nothing secret is written: not in a saved program, a log, a store, a report, an error
message."""

from __future__ import annotations

import base64
import html
import itertools
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import dspy
import pytest
import toy
from dspy.lm15 import AuthError, ServerError
from hypothesis import given
from hypothesis import strategies as st
from scripted import match, questions, strong_that_reads, together

from cowest_dspy import Experiment, Store, collect, load_config
from cowest_dspy.errors import MASK, ConfigError, StoreError, masked
from cowest_dspy.experiment.config_text import effective_toml
from cowest_dspy.influence.collection import collect
from cowest_dspy.influence.trace import Sampling
from cowest_dspy.lms import build_lm
from cowest_dspy.lms.config import Api, Server
from cowest_dspy.store.call_context import keeping
from cowest_dspy.store.record import recorded
from cowest_dspy.store.store import Store
from cowest_dspy.testing import Fault, OpenAIServer, ScriptedEngine
from cowest_dspy.utils.masking import without_secret


def test_law_10_no_secret_is_written(tmp_path: Path) -> None:
    secret = "sk-abcdefghijklmnop1234"
    weak = ScriptedEngine(lambda request: ServerError(f"bad key {secret}"))
    program = together(weak, strong_that_reads())
    with Store(tmp_path) as store:
        traces = collect(
            program, questions(1), match, Sampling(drafts=2), store=store, max_errors=1.0
        )
    program.save(tmp_path / "program.json")
    assert "***" in (traces[0].error or "")
    for file in tmp_path.iterdir():
        assert secret.encode() not in file.read_bytes()


RANDOM = "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8"


HIDDEN = "Q7wE8rT9yU0iO1pA2sD3"
ODD = "correct-horse-battery-staple"
HEX = "0f1e2d3c4b5a69788796a5b4c3d2e1f0"


# Of each shape: the text in which it would stand, and the part of it that must not be seen again.
# In two parts, so that this file holds none.
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
    "aws secret": (
        "wJ" + "alrX6tnFEMI/K7MDENG+bPxRfiCY2xQp9vZk8T",
        "alrX6tnFEMI/K7MDENG+bPxRfiCY2xQp9vZk8T",
    ),
    "google access token": ("ya" + "29." + RANDOM, RANDOM),
    "twilio": ("S" + "K" + HEX, HEX),
    "sendgrid": ("S" + "G." + HIDDEN + "ab." + RANDOM, RANDOM),
    "npm": ("np" + "m_" + RANDOM, RANDOM),
    "slack web hook": ("https://hooks.slack.com/services/T0AB/B0CD/" + HIDDEN, HIDDEN),
    "password": ("password=" + "hunterhunter", "hunterhunter"),
    "quoted password": ('{"password": "' + HIDDEN + '"}', HIDDEN),
    "basic": (
        "Basic " + base64.b64encode(f"me:{HIDDEN}".encode()).decode(),
        base64.b64encode(HIDDEN.encode()).decode()[8:20],
    ),
    "basic header": (
        "Authorization: Basic " + base64.b64encode(f"me:{HIDDEN}".encode()).decode(),
        "d3RTl5VTBpTzFwQTJzRDM",
    ),
    "hex after its name": ("api_key=" + HEX, HEX),
    "hex in a header": ("x-api-key: " + HEX, HEX),
    "hex in an error": ("Incorrect API key provided: " + HEX, HEX),
    "hex in quoted json": ('{\\"api_key\\": \\"' + HEX + '\\"}', HEX),
    "authorization": ("Authorization: " + HEX, HEX),
    "token in a url": ("http://" + HIDDEN + "@db.example.org/x", HIDDEN),
    "option of a command": ("serve --api-key " + "letmeinplease" + " --port", "letmeinplease"),
    "parameter of a url": (
        "https://example.org/v1?api_key=" + "letmeinplease" + "&x=1",
        "letmeinplease",
    ),
    "private key": (
        "-----BEGIN "
        + "PRIVATE KEY-----\n"
        + RANDOM
        + "\n"
        + RANDOM
        + "\n-----END "
        + "PRIVATE KEY-----",
        RANDOM,
    ),
}


@pytest.fixture(params=SECRETS)
def secret(request: pytest.FixtureRequest) -> tuple[str, str]:
    return SECRETS[request.param]


def seen(part: str, folder: Path, *texts: str) -> list[str]:
    """Where the secret's part is: names of files of the folder, and numbers of texts."""
    parts = {part.encode(), json.dumps(part).encode()[1:-1], part[:-2].encode()}
    found = [
        str(file)
        for file in folder.rglob("*")
        if file.is_file() and any(one in file.read_bytes() for one in parts)
    ]
    return found + [
        f"text {place}"
        for place, text in enumerate(texts)
        if any(one.decode() in text for one in parts)
    ]


def test_every_shape_is_masked_and_what_stands_around_it_stays(secret: tuple[str, str]) -> None:
    text, part = secret
    told = masked(f"The server said: {text} is not valid, ask again.")
    assert part not in told and part[:-2] not in told and MASK in told
    assert told.startswith("The server said: ") and told.endswith("is not valid, ask again.")
    assert masked(" ".join(f"before {text} after".split())).endswith(" after"), (
        "as a failure is told, on one line"
    )


NORMAL = [
    "Take sk-learn and max_tokens = 12, hf_hub_download and key_value pairs.",
    "A risk-averse task-specific model; the bearer certificate of the company.",
    "See https://example.org:8080/a@b and mailto:me@example.org at 10:30.",
    "The key-value store has 12 pages; eyJ is how it begins. AKIA is a word.",
    "local/SmolLM2-135M-Instruct@3f9a1c2b7d4e+0011aabbccdd, seed 123456789012345",
    "BEGIN PRIVATE matters; the public key is here.",
    "sha256 e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    (
        f"sha1 da39a3ee5e6b4b0d3255bfef95601890afd80709, trace {HEX}, "
        f"adapters/{HEX}/adapter_model.safetensors"
    ),
    (
        "local/SmolLM2-135M-Instruct@3f9a1c2b7d4e+0011aabbccdd0011aabbccdd00112233 and "
        "meta-llama/Llama-3.1-8B-Instruct"
    ),
    (
        "/srv/models/SmolLM2/135M/Instruct/adapter, ./runs/Handbook2/pairs.jsonl, "
        "git+ssh://git@example.org/a/b"
    ),
    (
        'api_key_env = "OPENAI_API_KEY_2"; export OPENAI_API_KEY, it holds the API key of the '
        "model "
        "gpt-5-mini"
    ),
    (
        "def f(token=tokenizer1[0], password=read(x1), secret=self.secret2, "
        'api_key=os.environ["KEY_1"]): ...'
    ),
    (
        "The password: a word that only two know. The secret: practice. The token: a coin; token: "
        "none, secret = given."
    ),
    "serve --max-tokens 1234 --tokenizer tiny1 --key-value 12345, a --token; cowest-key words.",
    (
        "Basic understanding of Basic electronics; basic training. An authorization: required. "
        "eos_token: <|im_end|>."
    ),
    (
        '{"next":"https://example.org:8080","mail":"me@example.org"} and '
        "https://example.org?page=2&monkey=banana1"
    ),
]


@pytest.mark.parametrize("text", NORMAL)
def test_normal_text_is_left_as_it_is(text: str) -> None:
    assert masked(text) == text


ADVERSARIAL = {
    "prefixes": "s" + "k-" * 125000,
    "prefixes of keys": ("s" + "k-") * 82500,
    "prefix and letters": "s" + "k-" + "a" * 1_0,
    "json web tokens": ("ey" + "Jaaaaaaaa.") * 22500,
    "half web tokens": ("ey" + "J-") * 62500,
    "addresses": "://" * 82500,
    "addresses with colons": "://a:" * 50000,
    "addresses with at signs": "://a:b@" * 35000,
    "begins of private keys": "-----BEGIN " * 22500,
    "a begin that goes on": "-----BEGIN " + "A " * 125000,
    "ends of private keys": "-----BEGIN " + "PRIVATE KEY-----" + "-----END A " * 22500,
    "bearers": "bearer " * 35000,
    "names": "password=" * 27500,
    "names and slashes": ("password" + "\\" * 50) * 4250,
    "mentions": "api key is " * 22500,
    "parameters": "?a-" * 82500,
    "options": " --a_key" * 30000,
    "a long parameter": "?" + "a-" * 125000,
    "base64": "aA0/" * 62500,
    "blanks": "token: " + " " * 1_0,
}


@pytest.mark.parametrize("text", ADVERSARIAL.values(), ids=ADVERSARIAL)
def test_masking_takes_time_in_proportion_to_the_text(text: str) -> None:
    """A text four times as long takes some four times as long; looked at again from each of its
    places it would take sixteen."""

    def seconds(part: str) -> float:
        begun = time.process_time()
        masked(part)
        return time.process_time() - begun

    short = min(seconds(text[: len(text) // 8]) for _ in range(2))
    assert min(seconds(text[: len(text) // 2]) for _ in range(2)) < 9 * short + 0.2


@pytest.mark.parametrize(
    "key",
    [
        "correct-horse-battery-staple",
        "part/and+part of one=",
        "a1B2c3D4e5F6g7H8",
        'quoted"\\and<é>12345',
    ],
)
def test_a_key_that_we_know_is_masked_in_every_form_in_which_servers_repeat_it(key: str) -> None:
    for before, after in itertools.product(("", "u", "us", "user:"), ("", "!", " and more")):
        raw = (before + key + after).encode()
        for encoded in (base64.b64encode(raw), base64.urlsafe_b64encode(raw)):
            left = without_secret(f"was {encoded.decode()} that", key)
            assert MASK in left and len(left) <= len("was  that") + len(MASK) + 4 * (
                len(before + after) // 3 + 2
            )
    forms = [
        key,
        json.dumps(key),
        json.dumps(key, ensure_ascii=False),
        json.dumps(json.dumps(key)),
        repr(key),
        html.escape(key),
    ]
    forms += [
        quote(key),
        quote(key, safe=""),
        quote_plus(key),
        quote(key, safe="").lower() if key.islower() else quote(key),
    ]
    forms += [key.encode().hex(), key.encode().hex().upper()]
    for form in forms:
        assert len(without_secret(form, key)) <= len(MASK) + 6, form


DOTTED = [f"{ODD[:6]}...{ODD[-4:]}", f"{ODD[:4]}…{ODD[-6:]}", f"{ODD[:8]}{'*' * 9}{ODD[-4:]}"]


@pytest.mark.parametrize("part", [ODD[:14], ODD[14:], ODD[:8], ODD[-8:], ODD[:-1], *DOTTED])
def test_the_parts_of_a_key_that_servers_repeat_are_masked(part: str) -> None:
    said = without_secret(f"no: '{part}' is wrong", ODD)
    assert (
        said.startswith("no: '***")
        and said.endswith("' is wrong")
        and not any(ODD[start : start + 4] in said for start in range(len(ODD) - 4))
    )
    assert (
        without_secret("a horse, a staple and a correct battery", ODD)
        == "a horse, a staple and a correct battery"
    )


def test_a_key_is_known_from_the_moment_that_a_configuration_names_its_variable(
    planted: Callable[[str], str],
) -> None:
    key = "only-here-and-nowhere-else"
    assert key in masked(f"with {key}")
    Api.model_validate({"kind": "api", "model": "openai/x", "api_key_env": planted(key)})
    assert masked(f"with {key}, {base64.b64encode(key.encode()).decode()}").startswith(
        "with ***, ***"
    )
    assert masked(f"with {key[:12]}") == "with ***"
    dspy_key = "given-to-an-lm-by-its-maker"
    recorded(dspy.LM("openai/scripted", api_key=dspy_key))
    assert masked(f"with {dspy_key}") == "with ***"
    planted("none")
    Api.model_validate({"kind": "api", "model": "openai/x", "api_key_env": "COWEST_PLANTED_KEY"})
    assert masked("none of it") == "none of it"


LONG = RANDOM * 3
OF_DETECTORS = {
    "aws secret after its name": f'aws_secret_access_key = "{(RANDOM + "/+xY")[:40]}"',
    "azure": f"AccountKey={LONG[:86]}==",
    "gitlab": "glp" + "at-" + HIDDEN,
    "mailchimp": HEX + "-us" + "12",
    "npm": "//registry.npmjs.org/:_authToken=np" + "m_" + RANDOM,
    "openai": "s" + "k-" + HIDDEN + "T3Blbk" + "FJ" + HIDDEN,
    "pypi": "pypi-AgEIc" + "HlwaS5vcmc" + LONG[:80],
    "square": "sq0" + "csp-" + LONG[:43],
    "stripe": "s" + "k_live_" + RANDOM[:24],
    "telegram": "1102015430:" + "AA" + LONG[:33],
    **{f"{name}, as a law's": text for name, (text, _) in SECRETS.items()},
}


def test_what_a_maintained_detector_takes_for_a_secret_is_masked() -> None:
    """Those of its detectors that know a shape: what is only of high entropy may be a content
    hash."""
    util = pytest.importorskip("detect_secrets.core.plugins.util")
    kinds = util.get_mapping_from_secret_type_to_class().items()
    detectors = [kind() for name, kind in kinds if "Entropy" not in name and "IP" not in name]
    known = set[str]()
    for name, text in OF_DETECTORS.items():
        for line, detector in itertools.product([text, f"The server said: {text}"], detectors):
            for found in map(str, detector.analyze_string(line)):
                known.add(name)
                # Of a GitHub token it gives the name of its kind alone.
                assert len(found) <= 4 or found not in masked(line), (
                    f"{detector.secret_type} finds {name}"
                )
            for found in map(str, detector.analyze_string(masked(line))):
                assert MASK in found, f"{detector.secret_type} still finds {name}"
    assert len(known) >= 15, sorted(known)


@pytest.mark.parametrize("name", [name for name in OF_DETECTORS if "as a law's" not in name])
def test_shapes_that_detectors_know_are_masked(name: str) -> None:
    said = masked(f"The server said: {OF_DETECTORS[name]} is not valid")
    assert MASK in said and not any(
        part in said for part in (HIDDEN, HEX, RANDOM[:20], LONG[40:60])
    )


@given(
    st.text(st.characters(categories=("Lu", "Ll", "Zs", "Po"), max_codepoint=0x24F), max_size=200)
)
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
        traces = list(
            collect(program, questions(2), match, Sampling(drafts=2), store=store, max_errors=1.0)
        )
        assert seen(part, tmp_path, *(repr(trace) for trace in traces)) == [], (
            "also in the log of the open file"
        )
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
    table = {
        "kind": kind,
        "model": name,
        "api_base": address,
        "api_key_env": variable,
        "num_retries": 0,
    }
    return build_lm((Api if kind == "api" else Server).model_validate(table))


@pytest.mark.parametrize("kind", ["api", "server"])
@pytest.mark.parametrize("status", [400, 401, 429, 500])
def test_law_10_a_key_that_a_server_repeats_is_written_nowhere(
    kind: str, status: int, tmp_path: Path, planted: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    keys = [ODD, SECRETS["openai"][0], SECRETS["hugging face"][0]]
    for number, key in enumerate(keys):
        folder = tmp_path / str(number)
        faults = [
            Fault.status(status, message=f"Incorrect API key provided: {key}. Bearer {key}")
            for _ in range(50)
        ]
        with (
            OpenAIServer(lambda request: "fine", faults=faults) as server,
            Store(folder) as store,
            keeping(store),
        ):
            lm = hosted(kind, server.api_base, planted(key))
            with pytest.raises(dspy.LMError) as caught:
                recorded(lm)("hello")
            (folder / "state.json").write_text(json.dumps(lm.dump_state(), default=str))
            assert seen(key, folder, str(caught.value), caplog.text, repr(lm.history)) == []


RECIPE = (
    toy.RECIPE
    + toy.ROWS
    + """
import os
from dspy.lm15 import AuthError

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
max_errors = 1.0
"""
)


def test_law_10_of_a_whole_run_nothing_secret_is_left(
    secret: tuple[str, str],
    tmp_path: Path,
    planted: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    text, part = secret
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("COWEST_PLANTED_ERROR", text)
    planted(ODD)
    (tmp_path / "toy.py").write_text(RECIPE)

    def strong(request: dict[str, Any]) -> str | Fault:
        about = request["messages"][-1]["content"]
        return (
            Fault.status(400, message=f"{text} and {ODD} were refused") if "2?" in about else "yes"
        )

    with OpenAIServer(strong, key=ODD) as server:
        (tmp_path / "toy.toml").write_text(TASK.format(address=server.api_base))
        config = load_config([tmp_path / "toy.toml"])
        with Experiment(config, tmp_path / "run") as experiment:
            traces = list(experiment.collect())
            experiment.evaluate(["strong"])
            experiment.report()
            for hidden in (part, ODD):
                assert (
                    seen(
                        hidden, tmp_path / "run", caplog.text, repr(traces), effective_toml(config)
                    )
                    == []
                )
    failed = [trace.error for trace in traces if trace.error]
    assert len(failed) == 4 and all(MASK in error for error in failed), failed
    report = (tmp_path / "run/report.json").read_text()
    assert MASK in report and "were refused" in report
    for hidden in (part, ODD):
        assert seen(hidden, tmp_path / "run", caplog.text) == []


def test_a_secret_in_a_configuration_is_in_no_message_and_no_report(
    secret: tuple[str, str], tmp_path: Path, planted: Any
) -> None:
    text, part = secret
    (tmp_path / "toy.py").write_text(RECIPE)
    wrong = TASK.format(address="http://127.0.0.1:9/v1").replace(
        "num_retries = 0", f"num_retries = {json.dumps(text)}"
    )
    (tmp_path / "toy.toml").write_text(wrong)
    with pytest.raises(ConfigError) as caught:
        load_config([tmp_path / "toy.toml"])
    planted(ODD)
    (tmp_path / "toy.toml").write_text(
        TASK.format(address="http://127.0.0.1:9/v1").replace(
            "scripted/weak", json.dumps(text.replace("\n", " "))[1:-1]
        )
    )
    config = load_config([tmp_path / "toy.toml"])
    with Experiment(config, tmp_path / "run") as experiment:
        experiment.report()
    assert seen(part, tmp_path / "run", str(caught.value), effective_toml(config)) == []


def test_a_failure_of_the_store_says_no_secret(secret: tuple[str, str], tmp_path: Path) -> None:
    text, part = secret
    with Store(tmp_path) as store:
        quoted = text.replace("'", "").replace("\n", " ")
        store._db.execute(
            f"CREATE TRIGGER no BEFORE INSERT ON calls BEGIN SELECT RAISE(ABORT, 'no {quoted}'); "
            "END"
        )
        lm = recorded(ScriptedEngine({"": "fine"}).lm())
        with keeping(store), pytest.raises(StoreError) as caught:
            lm("hello")
    assert part not in masked(str(caught.value))


def test_a_passing_failure_is_noted_without_its_secret(
    secret: tuple[str, str], tmp_path: Path
) -> None:
    text, part = secret
    down = recorded(ScriptedEngine(lambda request: ServerError(f"down: {text}")).lm())
    with Store(tmp_path) as store, keeping(store):
        with pytest.raises(dspy.LMError):
            down("hello")
        assert seen(part, tmp_path) == []
