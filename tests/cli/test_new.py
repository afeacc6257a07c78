"""cowest new: what it writes runs at once, it never overwrites, and it refuses names that would not
do."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cowest_dspy import Experiment, load_config
from cowest_dspy.cli import main
from cowest_dspy.cli.scaffold import FILES, LONGEST_NAME, check_name, new_domain
from cowest_dspy.errors import CowestError, DataError
from cowest_dspy.experiment.config import Config, validate
from cowest_dspy.experiment.doctor import examine
from cowest_dspy.tuning import DPO, SFT
from cowest_dspy.utils import importing

ROOT = Path(__file__).parents[2]
CODE = {**os.environ, "PYTHONPATH": str(ROOT)}


def new(*arguments: str) -> Result:
    return CliRunner().invoke(main.app, ["new", *arguments], env={"COLUMNS": "200"})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def domain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a domain as it was written."""
    folder = tmp_path_factory.mktemp("new") / "tools"
    new_domain("tool-loans", folder)
    return folder


# What is written


def test_the_generated_test_passes_from_any_working_directory(tmp_path: Path) -> None:
    """Here with the verb, in a process of its own, in a folder with a space in its name."""
    here = tmp_path / "a b"
    here.mkdir()
    made = subprocess.run(
        [sys.executable, "-m", "cowest_dspy.cli.main", "new", "tool-loans"],
        cwd=here,
        env=CODE,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "pytest tool_loans/test_tool_loans.py" in made.stdout
    test = here / "tool_loans" / "test_tool_loans.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(test)]
    done = subprocess.run(
        command, cwd=tmp_path, env=CODE, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "5 passed" in done.stdout


@pytest.mark.parametrize("name", ["t", "tool-loans", "n" * LONGEST_NAME])
def test_the_code_is_as_this_project_would_have_it(name: str, tmp_path: Path) -> None:
    new_domain(name, tmp_path)
    settings = [
        "--no-cache",
        "--config",
        str(ROOT / "pyproject.toml"),
        "--config",
        f"src = ['{ROOT}']",
    ]
    # No docstrings are asked for, as in programs/.
    for check in (
        ["check", "--ignore", "D", *settings],
        ["format", "--check", "--diff", *settings],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *check, str(tmp_path)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_each_backend_fits_the_task(domain: Path) -> None:
    for backend in ("scripted", "models"):
        config = load_config([domain / "tool_loans.toml", domain / f"tool_loans_{backend}.toml"])
        assert config.name == "tool-loans"
        assert (config.sft is None, config.dpo == {}) == (
            (True, True) if backend == "scripted" else (False, False)
        )
    assert (
        config.sft
        and SFT(**config.sft.settings)
        and SFT(**config.sft.answer_settings)
        and DPO(**config.dpo)
    )
    assert importing.load(config.sft.drafts)() and importing.load(config.sft.answers or "")()


@pytest.mark.slow
def test_a_real_weak_model_learns_the_rows_of_a_new_domain(
    tmp_path: Path, tiny_model: Path
) -> None:
    """Fine-tuned to draft, and to answer by itself; then it drafts for each train question, behind
    the scripted strong model."""
    new_domain("tools", tmp_path)
    models = (tmp_path / "tools_models.toml").read_text().partition("[strong]")[0]
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in models
    strong = (
        "[strong]"
        + (tmp_path / "tools_scripted.toml").read_text().partition("[strong]")[2].partition("#")[0]
    )
    (tmp_path / "tiny.toml").write_text(
        models.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(tiny_model)) + strong
    )
    text = (tmp_path / "tools.toml").read_text()
    assert text.count("learning_rate = 1e-3") == 2
    text = text.replace("learning_rate = 1e-3", "learning_rate = 1e-3\nbf16 = false\nmax_steps = 2")
    (tmp_path / "tools.toml").write_text(
        text.replace("temperature = 1.0", "temperature = 1.0\nmax_errors = 1.0")
    )
    with Experiment(
        load_config([tmp_path / "tools.toml", tmp_path / "tiny.toml"]), tmp_path / "run"
    ) as experiment:
        ids = [lm.model for lm in (experiment.weak, experiment.sft(), experiment.answer_sft())]
        assert len(set(ids)) == 3
        traces = list(experiment.collect())
    assert {trace.weak_model for trace in traces} == {ids[1]}
    assert len(traces) == 8 * 4


def test_the_commented_lines_are_toml_that_is_read(domain: Path) -> None:
    """What a comment shows is what somebody types: the strong model behind an API, and the
    budget."""
    task = (
        (domain / "tool_loans.toml")
        .read_text()
        .replace("# [budget]", "[budget]")
        .replace("# usd", "usd")
    )
    models = (domain / "tool_loans_models.toml").read_text()
    kept, _, shown = models.partition("[strong]")
    api = "\n".join(
        line.removeprefix("# ") for line in shown.partition("# [strong]\n")[2].splitlines()
    )
    both = {**tomllib.loads(task), **tomllib.loads(kept), **tomllib.loads(f"[strong]\n{api}")}
    made = validate(Config, both, "the comments")
    assert made.strong.kind == "api" and made.budget and made.budget.usd == 2.0
    assert (
        tomllib.loads(models.replace('# dtype = "int8"', 'dtype = "int8"'))["strong"]["dtype"]
        == "int8"
    )


def test_the_doctor_finds_a_new_domain_healthy(domain: Path) -> None:
    found = examine(load_config([domain / "tool_loans.toml", domain / "tool_loans_scripted.toml"]))
    assert found.healthy, [check for check in found.checks if check.level == "error"]
    assert [probe.role for probe in found.probes] == ["weak", "strong"]


def test_the_same_name_gives_the_same_bytes_and_the_files_that_are_listed(
    domain: Path, tmp_path: Path
) -> None:
    written = new_domain("tool-loans", tmp_path / "deep" / "again")
    assert [path.name for path in written] == [
        file.format(stem="tool_loans") for file, _ in FILES.values()
    ]
    assert contents(tmp_path / "deep" / "again") == contents(domain)


def test_every_template_is_used_and_is_in_the_package(tmp_path: Path) -> None:
    import cowest_dspy.cli.scaffold

    folder = Path(cowest_dspy.cli.scaffold.__file__).parent / "templates"
    assert {path.name for path in folder.iterdir()} == set(FILES)
    package_data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "package-data"
    ]["cowest_dspy"]
    assert "cli/templates/*" in package_data


# Its own rows


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("question,answer,split\nq,a,train\n", "background"),
        ("question,answer,background,split\nq,a,b,tets\n", "line 2"),
        ("question,answer,background,split\nq,a,b,train\nq,a,b\n", "line 3"),
        ("question,answer,background,split\nq,a,b,train,more\n", "line 2"),
    ],
)
def test_rows_that_do_not_fit_are_named(text: str, said: str, tmp_path: Path) -> None:
    new_domain("rows-here", tmp_path)
    (tmp_path / "rows_here.csv").write_text(text)
    with pytest.raises(DataError, match=said):
        importing.load(f"{tmp_path / 'rows_here.py'}:examples")("train")


def test_a_spreadsheet_s_csv_is_read(tmp_path: Path) -> None:
    """With a byte-order mark, CRLF, quotes, a comma and a line break inside a cell."""
    new_domain("rows-here", tmp_path)
    lines = [
        "\ufeffsplit,background,answer,question",
        'train,"one\ntwo","a, b","Say ""it""?"',
        "dev,b,a,q",
        "",
    ]
    (tmp_path / "rows_here.csv").write_bytes("\r\n".join(lines).encode())
    rows = importing.load(f"{tmp_path / 'rows_here.py'}:examples")("train")
    assert rows == [
        {"split": "train", "background": "one\ntwo", "answer": "a, b", "question": 'Say "it"?'}
    ]


@pytest.mark.slow
def test_the_generated_test_passes_on_other_rows(tmp_path: Path) -> None:
    """Answers of several words, cells of several lines, questions that begin alike, columns in
    another order and one more."""
    new_domain("rows-here", tmp_path)
    lines = ["split,note,answer,background,question"]
    for number, split in enumerate(["archive"] * 3 + ["train"] * 9 + ["dev"] * 2 + ["test"] * 4):
        question = (
            f"Who keeps the key?\n(house {number}{number})"
            if number % 2
            else f"Who keeps the key of house {number}"
        )
        lines.append(
            f'{split},,"Mrs. Ott, no. {number}","The key hangs at\nMrs. Ott\'s (no. '
            f'{number}).","{question}"'
        )
    (tmp_path / "rows_here.csv").write_text("\n".join(lines))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(tmp_path / "test_rows_here.py"),
    ]
    done = subprocess.run(
        command, cwd=tmp_path, env=CODE, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_generated_test_fails_on_what_is_broken(tmp_path: Path) -> None:
    """Four domains in one folder, each broken in its own way, and one that is not."""
    broken = {
        "metric": ("_metric.py", "float(bool(given)", "float(not given"),
        "lesson": (".py", "drafter = program(draft).draft", 'drafter = program("direct").draft'),
        "ceiling": (".toml", 'oracle = "background"', 'oracle = "question"'),
        "splits": (".csv", ",test", ",dev"),
    }
    new_domain("whole", tmp_path)
    for name, (ending, old, new) in broken.items():
        new_domain(name, tmp_path)
        file = tmp_path / f"{name}{ending}"
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(
        command, cwd=tmp_path, env=CODE, capture_output=True, text=True, check=False
    )
    assert set(re.findall(r"^FAILED test_(\w+)\.py", done.stdout, re.MULTILINE)) == set(broken), (
        done.stdout[-3000:]
    )


# What is refused


def test_nothing_is_overwritten_and_nothing_is_written_beside(
    domain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(domain)
    with pytest.raises(CowestError, match=r"tool_loans\.csv.*Nothing was written"):
        new_domain("tool-loans", domain)
    assert contents(domain) == before
    for last in (f for f, _ in list(FILES.values())[-1:]):
        one = domain.parent / "one"
        one.mkdir()
        (one / last.format(stem="tool_loans")).write_text("mine")
        with pytest.raises(CowestError, match=r"test_tool_loans\.py"):
            new_domain("tool-loans", one)
        assert contents(one) == {"test_tool_loans.py": b"mine"}


def test_a_second_domain_goes_into_the_same_folder(domain: Path, tmp_path: Path) -> None:
    new_domain("one", tmp_path)
    first = contents(tmp_path)
    new_domain("two", tmp_path)
    assert first.items() <= contents(tmp_path).items()
    assert len(contents(tmp_path)) == 2 * len(FILES)


def test_a_folder_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CowestError, match="cannot be written"):
        new_domain("tools", tmp_path / "file")


def test_a_file_that_comes_up_meanwhile_is_left_and_the_others_are_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if somebody had written it between the look and the writing."""
    (tmp_path / "tools_metric.py").write_text("mine")
    monkeypatch.setattr(Path, "exists", lambda self: False)
    with pytest.raises(CowestError, match=r"tools_metric\.py"):
        new_domain("tools", tmp_path)
    assert contents(tmp_path) == {"tools_metric.py": b"mine"}


@pytest.mark.parametrize(
    "name",
    [
        "",
        "Tools",
        "2tools",
        "-tools",
        "_tools",
        "to ols",
        "tools.py",
        "../tools",
        "tools/x",
        "töols",
        "tools\n",
        "n" * 41,
    ],
)
def test_other_characters_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(CowestError, match="cannot be the name"):
        new_domain(name, tmp_path)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    "name", ["class", "match", "json", "random", "dspy", "typing-extensions", "cowest_dspy"]
)
def test_words_of_python_and_names_of_modules_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(CowestError, match="another name"):
        new_domain(name, tmp_path)
    assert contents(tmp_path) == {}


def test_a_name_gives_an_identifier() -> None:
    assert check_name("tool-loans_2") == "tool_loans_2"


# The verb


def test_the_verb_writes_says_what_and_says_what_is_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = new("tools", "--folder", "my domains/tools")
    assert done.exit_code == 0, done.output
    assert len(contents(tmp_path / "my domains/tools")) == len(FILES)
    assert all(file.format(stem="tools") in done.output for file, _ in FILES.values())
    assert (
        "cowest collect 'my domains/tools/tools.toml' 'my domains/tools/tools_scripted.toml'"
        in done.output
    )


def test_an_error_of_the_verb_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cowest_dspy.cli.main", "new", "No Name"]
    done = subprocess.run(
        command, cwd=tmp_path, env=CODE, capture_output=True, text=True, check=False
    )
    assert (
        done.returncode == 1
        and len(done.stderr.splitlines()) == 1
        and "Traceback" not in done.stderr
    )
    assert list(tmp_path.iterdir()) == []


def test_help_says_what_it_writes() -> None:
    assert "new" in CliRunner().invoke(main.app, ["--help"]).output
    shown = new("--help")
    assert shown.exit_code == 0 and "--folder" in shown.output and "rows" in shown.output
