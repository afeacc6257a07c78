"""write_bundle: from a finished run to a folder. Nothing is asked and nothing is trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from cowest_dspy.errors import BundleError, masked
from cowest_dspy.experiment import Experiment
from cowest_dspy.experiment.bundle.card import card
from cowest_dspy.experiment.bundle.manifest import (
    ADAPTER,
    FILE,
    FORMAT,
    RECIPE,
    Manifest,
    files_in,
    open_bundle,
    read_manifest,
)
from cowest_dspy.experiment.config import Config, split_reference
from cowest_dspy.experiment.config_text import effective_toml
from cowest_dspy.experiment.summary import load_pairs, package_versions
from cowest_dspy.lms.local import weights
from cowest_dspy.optimizers.router import ROUTER_FILE
from cowest_dspy.pairs import PreferencePairs
from cowest_dspy.pairs.hub import upload
from cowest_dspy.report import RunReport
from cowest_dspy.report.figures import figures
from cowest_dspy.store.record import unrecorded
from cowest_dspy.tuning import engine_of
from cowest_dspy.tuning.train import ADAPTER_FILES
from cowest_dspy.utils.files import replace_folder, workplace


def write_bundle(experiment: Experiment, folder: str | Path) -> Path:
    """Writes what a finished run ended with into ``folder``, whole or not at all; a bundle that is
    there is replaced.

    What processes have left that were killed while they wrote to the same place goes.

    Raises:
        BundleError: the run is not finished; the folder holds something else; a pair or a demo
            holds what looks like a secret.
    """
    target = Path(folder).resolve()
    if target.is_file():
        raise BundleError(f"{folder} is a file: it is not overwritten. Give a folder.")
    if target.exists() and any(target.iterdir()):
        read_manifest(target)
    if experiment.store.record("arm", "collaboration") is None:
        raise BundleError(
            f"{experiment.run} is not finished: run `cowest cycle` on it first, which goes on "
            "where it stood."
        )
    with workplace(target) as work:
        _fill(work / "bundle", experiment)
        replace_folder(work / "bundle", target)
    return Path(folder)


def push_bundle(
    bundle: str | Path, repo_id: str, *, private: bool = True, token: str | None = None
) -> str:
    """Uploads a bundle as the Hub model ``repo_id``; gives its address. It is private unless
    ``private=False``.

    Raises:
        BundleError: no bundle, or one that was changed or holds more; the Hub refuses or cannot be
            reached; or ``private`` is wanted of a model that is public.
    """
    manifest = open_bundle(bundle).manifest
    return upload(
        Path(bundle),
        repo_id,
        kind="model",
        message=f"{manifest.name}",
        private=private,
        token=token,
        error=BundleError,
    )


def _fill(folder: Path, experiment: Experiment) -> None:
    folder.mkdir()
    config, program, report = experiment.config, experiment.final, experiment.report()
    engine = engine_of(experiment.weak)
    base, adapter = (
        weights.locate(engine.base_folder),
        engine.adapter_folder(unrecorded(program.weak).model),
    )
    moved = _relocated(config, folder / RECIPE)
    _write(folder / "config.toml", effective_toml(moved))
    _write(folder / "program.json", _json(program.dump_state()))
    _write(folder / "metrics.json", _json(_metrics(report)))
    if (experiment.run / ROUTER_FILE).is_file():
        _write(folder / ROUTER_FILE, (experiment.run / ROUTER_FILE).read_text(encoding="utf-8"))
    pairs = (load_pairs(experiment.store) or PreferencePairs(())).save(folder / "pairs.jsonl")
    _write(pairs, pairs.read_text(encoding="utf-8"))
    if adapter is not None:
        (folder / ADAPTER).mkdir()
        for name in ADAPTER_FILES:
            shutil.copyfile(Path(adapter) / name, folder / ADAPTER / name)
    manifest = Manifest(
        format=FORMAT,
        name=config.name,
        seed=config.seed,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        base=base.name,
        base_hash=weights.folder_hash(base),
        adapter=weights.adapter_hash(folder / ADAPTER) if adapter is not None else None,
        weak=program.weak.model,
        strong=masked(program.strong.model),
        program=moved.program,
        metric=moved.metric,
        versions=package_versions(),
        files={},
    )
    _write(folder / "README.md", card(manifest, report))
    manifest = manifest.model_copy(update={"files": files_in(folder)})
    (folder / FILE).write_text(_json(manifest.model_dump()), encoding="utf-8")


def _metrics(report: RunReport) -> dict[str, Any]:
    """Every number of the report, and what rounds and steps brought."""
    facts = report.to_json()
    pairs = facts["pairs"] or {}
    return {
        **figures(report).to_json(),
        "rounds": facts["rounds"],
        "steps": facts["steps"],
        "noise": facts["noise"],
        "agreement": facts["agreement"],
        "pairs": {key: pairs[key] for key in ("kept", "examples", "dropped") if key in pairs},
    }


def _relocated(config: Config, recipe: Path) -> Config:
    """The configuration with its recipes copied into the bundle and named there, and every other
    path by its last part."""
    copied: dict[str, str] = {}

    def named(value: str) -> str:
        path, colon, name = split_reference(value)
        if not Path(path).is_absolute():
            return value
        if not path.endswith(".py"):
            return Path(path).name + colon + name
        if path not in copied:
            recipe.mkdir(exist_ok=True)
            # Some file systems do not tell capitals from small letters, and a manifest has only
            # names that can be read.
            taken = {name.casefold() for name in copied.values()}
            own = "".join(
                char if char.isprintable() and char != "\\" else "_" for char in Path(path).name
            )
            own = own if own.casefold() not in taken else f"{len(taken)}_{own}"
            _write(recipe / own, Path(path).read_text(encoding="utf-8"))
            copied[path] = own
        return f"{RECIPE}/{copied[path]}{colon}{name}"

    return Config.model_validate(_with_strings(config.model_dump(mode="json"), named))


def _with_strings(value: Any, change: Callable[[str], str]) -> Any:
    """The same tables and lists with every string changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {
            key: _with_strings(item, change) for key, item in cast("dict[str, Any]", value).items()
        }
    return (
        [_with_strings(item, change) for item in cast("list[Any]", value)]
        if isinstance(value, list)
        else value
    )


def _json(value: Any) -> str:
    try:
        text = (
            json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True, allow_nan=False) + "\n"
        )
        text.encode()  # Half of a surrogate pair, which a model may have answered, is an error.
        return text
    except ValueError as error:
        raise BundleError(
            f"A demo or a number of the run cannot be written as JSON, so no bundle was: {error}."
        ) from error


def _write(path: Path, text: str) -> None:
    if masked(text) != text:
        raise BundleError(
            f"{path.name} would hold what looks like a secret, an API key for instance: no bundle "
            "was written."
        )
    path.write_text(text, encoding="utf-8")
