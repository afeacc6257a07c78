"""A finished run of the toy task and its bundle; a small bundle without a run; and a manifest that
a forger has made to fit: for the tests of bundles."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import dspy
import pytest
from command_line import cowest
from tiny import make_adapter
from toy import engine as engine_table
from toy_experiment import RECIPE, TASK

from cowest_dspy import Collaboration
from cowest_dspy.experiment.bundle import FORMAT, Manifest, files_in
from cowest_dspy.lms import LocalEngine
from cowest_dspy.lms.local.weights import adapter_hash, folder_hash
from cowest_dspy.tuning import tunable
from cowest_dspy.tuning.train import ADAPTER_FILES


@pytest.fixture(scope="session")
def finished(finished_toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of the toy task, with its recipe and TOML files beside it: a
    copy, which tests may open."""
    return Path(shutil.copytree(finished_toy, tmp_path_factory.mktemp("copied") / "toy"))


@pytest.fixture(scope="session")
def whole(finished: Path) -> Path:
    """Its bundle, moved away from the run."""
    cowest("bundle", str(finished / "run"), "--out", str(finished / "made"))
    return Path(shutil.move(finished / "made", finished / "moved"))


@pytest.fixture
def bundle(whole: Path, tmp_path: Path) -> Path:
    """A copy of the bundle, to be changed."""
    return Path(shutil.copytree(whole, tmp_path / "bundle"))


def weak_of(tiny_model: Path) -> dspy.LM:
    return tunable(LocalEngine(tiny_model).lm(temperature=0.0, max_tokens=12))


def resealed(bundle: Path, **changes: Any) -> Path:
    """The bundle with its manifest made to fit what was changed, as a forger would; ``changes`` are
    other values in it."""
    manifest = json.loads((bundle / "cowest.json").read_text())
    (bundle / "cowest.json").write_text(
        json.dumps({**manifest, "files": files_in(bundle), **changes})
    )
    return bundle


def small_bundle(folder: Path, base: Path) -> Path:
    """A bundle of the toy task with an adapter of random weights, as ``write_bundle`` would lay it
    out."""
    (folder / "recipe").mkdir(parents=True)
    (folder / "recipe" / "toy.py").write_text(RECIPE)
    made = make_adapter(base, folder.with_name("adapter"), seed=1)
    for name in ADAPTER_FILES:
        shutil.copyfile(made / name, folder / name)
    (folder / "config.toml").write_text(
        TASK.replace('"toy.py:', '"recipe/toy.py:') + engine_table("weak") + engine_table("strong")
    )
    state = Collaboration("question -> answer", draft="knowledge").dump_state()
    for name, text in (
        ("program.json", json.dumps(state)),
        ("metrics.json", "{}"),
        ("pairs.jsonl", ""),
        ("README.md", "A card."),
    ):
        (folder / name).write_text(text)
    manifest = Manifest(
        format=FORMAT,
        name="toy",
        seed=0,
        created="2026-01-01T00:00:00+00:00",
        base=base.name,
        base_hash=folder_hash(base),
        adapter=adapter_hash(folder),
        weak="local/tiny",
        strong="scripted/strong",
        program="recipe/toy.py:program",
        metric="recipe/toy.py:match",
        versions={},
        files=files_in(folder),
    )
    (folder / "cowest.json").write_text(json.dumps(manifest.model_dump()))
    return folder
