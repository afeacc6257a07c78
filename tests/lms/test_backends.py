"""One program object, any backend: the files load, and models of different kinds get byte-equal
prompts and fill equal fields."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dspy
import pytest
from served import llama_cpp_engine

from cowest_dspy import Collaboration, Experiment, build_lm, load_config
from cowest_dspy.errors import TuningError
from cowest_dspy.experiment.config import Config
from cowest_dspy.experiment.data import read_split
from cowest_dspy.influence.metric import attempt
from cowest_dspy.lms import ServerEngine
from cowest_dspy.lms.config import KINDS
from cowest_dspy.store.call_context import listening
from cowest_dspy.utils.importing import load

ROOT = Path(__file__).parents[2]
HANDBOOK = ROOT / "programs/handbook.toml"
BACKENDS = sorted((ROOT / "programs/backends").glob("*.toml"))
SCRIPTED = ROOT / "programs/backends/scripted.toml"


def test_there_is_a_backend_for_every_place_where_models_run() -> None:
    assert {"in_process", "hub", "llama_cpp", "vllm", "openai", "ollama", "scripted"} <= {
        path.stem for path in BACKENDS
    }


@pytest.mark.parametrize("path", BACKENDS, ids=lambda path: path.stem)
def test_every_backend_fits_the_handbook_and_says_when_to_use_it(path: Path) -> None:
    config = load_config([HANDBOOK, path])
    assert isinstance(config.weak, tuple(KINDS.values())) and isinstance(
        config.strong, tuple(KINDS.values())
    )
    assert path.read_text().startswith("# ") and len(path.read_text().splitlines()) <= 40


# The same program object on every backend


@dataclass(frozen=True)
class Heard:
    """What a program asked of its models, prompt by prompt, and the fields of the whole
    predictions."""

    prompts: list[tuple[dict[str, str], ...]]
    fields: list[list[str]]


@pytest.fixture(scope="module")
def program() -> Collaboration:
    return load(load_config([HANDBOOK, SCRIPTED]).program)()


@pytest.fixture(params=["in_process", pytest.param("llama_cpp", marks=pytest.mark.slow)])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Config]:
    """A configuration whose models, weak and strong, are of a kind."""
    if request.param == "llama_cpp":
        engine = llama_cpp_engine(request.getfixturevalue("real_models"), parallel=1, context=8192)
        values = engine.settings.model_dump(mode="json", exclude_none=True)
        lines = "\n".join(
            f"{key} = {json.dumps(value)}" for key, value in (values | {"max_tokens": 8}).items()
        )
        (tmp_path / "llama_cpp.toml").write_text(f"[weak]\n{lines}\n[strong]\n{lines}\n")
        config = load_config([HANDBOOK, tmp_path / "llama_cpp.toml"])
        yield config
        for engine in {
            id(lm.engine): lm.engine for lm in (build_lm(config.weak), build_lm(config.strong))
        }.values():
            assert isinstance(engine, ServerEngine)
            engine.close()
        return
    tiny = Path(shutil.copytree(request.getfixturevalue("tiny_model"), tmp_path / "tiny"))
    settings = json.loads((tiny / "config.json").read_text())
    # The worked examples of the handbook are longer than its 512 tokens; a rotary model computes
    # beyond its length, if badly.
    (tiny / "config.json").write_text(json.dumps({**settings, "max_position_embeddings": 8192}))
    table = 'kind = "in_process"\nmodel = "./tiny"\nmax_tokens = 8\n'
    (tmp_path / "tiny.toml").write_text(f"[weak]\n{table}[strong]\n{table}")
    yield load_config([HANDBOOK, tmp_path / "tiny.toml"])


def heard(program: Collaboration, weak: dspy.LM, strong: dspy.LM, finishing: dspy.LM) -> Heard:
    """Each step asked of ``weak`` and ``strong`` with the same draft, and whole predictions that
    ``finishing`` refines.

    A random model writes in no form, so that what it answers may not parse; what it was asked is
    compared all the same.
    """
    bound = program.bind(weak=weak, strong=strong)
    prompts: list[tuple[dict[str, str], ...]] = []
    fields: list[list[str]] = []
    for inputs in questions():
        steps: list[Callable[[], dspy.Prediction]] = [
            lambda inputs=inputs: dspy.Prediction(draft=bound.ask_draft(**inputs).draft),
            lambda inputs=inputs: bound.ask_refine("The Raven holds 40 litres of oil.", **inputs),
            lambda inputs=inputs: bound.ask_alone(**inputs),
        ]
        prompts.extend(call.messages for step in steps for call in attempt(step).calls)
        fields.append(sorted(program.bind(weak=weak, strong=finishing)(**inputs).keys()))
    return Heard(prompts, fields)


def questions() -> list[dict[str, Any]]:
    data = load_config([HANDBOOK, SCRIPTED]).data
    return [
        dict(row.inputs().items())
        for row in read_split(data.source, "dev", data.inputs, seed=0, limit=3)
    ]


def test_the_same_program_asks_every_backend_the_same_bytes_and_fills_the_same_fields(
    program: Collaboration, backend: Config
) -> None:
    rules = load_config([HANDBOOK, SCRIPTED])
    weak, strong = build_lm(rules.weak), build_lm(rules.strong)
    by_rule = heard(program, weak, strong, strong)
    by_backend = heard(program, build_lm(backend.weak), build_lm(backend.strong), strong)
    assert len(by_rule.prompts) == 9 and by_backend.prompts == by_rule.prompts
    assert by_backend.fields == by_rule.fields == [["answer", "draft", "working"]] * 3


def test_binding_changes_no_program(program: Collaboration, backend: Config) -> None:
    before = program.dump_state()
    bound = program.bind(weak=build_lm(backend.weak), strong=build_lm(backend.strong))
    assert program.dump_state() == before == bound.dump_state()
    assert all(predictor.lm is None for predictor in program.predictors())


# The rules that stand in for models


@pytest.fixture
def trial(tmp_path: Path) -> Config:
    """The handbook with a few of its questions, on rules."""
    source = ROOT / "programs/handbook.py"
    (tmp_path / "few.toml").write_text(
        f'[data]\nsource = "{source}:examples"\ninputs = ["question"]\ntrain = 40\ndev = 1\ntest '
        "= 40\n"
    )
    return load_config([HANDBOOK, SCRIPTED, tmp_path / "few.toml"])


def test_on_rules_a_run_goes_as_far_as_tuning_and_says_so(trial: Config, tmp_path: Path) -> None:
    with Experiment(trial, tmp_path / "run") as experiment:
        traces = experiment.collect()
        assert len(traces) == 160 and not [trace for trace in traces if trace.error]
        assert len(experiment.pairs()) >= trial.pairs.least
        arms = {
            arm.name: [answer.score or 0 for answer in arm.answers]
            for arm in experiment.evaluate(["strong", "oracle", "weak"])
        }
        assert sum(arms["oracle"]) > sum(arms["strong"]), (
            "whoever calculates needs to be told the facts"
        )
        assert experiment.ask(question="May the Raven run at 25 bar?").answer in ("yes", "no")
        assert experiment.report().arms
        with pytest.raises(TuningError, match="in_process"):
            experiment.tune()


def test_the_drafter_repeats_itself_for_a_seed_and_not_for_another() -> None:
    lm = build_lm(load_config([HANDBOOK, SCRIPTED]).weak)
    with listening() as calls:
        program = load(load_config([HANDBOOK, SCRIPTED]).program)()
        for seed in (1, 2, 3, 4, 1):
            program.bind(weak=lm.copy(seed=seed)).ask_draft(question="May the Raven run at 25 bar?")
    texts = [call.text for call in calls]
    assert texts[0] == texts[-1] and len(set(texts)) > 1
    assert all("a guess" in text or "Nothing is known" in text for text in texts)
