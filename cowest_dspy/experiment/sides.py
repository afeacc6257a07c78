"""The report of a run's folder as the run is now: from its store, and from its report.json where
there is no store to read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from cowest_dspy.errors import ConfigError, ReportError, StoreError, nearest
from cowest_dspy.experiment.config import load_config
from cowest_dspy.experiment.summary import run_report
from cowest_dspy.report import RunReport, read_report
from cowest_dspy.store.store import Store

STORE, CONFIG, REPORT = "run.sqlite", "config.toml", "report.json"


def read_run(path: Path) -> RunReport:
    """The report of a run: ``path`` is its folder, or a report.json. Nothing is written into the
    folder's files of results.

    A run that another process works on is read from the report.json that it has written before; a
    warning in the report says so.

    Raises:
        ReportError: there is no such run, or what is there cannot be read; it names ``path`` and
            says what to type.
    """
    if not path.exists():
        other = nearest(str(path), (str(one) for one in path.parent.glob("*") if one.is_dir()))
        raise ReportError(
            f"There is no run at {path}.{other} Name the folders of runs, such as runs/handbook: "
            "`ls runs` shows yours."
        )
    if path.is_file():
        return read_report(path)
    if (path / STORE).is_file() and (path / CONFIG).is_file():
        return _from_store(path)
    if (path / REPORT).is_file():
        return read_report(path)
    raise ReportError(
        f"{path} is no run's folder: there is neither {STORE} with {CONFIG} nor {REPORT} in it. "
        f"`cowest cycle ... --run {path}` "
        "makes a run there."
    )


def _from_store(path: Path) -> RunReport:
    try:
        config = load_config([path / CONFIG])
    except ConfigError as error:
        raise ReportError(
            f"The run {path} cannot be read, its configuration is damaged: {error}"
        ) from error
    try:
        with Store(path) as store:
            return run_report(config, store)
    except StoreError as error:
        if "in use by another process" not in str(error) or not (path / REPORT).is_file():
            raise ReportError(f"The run {path} cannot be read: {error}") from error
    report = read_report(path)
    said = f"The run is being worked on; this is what its report of {report.created} says."
    return dataclasses.replace(report, warnings=(*report.warnings, said))


def names_of(paths: Sequence[Path]) -> list[str]:
    """A short name for each path, all of them different: the last part of a path, and as many
    before it as are needed.

    >>> names_of([Path("runs/a/handbook"), Path("runs/b/handbook"), Path("runs/tools")])
    ['a/handbook', 'b/handbook', 'tools']

    Raises:
        ReportError: the same run twice.
    """
    parts = [(path.parent if path.name == REPORT else path).resolve().parts for path in paths]
    for place, one in enumerate(parts):
        if one in parts[:place]:
            raise ReportError(f"The run {paths[place]} is named twice: name each run once.")
    names = []
    for one in parts:
        size = 1
        while size < len(one) and any(
            other != one and other[-size:] == one[-size:] for other in parts
        ):
            size += 1
        names.append("/".join(part.strip("/") for part in one[-size:]))
    return names
