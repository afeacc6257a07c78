"""What a TOML may say, what is said of one that says something else, its schema, and the effective
configuration as text."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cowest_dspy.cli import checks
from cowest_dspy.cli.main import app
from cowest_dspy.errors import ConfigError
from cowest_dspy.experiment.config import (
    Config,
    fingerprint,
    load_config,
    parse_override,
    validate,
)
from cowest_dspy.experiment.config_text import effective_toml, json_schema
from cowest_dspy.lms.config import Api, InProcess, Server

ROOT = Path(__file__).parents[2]
TASK = {
    "name": "toy",
    "program": "toy.py:program",
    "metric": "toy.py:match",
    "data": {"source": "t.jsonl", "inputs": ["q"]},
}
STRONG = {"kind": "api", "model": "openai/gpt-4.1-mini"}


def config(**tables: Any) -> Config:
    return validate(Config, {**TASK, "weak": STRONG, "strong": STRONG, **tables}, "a.toml")


def refused(**tables: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        config(**tables)
    said = str(caught.value)
    assert said.startswith("a.toml:\n") and "Value error" not in said
    return said


def server(**values: Any) -> dict[str, Any]:
    return {"kind": "server", "model": "tiny", "api_base": "http://127.0.0.1:8000/v1", **values}


# Tables of models


@pytest.mark.parametrize(
    ("weak", "says"),
    [
        ({"api_bas": "x"}, 'weak.api_bas: there is no such key. Did you mean "api_base"?'),
        ({"startupp": 3}, 'weak.startupp: there is no such key. Did you mean "startup"?'),
        (
            {"server": "vlm"},
            "weak.server: Input should be 'openai', 'llama_cpp' or 'vllm' (given: 'vlm')",
        ),
        ({"command": "serve it"}, "weak.command: a list is expected"),
        (
            {"command": ["serve"]},
            "weak: give either api_base (a server that runs already) or command",
        ),
        ({"api_base": None}, "weak: give either api_base (a server that runs already) or command"),
        ({"adapter": "folder"}, 'weak: an adapter needs server = "llama_cpp" or "vllm"'),
        ({"timeout": 0}, "weak.timeout: Input should be greater than 0"),
    ],
)
def test_what_is_wrong_in_a_server_says_where_and_what_to_type(
    weak: dict[str, Any], says: str
) -> None:
    assert says in refused(weak=server(**weak))


def test_a_key_of_another_kind_is_not_offered() -> None:
    said = refused(weak=server(dtype="int8"))
    assert "weak.dtype: there is no such key." in said and "requests_per_minute" not in said


@pytest.mark.parametrize(
    ("kind", "means"),
    [("in-process", "in_process"), ("sever", "server"), ("openai", "api"), ("vllm", "server")],
)
def test_an_unknown_kind_names_the_one_that_was_meant(kind: str, means: str) -> None:
    said = refused(weak={"kind": kind, "model": "m"})
    assert (
        f'weak.kind: there is no kind "{kind}". Did you mean "{means}"? Known: in_process, api, '
        "server, engine."
    ) in said


def test_a_table_without_a_kind_is_told_the_kinds() -> None:
    assert "judge.kind: is missing. Give one of: in_process, api, server, engine." in refused(
        judge={"model": "m"}
    )


def test_a_value_in_the_place_of_a_table_is_told_so() -> None:
    assert "weak: a table is expected (given: 'gpt')" in refused(weak="gpt")


def test_a_misspelled_price_names_the_key_and_what_is_missing() -> None:
    said = refused(strong={**STRONG, "price": {"input": 0.4, "ouput": 1.6}})
    assert (
        "strong.price.output: is missing." in said
        and 'strong.price.ouput: there is no such key. Did you mean "output"?' in said
    )


def test_a_price_may_be_zero_and_not_less() -> None:
    assert "strong.price.input: Input should be greater than or equal to 0" in refused(
        strong={**STRONG, "price": {"input": -1, "output": 0}}
    )
    strong = config(strong={**STRONG, "price": {"input": 0, "output": 0}}).strong
    assert isinstance(strong, Api) and strong.price is not None


def test_no_password_of_an_address_is_repeated() -> None:
    assert "hunter22" not in refused(
        weak=server(api_base="http://me:hunter22@host/v1", adapter="folder", timeout=-1)
    )
    assert "hunter22" not in refused(weak=server(api_base=3, model=["http://me:hunter22@host/v1"]))


@pytest.mark.parametrize("table", ["weak", "strong", "judge"])
def test_a_key_itself_is_refused_in_every_table_and_not_repeated(table: str) -> None:
    said = refused(**{table: server(api_key_env="sk-abcdefghijkl1234")})
    assert (
        f"{table}.api_key_env: give the NAME of an environment variable" in said
        and "abcdefghijkl" not in said
    )


# Files


def written(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


TASK_TOML = """name = "toy"
program = "toy.py:program"
metric = "toy.py:match"
[data]
source = "rows.jsonl"
inputs = ["q"]
[strong]
kind = "api"
model = "openai/gpt-4.1-mini"
"""


def test_here_is_the_folder_of_the_file_that_says_it(tmp_path: Path) -> None:
    backend = written(
        tmp_path,
        "backends/own.toml",
        '[weak]\nkind = "server"\nserver = "llama_cpp"\nmodel = "tiny"\nweights = "../tiny"\nlog '
        '= "server.log"\n'
        'command = ["{here}/serve", "--port", "{port}"]\n',
    )
    (tmp_path / "tiny").mkdir()
    weak = load_config([written(tmp_path, "toy.toml", TASK_TOML), backend]).weak
    assert isinstance(weak, Server)
    assert weak.command == (f"{tmp_path}/backends/serve", "--port", "{port}")
    assert weak.log == f"{tmp_path}/backends/server.log" and weak.weights == str(tmp_path / "tiny")


def test_paths_of_all_tables_are_relative_to_the_file_in_which_they_stand(tmp_path: Path) -> None:
    (tmp_path / "more/small").mkdir(parents=True)
    backend = written(
        tmp_path,
        "more/own.toml",
        '[weak]\nkind = "in_process"\nmodel = "small"\n[pairs]\nsource = "pairs.jsonl"\n'
        '[cycle]\nstrategy = "own -> taken"\n[cycle.steps.own]\noptimizer = "own.py:make"\n'
        '[cycle.steps.taken]\noptimizer = "installed.module:make"\n'
        '[tracking]\nto = ["mlflow"]\nuri = "sqlite:///runs.db"\n'
        '[compare]\nalso = ["scores.py:f1"]\n'
        '[compare.sweep]\nmetric = ["other.py:match"]\n"weak.model" = ["small", "owner/name"]\n'
        '"pairs.margin" = [0, 0.5]\n',
    )
    made = load_config([written(tmp_path, "toy.toml", TASK_TOML), backend])
    assert (
        made.metric == f"{tmp_path}/toy.py:match" and made.data.source == f"{tmp_path}/rows.jsonl"
    )
    assert (
        made.cycle and made.compare and made.tracking and made.strong.model == "openai/gpt-4.1-mini"
    )
    assert made.weak.model == f"{tmp_path}/more/small"
    assert made.pairs.source == f"{tmp_path}/more/pairs.jsonl"
    assert [step.optimizer for step in made.cycle.steps.values()] == [
        f"{tmp_path}/more/own.py:make",
        "installed.module:make",
    ]
    assert made.tracking.uri == f"sqlite:///{tmp_path}/more/runs.db"
    assert made.compare.also == (f"{tmp_path}/more/scores.py:f1",)
    assert made.compare.sweep == {
        "metric": (f"{tmp_path}/more/other.py:match",),
        "weak.model": (f"{tmp_path}/more/small", "owner/name"),
        "pairs.margin": (0, 0.5),
    }


def test_an_old_key_is_told_what_to_write_instead() -> None:
    said = refused(collect={"max_failed": 0.2})
    assert "collect.max_failed: there is no such key. Write max_errors." in said
    said = refused(data={**TASK["data"], "fold": 1})
    assert "data.fold: there is no such key. Write it in [data.arguments]." in said


@pytest.mark.parametrize("name", ["split", "seed", "rows", "draft", "no name"])
def test_an_argument_of_a_recipe_with_a_place_of_its_own_is_refused(name: str) -> None:
    assert f'"{name}" cannot be an argument here' in refused(
        data={**TASK["data"], "arguments": {name: 1}}
    )


def test_a_judge_is_a_table_like_the_others_and_an_empty_one_takes_it_away(tmp_path: Path) -> None:
    task = written(tmp_path, "toy.toml", TASK_TOML)
    backend = written(
        tmp_path,
        "b.toml",
        (
            '[weak]\nkind = "in_process"\nmodel = "./tiny"\n[judge]\nkind = "api"\nmodel = '
            '"openai/x"\n'
        ),
    )
    without = written(tmp_path, "c.toml", "[judge]\n[sft]\n")
    with_judge = load_config([task, backend])
    assert isinstance(with_judge.judge, Api) and isinstance(with_judge.weak, InProcess)
    assert with_judge.weak.model == str(tmp_path / "tiny")
    assert (
        load_config([task, backend, without]).judge is None
        and load_config([task, backend, without]).sft is None
    )


def test_a_backend_without_a_task_says_which_file_to_add() -> None:
    with pytest.raises(
        ConfigError,
        match=r"program: is missing. Name the task's TOML first, such as programs/handbook\.toml",
    ):
        load_config([ROOT / "programs/backends/scripted.toml"])


def test_a_file_that_is_not_there_says_what_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"There is no TOML in .* `cowest new NAME`"):
        load_config([tmp_path / "ferries.toml"])
    written(tmp_path, "ferries.toml", "")
    with pytest.raises(
        ConfigError, match=r'Did you mean ".*ferries\.toml"\? There is: .*ferries\.toml\.'
    ):
        load_config([tmp_path / "ferry.toml"])


# Single keys


def tasked(tmp_path: Path, text: str) -> list[Path]:
    task = written(tmp_path / "task", "toy.toml", TASK_TOML)
    backend = '[weak]\nkind = "in_process"\nmodel = "./tiny"\n'
    return [task, written(tmp_path / "task", "more.toml", backend + text)]


def test_an_override_is_as_if_it_stood_in_the_file(tmp_path: Path) -> None:
    said = {
        "dpo.beta": 0.2,
        "dpo.lora.r": 8,
        "pairs.margin": 0.25,
        "draft": "direct",
        'compare.sweep."dpo.beta"': [0.1, 0.3],
    }
    before = "[dpo]\nbeta = {}\nlearning_rate = 1e-4\n[dpo.lora]\n{}lora_alpha = 8\n"
    files = tasked(tmp_path, before.format(0.1, ""))
    made = load_config(files, overrides=said)
    assert made.dpo == {
        "beta": 0.2,
        "learning_rate": 1e-4,
        "lora": {"r": 8, "lora_alpha": 8},
    }
    more = '[pairs]\nmargin = 0.25\n[compare.sweep]\n"dpo.beta" = [0.1, 0.3]\n'
    same = tasked(tmp_path / "same", before.format(0.2, "r = 8\n") + more)
    same[0].write_text('draft = "direct"\n' + TASK_TOML)
    other = load_config(same)
    assert json.loads(fingerprint(made)) == json.loads(
        fingerprint(other).replace(f"{tmp_path}/same", str(tmp_path))
    )
    assert fingerprint(made) != fingerprint(load_config(files))


def test_a_path_of_an_override_is_of_the_current_folder_and_no_other_path_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = tasked(tmp_path, "[dpo]\nbeta = 0.1\n")
    (tmp_path / "here" / "other").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    said = {
        "metric": "mine.py:match",
        "strong.model": "other",
        "weak.model": "other",
        "judge": {"kind": "in_process", "model": "owner/name"},
    }
    made = load_config(files, overrides=said)
    assert made.metric == f"{tmp_path}/here/mine.py:match"
    assert made.program == f"{tmp_path}/task/toy.py:program"
    assert made.strong.model == "other", "of an API it is a name, and no path"
    assert made.weak.model == f"{tmp_path}/here/other"
    assert made.judge and made.judge.model == "owner/name"
    assert load_config(files).weak.model == f"{tmp_path}/task/tiny"


def test_an_empty_table_as_an_override_takes_the_table_away(tmp_path: Path) -> None:
    files = tasked(tmp_path, "[dpo]\nbeta = 0.1\n")
    made = load_config(files, overrides={"dpo": {}, "kto.beta": 0.3})
    assert (made.dpo, made.kto) == ({}, {"beta": 0.3})


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("dpo.beta=0.2", "dpo.beta", 0.2),
        ("draft = direct", "draft", "direct"),
        ("weak.model=openai/gpt-4.1-mini", "weak.model", "openai/gpt-4.1-mini"),
        ('name="7"', "name", "7"),
        ("a.b=[1, 2]", "a.b", [1, 2]),
        ("a.b={c = 1}", "a.b", {"c": 1}),
        ("dpo.use_weighting=true", "dpo.use_weighting", True),
        ("strong.api_base=http://127.0.0.1/v1?a=1", "strong.api_base", "http://127.0.0.1/v1?a=1"),
        ("note=one\ntwo = 2", "note", "one\ntwo = 2"),
        ("name=", "name", ""),
    ],
)
def test_a_value_is_toml_or_a_bare_word(text: str, key: str, value: Any) -> None:
    assert parse_override(text) == (key, value)


@pytest.mark.parametrize("text", ["dpo.beta", "=3", "dpo..beta=3", "a b=3", "[dpo]=3"])
def test_what_is_no_key_and_value_says_what_is(text: str) -> None:
    with pytest.raises(ConfigError, match=r"such as dpo\.beta|for instance dpo\.beta=0\.2"):
        parse_override(text)


def test_set_is_shown_and_a_typo_in_it_is_told(tmp_path: Path) -> None:
    files = [str(file) for file in tasked(tmp_path, "[dpo]\nbeta = 0.1\n")]
    show = ["config", "show", *files]
    said = CliRunner().invoke(
        app, [*show, "--set", "dpo.beta=0.2", "--set", "draft=direct", "--seed", "3"]
    )
    shown = said.stdout.splitlines()
    assert {"beta = 0.2", 'draft = "direct"', "seed = 3"} <= {*shown} and "beta = 0.1" not in shown
    for wrong, hint in (
        ("dpo.betta=0.2", 'betta: there is no such key. Did you mean "beta"?'),
        ("pears.margin=1", 'pears: there is no such key. Did you mean "pairs"?'),
        ("pairs.margn=1", 'pairs.margn: there is no such key. Did you mean "margin"?'),
        ("pairs.margin=lots", "pairs.margin: Input should be a valid number"),
        ("weak.kind=vllm", 'Did you mean "server"?'),
    ):
        failed = CliRunner().invoke(app, [*show, "--set", wrong])
        assert failed.exit_code == 1 and hint in str(failed.exception), wrong


def test_every_verb_that_takes_toml_files_takes_set() -> None:
    import inspect

    takes = {
        command.name or command.callback.__name__: set(
            inspect.signature(command.callback).parameters
        )
        for group in (app, checks.config_app)
        for command in group.registered_commands
        if command.callback
    }
    seeded = {name for name, parameters in takes.items() if "seed" in parameters}
    assert len(seeded) >= 12
    assert seeded == {name for name, parameters in takes.items() if "changes" in parameters}


# The schema


@pytest.fixture(scope="module", params=["Draft7Validator", "Draft202012Validator"])
def validator(request: pytest.FixtureRequest) -> Any:
    """The draft that the schema declares, and the one that pydantic writes: editors know one or the
    other."""
    kind = getattr(pytest.importorskip("jsonschema"), request.param)
    kind.check_schema({**json_schema(), "$schema": kind.META_SCHEMA["$schema"]})
    return kind(json_schema())


@pytest.mark.parametrize(
    "path", sorted((ROOT / "programs").rglob("*.toml")), ids=lambda path: path.stem
)
def test_every_file_that_comes_with_us_fits_the_schema(path: Path, validator: Any) -> None:
    validator.validate(tomllib.loads(path.read_text()))


@pytest.mark.parametrize(
    "file",
    [
        {"naem": "toy"},
        {"weak": server(api_bas="x")},
        {"weak": {"kind": "in_process"}},
        {"strong": {"kind": "openai", "model": "m"}},
        {"dpo": {"betta": 0.1}},
        {"sft": {"drafts": "a.py:b", "settings": {"epoch": 3}}},
        {"sft": {"settings": {}}},
        {"collect": {"drafts": 1}},
    ],
)
def test_what_the_schema_refuses_is_what_load_config_or_the_run_refuses(
    file: dict[str, Any], validator: Any
) -> None:
    assert not validator.is_valid(file)


def test_a_task_a_backend_and_an_empty_table_alone_fit_the_schema(validator: Any) -> None:
    for part in (
        TASK,
        {"weak": server()},
        {"sft": {}},
        {"judge": {}},
        {"dpo": {"loss_type": ["sigmoid", "sft"]}},
        {},
    ):
        validator.validate(part)


def test_the_schema_is_written_to_a_file_or_printed(tmp_path: Path) -> None:
    out = tmp_path / "made" / "cowest.schema.json"
    said = CliRunner().invoke(app, ["config", "schema", "--out", str(out)])
    assert said.exit_code == 0 and "#:schema" in said.stdout
    printed = CliRunner().invoke(app, ["config", "schema"], env={"COLUMNS": "20"})
    assert json.loads(out.read_text()) == json.loads(printed.stdout) == json_schema()


# The effective configuration


@pytest.mark.parametrize(
    "path", sorted((ROOT / "programs/backends").glob("*.toml")), ids=lambda path: path.stem
)
def test_what_is_shown_is_read_again_as_the_same(path: Path, tmp_path: Path) -> None:
    files = [str(ROOT / "programs/handbook.toml"), str(path)]
    said = CliRunner().invoke(app, ["config", "show", *files, "--seed", "7"], env={"COLUMNS": "20"})
    assert said.exit_code == 0, said.output
    assert load_config([written(tmp_path, "shown.toml", said.stdout)]) == load_config(files, seed=7)


def test_odd_text_is_read_again_as_the_same(tmp_path: Path) -> None:
    odd = 'a "quoted" \\ line\nwith\ttabs, ünïcode \U0001f600 and \x7f \x01'
    made = config(
        program=f"{tmp_path}/toy.py:program",
        metric=f"{tmp_path}/toy.py:match",
        data={"source": f"{tmp_path}/t.jsonl", "inputs": ["q", odd]},
        weak=server(model=odd, api_base=None, command=["x" * 90, odd]),
        dpo={"learning_rate": 1e-05, "lora": {"r": 4}},
    )
    assert load_config([written(tmp_path, "shown.toml", effective_toml(made))]) == made


def test_defaults_of_tuning_are_shown_as_comments() -> None:
    shown = effective_toml(config(dpo={"beta": 0.2}))
    assert (
        "beta = 0.2" in shown.splitlines()
        and "# num_train_epochs = 4.0  (default)" in shown.splitlines()
    )
    with pytest.raises(ConfigError, match=r"\[dpo\]:\n .*betta: there is no such key"):
        effective_toml(config(dpo={"betta": 0.2}))


def test_no_secret_is_shown() -> None:
    command = [
        "serve",
        "--api-key",
        "letmein",
        "--hf-token=letmein",
        "--url",
        "http://me:letmein@host",
        "--seed",
        "3",
    ]
    shown = effective_toml(
        config(
            weak=server(api_base=None, command=command),
            strong={**STRONG, "api_base": "https://letmein@host/v1?api_key=letmein&x=1"},
            judge=server(api_base="http://me:letmein@host/v1"),
            data={"source": "t.jsonl", "inputs": ["sk-proj-abcdefghijkl1234"]},
        )
    )
    assert "letmein" not in shown and "abcdefghijkl" not in shown
    assert '"--seed", "3"' in shown and "x=1" in shown and "@host/v1" in shown
    assert shown.startswith("# *** stands where a secret was")
