"""The doctor: what it finds of models that are there, wrong, dead, too small or too dear; and what
it says a run would ask."""

from __future__ import annotations

import io
import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import toy
from endpoint import serving
from typer.testing import CliRunner

from cowest_dspy import load_config
from cowest_dspy.cli import checks, main
from cowest_dspy.cli.console import SafeConsole
from cowest_dspy.experiment.config import Config
from cowest_dspy.experiment.doctor import Diagnosis, examine
from cowest_dspy.experiment.quote import count_calls, estimate_minutes
from cowest_dspy.lms import endpoints
from cowest_dspy.lms.config import Api, Engine, Server
from cowest_dspy.lms.local import weights

RECIPE = (
    toy.RECIPE
    + """
asked = []

def rows(split, seed=0):
    count = {"train": 60, "dev": 3, "test": 6}[split]
    return [{"id": f"{split}{i}", "question": f"{split} {i}?" + " and" * i, "answer": "yes", "notes": "a"} for i in range(count)]

def sft_rows(seed=0):
    return [{"prompt": [{"role": "user", "content": "a?"}], "completion": [{"role": "assistant", "content": "b"}]}]

def program():
    return Collaboration("question -> answer", draft="knowledge")

def nothing():
    return 3

def strong():
    def answer(request):
        asked.append(request)
        return "yes"
    return ScriptedEngine(answer, model="scripted/strong")

def broken():
    def answer(request):
        return 1 / 0
    return ScriptedEngine(answer)
"""
)
TASK = (
    toy.TASK
    + """
[evaluate]
oracle = "notes"
"""
)
STRONG = '[strong]\nkind = "engine"\nengine = "toy.py:strong"\n'
TUNED = '[sft]\ndrafts = "toy.py:sft_rows"\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "toy.py").write_text(RECIPE)
    return tmp_path


def weak(model: Path, *lines: str) -> str:
    return "\n".join(
        ["[weak]", 'kind = "in_process"', f'model = "{model}"', "max_tokens = 12", *lines, ""]
    )


def configured(folder: Path, *tables: str) -> Config:
    (folder / "toy.toml").write_text("\n".join([TASK, *tables]))
    return load_config([folder / "toy.toml"])


def level(diagnosis: Diagnosis, role: str, name: str) -> str:
    return next(
        check.level for check in diagnosis.checks if (check.role, check.name) == (role, name)
    )


def text(diagnosis: Diagnosis, role: str, name: str) -> str:
    return next(
        check.text for check in diagnosis.checks if (check.role, check.name) == (role, name)
    )


def closed_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


# Models in this process


def test_a_healthy_pair_is_loaded_asked_and_measured(folder: Path, tiny_model: Path) -> None:
    said: list[str] = []
    diagnosis = examine(configured(folder, weak(tiny_model), STRONG, TUNED), say=said.append)
    assert diagnosis.healthy, diagnosis.checks
    assert text(diagnosis, "weak", "context").startswith(
        "512 tokens; "
    ) and "max_tokens = 12" in text(diagnosis, "weak", "context")
    assert (
        level(diagnosis, "weak", "chat template")
        == level(diagnosis, "weak", "memory")
        == level(diagnosis, "weak", "model")
        == "ok"
    )
    assert [probe.role for probe in diagnosis.probes] == ["weak", "strong"]
    assert all(probe.seconds > 0 and probe.input_tokens > 0 for probe in diagnosis.probes)
    assert any(line.startswith("weak: loading") for line in said) and not any(
        "paid" in line for line in said
    )
    assert sum("; nothing to pay;" in line for line in diagnosis.forecast) == 2


def test_the_question_is_the_longest_of_the_first_50_as_the_program_puts_it(
    folder: Path, tiny_model: Path
) -> None:
    from cowest_dspy.utils.importing import load

    examine(configured(folder, weak(tiny_model), STRONG))
    (request,) = load(f"{folder}/toy.py:asked")
    assert request["messages"][-1]["content"].startswith("Question: train 49?")


def test_without_asking_nothing_is_asked_and_the_weights_are_loaded_all_the_same(
    folder: Path, tiny_model: Path
) -> None:
    from cowest_dspy.utils.importing import load

    diagnosis = examine(configured(folder, weak(tiny_model), STRONG), ask=False)
    assert diagnosis.healthy and not diagnosis.probes and not diagnosis.forecast
    assert load(f"{folder}/toy.py:asked") == [] and "loaded in" in text(diagnosis, "weak", "model")


def test_what_was_loaded_is_let_go_of(folder: Path, tiny_model: Path) -> None:
    import gc

    from transformers import LlamaForCausalLM

    def loaded() -> int:
        gc.collect()
        return sum(type(one) is LlamaForCausalLM for one in gc.get_objects())

    before = loaded()
    assert examine(configured(folder, weak(tiny_model), STRONG)).healthy
    assert loaded() <= before


def test_a_wrong_folder_is_an_error_and_the_others_are_examined(folder: Path) -> None:
    diagnosis = examine(configured(folder, weak(folder / "no"), STRONG))
    assert not diagnosis.healthy and "There is no model folder" in text(diagnosis, "weak", "model")
    assert level(diagnosis, "strong", "answer") == "ok"


def test_a_model_without_a_chat_template_is_an_error(folder: Path, tiny_model: Path) -> None:
    bare = Path(shutil.copytree(tiny_model, folder / "bare"))
    (bare / "chat_template.jinja").unlink()
    diagnosis = examine(configured(folder, weak(bare), STRONG))
    assert level(diagnosis, "weak", "model") == "error" and "has no chat template" in text(
        diagnosis, "weak", "model"
    )


def test_a_prompt_that_does_not_fit_is_an_error_that_says_by_what(
    folder: Path, tiny_model: Path
) -> None:
    diagnosis = examine(configured(folder, weak(tiny_model).replace("= 12", "= 500"), STRONG))
    assert level(diagnosis, "weak", "context") == "error" and "Lower [weak] max_tokens" in text(
        diagnosis, "weak", "context"
    )


@pytest.mark.parametrize(
    ("tuning", "found"), [(TUNED, "error"), ("[dpo]\nbeta = 0.1\n", "error"), ("", "warning")]
)
def test_int8_is_an_error_where_something_is_to_be_tuned(
    folder: Path, tiny_model: Path, tuning: str, found: str
) -> None:
    diagnosis = examine(
        configured(folder, weak(tiny_model, 'dtype = "int8"'), STRONG, tuning), ask=False
    )
    assert level(diagnosis, "weak", "adapters") == found and 'dtype = "auto"' in text(
        diagnosis, "weak", "adapters"
    )
    assert diagnosis.healthy == (found == "warning")


def test_a_strong_model_needs_no_adapters(folder: Path, tiny_model: Path) -> None:
    strong = weak(tiny_model, 'dtype = "int8"').replace("[weak]", "[strong]")
    diagnosis = examine(configured(folder, weak(tiny_model), strong, TUNED), ask=False)
    assert diagnosis.healthy and not [
        check for check in diagnosis.checks if (check.role, check.name) == ("strong", "adapters")
    ]


def test_weights_that_do_not_fit_into_memory_are_not_loaded(folder: Path, tiny_model: Path) -> None:
    huge = Path(shutil.copytree(tiny_model, folder / "huge"))
    header = json.dumps(
        {"w": {"dtype": "F32", "shape": [10**7, 10**7], "data_offsets": [0, 0]}}
    ).encode()
    (huge / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert weights.count_parameters(huge) == 10**14
    diagnosis = examine(configured(folder, weak(huge, 'dtype = "float32"'), STRONG))
    assert level(diagnosis, "weak", "memory") == "error" and "Not loaded" in text(
        diagnosis, "weak", "memory"
    )
    assert level(diagnosis, "strong", "answer") == "ok"


def test_the_memory_of_a_folder_is_its_parameters_in_the_type_that_is_asked_for(
    tiny_model: Path,
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert (
        weights.memory_needed(tiny_model, "float32")
        == 4 * count
        == 2 * weights.memory_needed(tiny_model, "bfloat16")
    )
    assert weights.context_length(tiny_model) == 512


# Engines and tasks of one's own


def test_an_engine_that_fails_is_an_error_and_no_end(folder: Path, tiny_model: Path) -> None:
    diagnosis = examine(configured(folder, weak(tiny_model), STRONG.replace('strong"', 'broken"')))
    assert not diagnosis.healthy
    assert any(
        check.role == "strong" and check.level == "error" and "division" in check.text
        for check in diagnosis.checks
    )


def test_a_task_that_cannot_be_is_an_error_and_its_models_are_reached_all_the_same(
    folder: Path,
) -> None:
    for wrong, says in (
        (("toy.py:program", "toy.py:nothing"), "gave int"),
        (('"question"', '"qestion"'), 'Did you mean "question"?'),
    ):
        config = configured(folder, STRONG.replace("strong]", "weak]"), STRONG)
        file = folder / "toy.toml"
        file.write_text(file.read_text().replace(*wrong))
        diagnosis = examine(load_config([file]))
        assert (
            says in text(diagnosis, "task", "task") and level(diagnosis, "strong", "model") == "ok"
        ), config
    assert "betta" in text(
        examine(configured(folder, STRONG.replace("strong]", "weak]"), STRONG, "[dpo]\nbetta = 1")),
        "task",
        "task",
    )


# Endpoints


def api(address: str, *lines: str) -> str:
    return "\n".join(
        [
            '[strong]\nkind = "api"\nmodel = "openai/large"\napi_key_env = "COWEST_TEST_KEY"',
            f'api_base = "{address}"',
            *lines,
        ]
    )


SCRIPTED_WEAK = STRONG.replace("strong]", "weak]")


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COWEST_TEST_KEY", "letmein")
    return "letmein"


def test_a_dead_endpoint_is_an_error_at_once_and_nothing_is_asked(folder: Path, key: str) -> None:
    diagnosis = examine(
        configured(folder, SCRIPTED_WEAK, api(f"http://127.0.0.1:{closed_port()}/v1"))
    )
    assert "cannot be reached" in text(diagnosis, "strong", "model") and "start the server" in text(
        diagnosis, "strong", "model"
    )
    assert [probe.role for probe in diagnosis.probes] == ["weak"]


def test_a_silent_endpoint_is_given_up(
    folder: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoints, "DEADLINE", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        diagnosis = examine(
            configured(folder, SCRIPTED_WEAK, api(f"http://127.0.0.1:{silent.getsockname()[1]}/v1"))
        )
    assert "did not answer within" in text(diagnosis, "strong", "model")


def test_a_missing_environment_variable_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COWEST_TEST_KEY", raising=False)
    diagnosis = examine(configured(folder, SCRIPTED_WEAK, api("http://127.0.0.1:9/v1")))
    assert "COWEST_TEST_KEY is not set" in text(diagnosis, "strong", "model")


def test_a_refused_key_is_an_error_that_does_not_repeat_it(folder: Path, key: str) -> None:
    with serving({"/v1/models": {"data": []}}, key="another") as endpoint:
        diagnosis = examine(configured(folder, SCRIPTED_WEAK, api(endpoint.address)))
    assert "refused the key (401)" in text(diagnosis, "strong", "model") and key not in str(
        diagnosis
    )
    assert not endpoint.asked


def test_a_hosted_model_is_asked_one_question_that_is_announced_and_priced(
    folder: Path, key: str
) -> None:
    said: list[str] = []
    with serving({"/v1/models": {"data": [{"id": "large"}]}}, key=key) as endpoint:
        tables = (SCRIPTED_WEAK, api(endpoint.address, "price = { input = 1.0, output = 10.0 }"))
        diagnosis = examine(
            configured(folder, *tables),
            say=lambda line: said.append(f"{len(endpoint.asked)} {line}"),
        )
        assert examine(configured(folder, *tables), ask=False).healthy
    assert diagnosis.healthy and len(endpoint.asked) == 1
    assert (
        "0 strong: one question is asked. This is paid for (openai/large); --no-ask leaves it out."
        in said
    )
    # 60 train examples of 4 drafts and alone, and 6 test examples in four arms.
    calls = 60 * 5 + 2 * 3 + 6 * 4
    # 100 tokens in and 10 out each; a draft of one word ("yes") is added where something is
    # refined.
    tokens_in, tokens_out = calls * 100 + (calls - 6), calls * 10
    usd = (tokens_in * 1.0 + tokens_out * 10.0) / 1e6
    assert diagnosis.forecast[1].startswith(
        f"a cycle asks strong at most {calls} times: about {tokens_in:,} tokens in, "
        f"{tokens_out:,} out; about {usd:.2f} USD; between"
    )


def test_without_a_price_the_cost_is_unknown_and_not_zero(folder: Path, key: str) -> None:
    with serving({"/v1/models": {"data": [{"id": "large"}]}}) as endpoint:
        diagnosis = examine(configured(folder, SCRIPTED_WEAK, api(endpoint.address)))
    assert "price unknown" in diagnosis.forecast[1]


def test_a_model_that_the_endpoint_does_not_list_is_a_warning_with_the_nearest(
    folder: Path, key: str
) -> None:
    with serving({"/v1/models": {"data": [{"id": "larges"}, {"id": "small"}]}}) as endpoint:
        diagnosis = examine(configured(folder, SCRIPTED_WEAK, api(endpoint.address)))
    assert level(diagnosis, "strong", "model") == "warning" and 'Did you mean "larges"?' in text(
        diagnosis, "strong", "model"
    )


def test_a_context_that_the_endpoint_says_is_compared_with_the_prompt(
    folder: Path, key: str
) -> None:
    with serving({"/v1/models": {"data": [{"id": "large", "max_model_len": 300}]}}) as endpoint:
        diagnosis = examine(configured(folder, SCRIPTED_WEAK, api(endpoint.address)))
    assert level(diagnosis, "strong", "context") == "error" and text(
        diagnosis, "strong", "context"
    ).startswith("300 tokens; about ")


def test_a_dead_server_is_an_error_before_anything_is_built(folder: Path) -> None:
    table = (
        '[strong]\nkind = "server"\nmodel = "large"\napi_base = '
        f'"http://127.0.0.1:{closed_port()}/v1"\n'
    )
    diagnosis = examine(configured(folder, SCRIPTED_WEAK, table))
    assert not diagnosis.healthy and "cannot be reached" in text(diagnosis, "strong", "model")


def test_a_server_that_only_speaks_the_protocol_cannot_be_tuned(folder: Path) -> None:
    table = (
        '[weak]\nkind = "server"\nmodel = "small"\napi_base = "http://127.0.0.1:9/v1"\nserver = '
    )
    for server, given, says in (
        ('"openai"', "", 'server = "openai" takes none'),
        ('"vllm"', "", "weights = ..."),
        ('"vllm"', '\nweights = "a/b"', "it takes adapters"),
    ):
        diagnosis = examine(configured(folder, table + server + given, STRONG, TUNED))
        assert says in text(diagnosis, "weak", "adapters"), server


@pytest.mark.parametrize(
    ("server", "pages", "found"),
    [
        (
            "llama_cpp",
            {
                "/v1/models": {"data": []},
                "/props": {"default_generation_settings": {"n_ctx": 2048}},
            },
            ("ok", 2048),
        ),
        ("llama_cpp", {"/v1/models": {"data": []}, "/props": {"odd": 1}}, ("ok", None)),
        ("vllm", {"/v1/models": {"data": [{"id": "small", "max_model_len": 4096}]}}, ("ok", 4096)),
        (
            "vllm",
            {"/v1/models": {"data": [{"id": "small", "max_model_len": "many"}]}},
            ("ok", None),
        ),
        ("vllm", {"/v1/models": [1]}, ("ok", None)),
        ("openai", {}, ("ok", None)),
        ("openai", {"/v1/models": ["odd"]}, ("ok", None)),
        ("llama_cpp", {"/v1/models": 503}, ("error", None)),
    ],
)
def test_what_servers_say_of_themselves_is_understood(
    server: Any, pages: dict[str, Any], found: tuple[str, int | None]
) -> None:
    with serving(pages) as endpoint:
        given = {"kind": "server", "server": server, "model": "small"}
        reached = endpoints.check_endpoint(
            Server.model_validate({**given, "api_base": endpoint.address})
        )
    assert (reached.level, reached.context) == found, reached.text


# The forecast


def counted(config: Config, **sizes: int) -> list[tuple[str, float, float]]:
    """Each stage with its drafts and answers, at most."""
    return [
        (stage.stage, stage.drafts.most, stage.answers.most) for stage in count_calls(config, sizes)
    ]


def test_the_calls_of_a_cycle_are_those_of_its_stages(folder: Path) -> None:
    config = configured(folder, SCRIPTED_WEAK, STRONG, "[collect]\ndrafts = 6")
    assert counted(config, train=10, test=5) == [
        ("collect", 60, 70),
        ("evaluate strong", 0, 5),
        ("evaluate collaboration_sft", 5, 5),
        ("evaluate collaboration", 5, 5),
        ("evaluate oracle", 0, 5),
    ]


def test_rounds_collect_again_and_ask_the_dev_split_before_and_after(folder: Path) -> None:
    config = configured(folder, SCRIPTED_WEAK, STRONG, "[collect]\ndrafts = 6\n[rounds]\ncount = 3")
    assert counted(config, train=10, dev=4, test=5)[:-4] == [
        ("collect", 60, 70),
        ("dev", 8, 8),
        ("collect 2", 60, 70),
        ("dev 2", 4, 4),
        ("collect 3", 60, 70),
        ("dev 3", 4, 4),
    ]


def test_time_is_shared_by_calls_at_once_and_held_by_limits() -> None:
    def minutes(**limits: Any) -> float:
        settings = Api.model_validate({"kind": "api", "model": "m", "concurrency": 10, **limits})
        return estimate_minutes(settings, 600, 2.0, 110)

    assert minutes() == 2.0 and minutes(concurrency=1) == 20.0
    assert minutes(requests_per_minute=100) == 6.0 and minutes(tokens_per_minute=6600) == 10.0
    own = Engine.model_validate({"kind": "engine", "engine": "a:b", "concurrency": 1000})
    assert estimate_minutes(own, 600, 2.0, 110) == estimate_minutes(own, 1, 2.0, 110)
    assert estimate_minutes(own, 0, 2.0, 110) == 0.0


# The command


def run(folder: Path, *arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(main.app, ["doctor", str(folder / "toy.toml"), *arguments])
    return done.exit_code, done.output


def test_the_exit_code_tells_and_each_check_is_a_line_without_a_terminal(folder: Path) -> None:
    configured(folder, SCRIPTED_WEAK, STRONG)
    code, said = run(folder)
    assert code == 0 and "ok       strong  answer" in said and "weak said: yes" in said
    assert "a cycle asks strong at most 330 times" in said
    configured(folder, weak(folder / "no"), STRONG)
    code, said = run(folder, "--no-ask")
    assert code == 1 and "error    weak    model          There is no model folder" in said
    assert not list(folder.glob("runs"))


def test_a_terminal_gets_a_table_in_which_brackets_stay(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configured(folder, SCRIPTED_WEAK, STRONG, TUNED)
    shown = io.StringIO()
    monkeypatch.setattr(
        checks,
        "console",
        SafeConsole(file=shown, force_terminal=True, width=200, color_system=None),
    )
    assert run(folder)[0] == 1
    assert "the task has [sft] or [dpo]" in shown.getvalue()
