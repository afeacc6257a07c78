"""Every recipe loads, makes what it says, and fits every backend; every task's splits are apart."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import dspy
import pytest

from cowest_dspy import Collaboration, load_config
from cowest_dspy.experiment.config import Config
from cowest_dspy.experiment.data import SPLITS, check_apart, read_split
from cowest_dspy.tuning import DPO, SFT
from cowest_dspy.utils import importing

ROOT = Path(__file__).parents[2]
PROGRAMS = sorted((ROOT / "programs").glob("*.py"))
METRICS = sorted((ROOT / "metrics").glob("*.py"))


def metrics_of(path: Path) -> dict[str, Callable[..., object]]:
    """The metrics of one example that a file has: the functions of its own that take example,
    prediction and trace."""
    names: dict[str, object] = importing.load(f"{path}:__dict__")
    functions = {
        name: value
        for name, value in names.items()
        if inspect.isfunction(value) and value.__module__ == names["__name__"]
    }
    return {
        name: value
        for name, value in functions.items()
        if list(inspect.signature(value).parameters)[2:] == ["trace"]
    }


TASKS = sorted((ROOT / "programs").glob("*.toml"))
BACKENDS = sorted((ROOT / "programs" / "backends").glob("*.toml"))


def named(path: Path) -> str:
    return path.stem


def test_there_are_recipes() -> None:
    assert PROGRAMS and METRICS and TASKS and BACKENDS
    # A task is of the program of its name; "ifqa_passages" is another setting of "ifqa".
    of_programs = {task.stem.partition("_")[0] for task in TASKS}
    assert of_programs <= {program.stem for program in PROGRAMS}


@pytest.mark.parametrize("path", PROGRAMS, ids=named)
def test_a_program_recipe_gives_an_unbound_collaboration(path: Path) -> None:
    program = importing.load(f"{path}:program")()
    assert isinstance(program, Collaboration)
    assert all(predictor.lm is None for predictor in program.predictors()), (
        "a recipe names no model"
    )


@pytest.mark.parametrize("path", METRICS, ids=named)
def test_a_metric_recipe_scores_between_0_and_1(path: Path) -> None:
    assert metrics_of(path)
    if path.stem == "sql_results":
        pytest.skip("it runs answers on a database: see test_sql_results.py")
    example = dspy.Example(question="What is left?", answer="12").with_inputs("question")
    for metric in metrics_of(path).values():
        scores = [
            metric(example, dspy.Prediction(answer=answer)) for answer in ("12", "13", "", None)
        ]
        assert all(isinstance(score, float) and 0 <= score <= 1 for score in scores)
        assert scores[0] == 1 and scores[1] == 0


@pytest.mark.parametrize("task", TASKS, ids=named)
def test_the_papers_settings_take_the_place_of_a_tasks(task: Path) -> None:
    files = [task, ROOT / "programs/presets/paper.toml", ROOT / "programs/backends/hub.toml"]
    config, changed = load_config(files), load_config(files, overrides={"influence.metric": 1})
    assert (config.influence.metric, config.influence.judge) == (0, 1)
    assert (changed.influence.metric, changed.influence.judge) == (1, 1)
    assert config.pairs.strategy == "paper" and config.pairs.per_example is None
    assert config.dpo["learning_rate"] == 1.41e-5 and config.kto is None
    assert config.rounds.count == 1


@pytest.fixture(params=TASKS, ids=named)
def task(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture(params=BACKENDS, ids=named)
def config(task: Path, request: pytest.FixtureRequest) -> Config:
    return load_config([task, request.param])


def test_every_task_fits_every_backend(config: Config) -> None:
    assert callable(importing.load(config.program))
    assert callable(importing.load(config.metric))
    assert config.dpo == {} or DPO(**config.dpo)
    if config.sft is not None:
        assert SFT(**config.sft.settings) and SFT(**config.sft.answer_settings)
        assert callable(importing.load(config.sft.drafts))


def reads_rows_from_elsewhere(source: str) -> bool:
    """Whether a data source is on the Hub, or a function that reads published rows: its own tests
    give it invented ones."""
    return (
        source.startswith("hub:") or "rows" in inspect.signature(importing.load(source)).parameters
    )


def test_no_two_splits_of_a_task_share_an_input(task: Path) -> None:
    config = load_config([task, BACKENDS[0]])
    if reads_rows_from_elsewhere(config.data.source):
        pytest.skip(
            "its rows are elsewhere: see test_domains_*.py; data.check_apart says it when they "
            "are read"
        )
    splits = {
        split: read_split(config.data.source, split, config.data.inputs, seed=config.data.seed)
        for split in SPLITS
    }
    assert all(splits.values())
    check_apart(splits, config.data.inputs)


def test_the_same_seed_gives_the_same_rows(task: Path) -> None:
    data = load_config([task, BACKENDS[0]]).data
    if reads_rows_from_elsewhere(data.source):
        pytest.skip("its rows are elsewhere: see test_domains_*.py")
    first, again = (read_split(data.source, "test", data.inputs, seed=3) for _ in range(2))
    assert [example.toDict() for example in first] == [example.toDict() for example in again]
