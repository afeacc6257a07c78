"""The whole path on a toy task: a real (tiny) weak model that is really tuned, and a strong model
with a rule for an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import toy
from command_line import cowest
from toy_experiment import (
    rewrite,
    task,  # noqa: F401 - fixtures
)

from cowest_dspy import Experiment, load_config
from cowest_dspy.errors import ConfigError, DataError, ModelError, PairsError, TuningError
from cowest_dspy.lms.local import weights
from cowest_dspy.optimizers.run import NoProgress
from cowest_dspy.report import read_report, verdict
from cowest_dspy.store.journal import Event
from cowest_dspy.store.progress import Snapshot


def test_a_cycle_goes_from_a_toml_to_a_report_and_again_only_reads(
    task: list[Path], tmp_path: Path
) -> None:
    with Experiment(load_config(task), tmp_path / "run") as experiment:
        report = experiment.cycle()
        adapters = {
            name: record["model"] for name, record in experiment.store.records("adapter").items()
        }
        calls = experiment.store.calls()
    assert [arm.name for arm in report.arms] == [
        "weak", "strong", "collaboration_sft", "collaboration", "oracle", "shuffled", "sft_on_chosen",
    ]  # fmt: skip
    scores = {arm.name: [answer.score for answer in arm.answers] for arm in report.arms}
    assert scores["strong"] == [0.0] * 6 and scores["oracle"] == [1.0] * 6
    assert report.pairs is not None and report.pairs.kept >= 2
    assert len(set(adapters.values())) == len(adapters) == 5
    assert {stage.usd for stage in report.stages} == {0.0}, (
        "models in this process and scripted ones cost nothing"
    )
    assert read_report(tmp_path / "run") == report
    assert "<html" in (tmp_path / "run/report.html").read_text()

    before = {
        file: file.stat().st_mtime_ns for file in (tmp_path / "run/adapters").rglob("*.safetensors")
    }
    with Experiment(load_config(task), tmp_path / "run") as experiment:
        again = experiment.cycle()
        assert experiment.store.calls() == calls
    assert (
        again.arms == report.arms
        and again.traces == report.traces
        and again.stages == report.stages
    )
    assert before == {
        file: file.stat().st_mtime_ns for file in (tmp_path / "run/adapters").rglob("*.safetensors")
    }


def test_a_weak_model_in_int8_is_refused_before_anything_is_trained(
    task: list[Path], tmp_path: Path
) -> None:
    backend = (
        task[1].read_text().replace('kind = "in_process"', 'kind = "in_process"\ndtype = "int8"')
    )
    task[1].write_text(backend)
    with (
        Experiment(load_config(task), tmp_path / "run") as experiment,
        pytest.raises(TuningError, match='set \\[weak\\] dtype = "auto"'),
    ):
        experiment.sft()
    assert not (tmp_path / "run/adapters").exists()


def test_a_changed_adapter_on_disk_is_noticed(task: list[Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    with Experiment(load_config(task), tmp_path / "run") as experiment:
        experiment.sft()
    file = next((tmp_path / "run/adapters").rglob("adapter_model.safetensors"))
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 1
    save_file(tensors, file)
    with (
        Experiment(load_config(task), tmp_path / "run") as experiment,
        pytest.raises(Exception, match="does not hold the weights"),
    ):
        experiment.sft()


def test_the_verbs_run_one_stage_each_on_one_run_folder(task: list[Path], tmp_path: Path) -> None:
    run = ["--run", str(tmp_path / "run")]
    files = [str(file) for file in task]
    assert "influence" in cowest("collect", *files, *run)
    assert "pairs in" in cowest("pairs", *files, *run)
    assert "tuned: local/" in cowest("tune", *files, *run)
    assert "strong alone" in cowest(
        "evaluate", *files, *run, "--arm", "strong", "--arm", "collaboration"
    )
    assert "answer" in cowest("ask", *files, *run, "-q", "test 1?")
    assert "report.html" in cowest("report", *files, *run)
    assert json.loads((tmp_path / "run/report.json").read_text())["schema_version"] == 3


def test_after_a_rollback_the_arms_say_that_the_model_is_untuned_everywhere(
    task: list[Path], tmp_path: Path
) -> None:
    with task[0].open("a") as file:
        file.write("[rounds]\nleast_gain = 1.0\n")
    lines: list[str] = []

    class Messages(NoProgress):
        def update(self, event: Event, snapshot: Snapshot) -> None:
            if event == "message":
                lines.append(snapshot.said[-1])

    with Experiment(load_config(task), tmp_path / "run", progress=Messages()) as experiment:
        experiment.evaluate(["strong", "collaboration_sft", "collaboration"])
        report = experiment.report()
    titles = {arm.name: arm.title for arm in report.arms}
    assert titles["collaboration"] == "collaboration (untuned: round 1 was rolled back)"
    assert titles["collaboration_sft"] == "collaboration, before preference tuning"
    (first, *_) = verdict(report).sentences
    assert (
        "he untuned collaboration" in first
        and "round 1 was rolled back; no tuned model was taken" in first
    )
    assert "tuning made NO" not in first and "tuning helped" not in first
    assert any(line.startswith("round 1 rolled back: gain ") for line in lines)
    shown = json.loads((tmp_path / "run/report.json").read_text())
    assert shown["rounds"][0]["outcome"] == "rolled back" and "accepted" not in shown["rounds"][0]
    page = (tmp_path / "run/report.html").read_text()
    assert "untuned: round 1 was rolled back" in page and "after preference tuning" not in page


@pytest.mark.parametrize(
    "verb",
    [
        "",
        "cycle",
        "ask",
        "evaluate",
        "collect",
        "pairs",
        "tune",
        "report",
        "quote",
        "doctor",
        "config schema",
        "config show",
    ],
)
def test_help_teaches(verb: str) -> None:
    text = cowest(*verb.split(), "--help")
    assert ("TOML" in text or "toml" in text) and len(text.split()) > 30


def test_an_error_is_one_clear_message(task: list[Path], tmp_path: Path) -> None:
    text = task[0].read_text().replace("drafts = 6", "draft = 6")
    task[0].write_text(text)
    said = cowest(
        "collect", *[str(file) for file in task], "--run", str(tmp_path / "run"), fails=True
    )
    assert said.startswith("ConfigError:") and 'Did you mean "drafts"?' in said
    assert len(said.splitlines()) < 4


@pytest.mark.parametrize(
    ("old", "new", "error", "says"),
    [
        ("margin", "margni", ConfigError, "there is no such key"),
        ('program = "toy.py:program"', "", ConfigError, "program: is missing"),
        ("max_steps = 2", "max_step = 2", ConfigError, "max_step"),
        ("drafts = 6", "drafts = 1", ConfigError, "greater than or equal to 2"),
        ('inputs = ["question"]', 'inputs = ["qestion"]', DataError, 'Did you mean "question"?'),
        ("toy.py:rows", "toy.py:no_rows", DataError, "there are no examples"),
        (
            "least = 2",
            "least = 500",
            PairsError,
            "Sample more drafts.* At least 500 are needed.*cowest evaluate.* --arm strong",
        ),
    ],
)
def test_what_is_wrong_in_a_task_says_what_to_do(
    task: list[Path], tmp_path: Path, old: str, new: str, error: type[Exception], says: str
) -> None:
    with (tmp_path / "toy.py").open("a") as recipe:
        recipe.write("\ndef no_rows(split, seed=0):\n    return []\n")
    rewrite(task[0], old, new) if old != "margin" else rewrite(
        task[0], "least = 2", "least = 2\nmargni = 0.5"
    )
    with (
        pytest.raises(error, match=says.replace("?", r"\?")),
        Experiment(load_config(task), tmp_path / "run") as experiment,
    ):
        experiment.tune()


def test_a_key_that_is_not_set_is_said_before_anything_is_trained(
    task: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    weak = task[1].read_text().partition("[strong]")[0]
    task[1].write_text(
        f'{weak}[strong]\nkind = "api"\nmodel = "openai/any"\napi_key_env = "NO_SUCH_KEY"\n'
    )
    with (
        pytest.raises(ConfigError, match="NO_SUCH_KEY is not set"),
        Experiment(load_config(task), tmp_path / "run") as experiment,
    ):
        experiment.sft()
    assert not (tmp_path / "run/adapters").exists()


def test_a_file_that_the_recipe_reads_and_is_not_there_is_named(
    task: list[Path], tmp_path: Path
) -> None:
    with (tmp_path / "toy.py").open("a") as recipe:
        recipe.write(
            "\ndef lost(split, seed=0):\n    return open('/no/such/rows.csv').readlines()\n"
        )
    rewrite(task[0], "toy.py:rows", "toy.py:lost")
    with (
        pytest.raises(DataError, match=r"reads /no/such/rows\.csv, and there is no such file"),
        Experiment(load_config(task), tmp_path / "run") as experiment,
    ):
        experiment.collect()


def test_a_folder_that_is_misspelt_like_a_hub_id_names_the_one_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models/SmolLM2-135M-Instruct").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match='Did you mean "models/SmolLM2-135M-Instruct"'):
        weights.locate("models/SmolLM2-135M")


def test_a_missing_model_folder_says_what_to_type(task: list[Path], tmp_path: Path) -> None:
    rewrite(task[1], 'model = "/', 'model = "/no/such/folder/')
    with (
        pytest.raises(ModelError, match="make models"),
        Experiment(load_config(task), tmp_path / "run") as experiment,
    ):
        experiment.sft()


def test_a_missing_backend_says_which_file_to_add(task: list[Path]) -> None:
    with pytest.raises(
        ConfigError,
        match=r"Name a backend's TOML after the task's, such as programs/backends/in_process\.toml",
    ):
        load_config(task[:1])


def test_a_key_in_a_file_is_refused(task: list[Path]) -> None:
    text = (
        '[weak]\nkind = "api"\nmodel = "openai/x"\napi_key_env = '
        '"sk-abcdefghijkl"\n[strong]\nkind = "api"\nmodel = "openai/x"\n'
    )
    task[1].write_text(text)
    with pytest.raises(ConfigError, match="NAME of an environment variable") as caught:
        load_config(task)
    assert "sk-abcdefghijkl" not in str(caught.value)


def test_a_later_file_replaces_whole_tables(task: list[Path], tmp_path: Path) -> None:
    (tmp_path / "other.toml").write_text('[strong]\nkind = "api"\nmodel = "openai/gpt-4.1-mini"\n')
    config = load_config([*task, tmp_path / "other.toml"], seed=7)
    assert config.strong.model_dump(exclude_defaults=True) == {
        "kind": "api",
        "model": "openai/gpt-4.1-mini",
    }
    assert config.weak.kind == "in_process" and config.seed == 7


FAILING = (
    toy.RECIPE
    + """
from pathlib import Path
from dspy.lm15 import BillingError

HERE = Path(__file__).parent

def rows(split, seed=0):
    return [{"id": f"{split}{i}", "question": f"{split} {i}?", "answer": "yes"} for i in range(4)]

def program():
    return Collaboration("question -> answer", draft="knowledge")

def weak():
    return ScriptedEngine(lambda request: f"draft {request['config'].get('seed')}", model="scripted/weak")

def strong():
    def answer(request):
        text = request["messages"][-1]["content"]
        with (HERE / "asked.txt").open("a") as file:
            file.write(f"{text!r}\\n")
        fails = "train 1?" in text or ("train 2?" in text and "draft" in text)
        if fails and (HERE / "unpaid").exists():
            raise BillingError("no money")
        return "" if "train 3?" in text and "draft" in text else "yes"
    return ScriptedEngine(answer, model="scripted/strong")
"""
)


def test_a_finished_collection_that_is_collected_again_makes_the_calls_that_failed_and_no_others(
    tmp_path: Path,
) -> None:
    (tmp_path / "toy.py").write_text(FAILING)
    (tmp_path / "toy.toml").write_text(
        toy.TASK
        + toy.engine("weak")
        + toy.engine("strong")
        + "[collect]\ndrafts = 2\nmax_errors = 1.0\n"
    )
    log = tmp_path / "asked.txt"

    def collected(run: str) -> tuple[list[dict[str, Any]], dict[str, int], list[str]]:
        log.write_text("")
        with Experiment(load_config([tmp_path / "toy.toml"]), tmp_path / run) as experiment:
            traces = experiment.collect()
            assert list(traces) == list(experiment.rounds.collect(experiment.sft())), (
                "others read the same"
            )
            return (
                [trace.to_dict() for trace in traces],
                dict(traces.saved),
                log.read_text().splitlines(),
            )

    (tmp_path / "unpaid").touch()
    failed, _, first = collected("run")
    assert [trace["error"] is None for trace in failed] == [True] * 2 + [False] * 6
    still, _, second = collected("run")
    assert still == failed and sorted(second) == sorted(
        line for line in first if "train 1?" in line or ("train 2?" in line and "draft" in line)
    )
    (tmp_path / "unpaid").unlink()
    mended, saved, third = collected("run")
    assert sorted(third) == sorted(second), "what was answered, usable or not, is not asked again"
    assert collected("run") == (mended, saved, []), "nothing has failed: nothing is asked"
    whole, spared, _ = collected("other")
    assert (mended, saved) == (whole, spared), "as if nothing had failed"
