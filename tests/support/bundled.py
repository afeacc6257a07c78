"""A finished run of the toy task, its bundle, and a manifest that a forger has made to fit: for the tests of bundles."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import dspy
import pytest
from toy import engine as engine_table
from toy_experiment import RECIPE, TASK, cowest

from cowest_dspy import Experiment, TransformersEngine, load_config, tunable
from cowest_dspy.bundle.manifest import files_in

MORE = """
[rounds]
least_gain = -1.0
more_failures = 1.0
[cycle]
strategy = "sft -> weights -> shots"
[cycle.steps.shots]
optimizer = "LabeledFewShot"
target = "refine"
settings = { k = 1 }
"""


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of the toy task, with its recipe and TOML files beside it."""
    folder = tmp_path_factory.mktemp("bundled")
    (folder / "toy.py").write_text(RECIPE)
    (folder / "toy.toml").write_text(TASK.replace('controls = ["shuffled", "sft_on_chosen"]', "controls = []") + MORE)
    weak = f'[weak]\nkind = "in_process"\nmodel = "{tiny_model}"\nmax_tokens = 12\n'
    (folder / "backend.toml").write_text(weak + engine_table("strong"))
    with Experiment(load_config([folder / "toy.toml", folder / "backend.toml"]), folder / "run") as experiment:
        experiment.cycle()
    return folder


@pytest.fixture(scope="module")
def whole(finished: Path) -> Path:
    """Its bundle, moved away from the run."""
    cowest("bundle", str(finished / "run"), "--out", str(finished / "made"))
    return Path(shutil.move(finished / "made", finished / "moved"))


@pytest.fixture
def bundle(whole: Path, tmp_path: Path) -> Path:
    """A copy of the bundle, to be changed."""
    return Path(shutil.copytree(whole, tmp_path / "bundle"))


def weak_of(tiny_model: Path) -> dspy.LM:
    return tunable(TransformersEngine(tiny_model).lm(temperature=0.0, max_tokens=12))


def resealed(bundle: Path, **changes: Any) -> Path:
    """The bundle with its manifest made to fit what was changed, as a forger would; ``changes`` are other values in it."""
    manifest = json.loads((bundle / "cowest.json").read_text())
    (bundle / "cowest.json").write_text(json.dumps({**manifest, "files": files_in(bundle), **changes}))
    return bundle
