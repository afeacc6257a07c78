"""MLflow, trackio and W&B: whether they are installed and answer, and how a run is sent to each."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from typing_extensions import override

from cowest_dspy.errors import masked
from cowest_dspy.experiment.config import Config
from cowest_dspy.experiment.tracking_facts import Part
from cowest_dspy.utils.extras import check_extra, describe_missing

Level = Literal["ok", "warning", "error"]
Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]


def check_installed(config: Config) -> None:
    """Look for the packages of [tracking] to, without importing them.

    Raises:
        ConfigError: one is not installed.
    """
    for tracker in config.tracking.to if config.tracking else ():
        check_extra(tracker, f"[tracking] to {tracker}")


def check_trackers(config: Config) -> list[tuple[str, Level, str]]:
    """Each tracker of the configuration, whether its package is there and a server of MLflow's
    answers, and what to do."""
    made: list[tuple[str, Level, str]] = []
    for tracker in config.tracking.to if config.tracking else ():
        if missing := describe_missing(tracker, f"[tracking] to {tracker}"):
            made.append((tracker, "error", missing))
        elif tracker == "mlflow":
            made.append(("mlflow", *_look_at_mlflow(uri_of(config))))
        else:
            made.append((tracker, "ok", "is installed"))
    return made


def uri_of(config: Config) -> str | None:
    """Where MLflow is: [tracking] uri, or MLFLOW_TRACKING_URI; None is MLflow's own choice."""
    given = config.tracking.uri if config.tracking else None
    return given or os.environ.get("MLFLOW_TRACKING_URI") or None


def _look_at_mlflow(uri: str | None) -> tuple[Level, str]:
    import httpx

    if uri is None or not uri.startswith("http"):
        where = masked(uri) if uri else "where MLflow does by default"
        return ("ok", f"is installed; it writes to {where}")
    try:
        answer = httpx.get(f"{uri.rstrip('/')}/health", timeout=5.0)
        if answer.is_success:
            return ("ok", f"{masked(uri)} answers")
        problem = f"says {answer.status_code}"
    except httpx.HTTPError as error:
        problem = f"does not answer ({type(error).__name__})"
    later = "a run would go on without it; start it, and cowest track RUN logs it later"
    return ("warning", f"{masked(uri)} {problem}: {later}")


@dataclass(frozen=True)
class Target:
    """Where a run is logged: the project, MLflow's server, the key that all of its parts have
    there, the name of their group, and a folder for W&B's files."""

    project: str
    uri: str | None
    key: str
    group: str
    folder: Path


class Tracker(Protocol):
    """One of the three. A part of a run is a run of its own there, with an id."""

    def open(self, part: str, title: str, times: int, before: str | None, parent: str) -> str:
        """The id of the part's run, which is made when it is not there. ``before`` is the id of the
        run that it supersedes, ``parent`` that of the whole."""
        ...

    def log(self, run_id: str, new: Part, status: Status) -> None:
        """Log what the run does not have yet."""
        ...

    def upload(self, run_id: str, folder: Path, names: list[str]) -> None:
        """Upload files of a folder under their names in it."""
        ...

    def where(self, run_id: str) -> str:
        """What to type, or where to look, to see the run."""
        ...

    def variables(self, run_id: str) -> dict[str, str]:
        """Environment variables by which TRL's own logs go into a run."""
        ...

    def active(self, run_id: str) -> AbstractContextManager[Any]:
        """A context in which TRL's own logs of this process go into a run."""
        return nullcontext()


class MLflow(Tracker):
    """MLflow, by its client: a run, with a nested run for each round and training. Its own state
    (an active run, an experiment) is neither used nor changed. A run is found by its tags."""

    def __init__(self, target: Target) -> None:
        from mlflow import MlflowClient

        self._client: Any = MlflowClient(tracking_uri=target.uri)
        self._target, project = target, target.project
        self._runs: dict[str, Any] = {}
        found = self._client.get_experiment_by_name(project)
        if found is not None and found.lifecycle_stage != "active":
            raise ValueError(
                f'MLflow\'s experiment "{project}" is deleted: restore it there, or give another '
                "[tracking] project"
            )
        self._experiment = found.experiment_id if found else self._client.create_experiment(project)

    @override
    def open(self, part: str, title: str, times: int, before: str | None, parent: str) -> str:
        tags = {"cowest.key": self._target.key, "cowest.part": part or "whole"}
        tags["cowest.times"] = str(times)
        wanted = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
        found = self._client.search_runs([self._experiment], wanted, max_results=1)
        if found:
            run = found[0]
            if run.info.run_name != title:  # TRL renames a run that it logs into.
                self._client.update_run(run.info.run_id, name=title)
        else:
            tags |= {"mlflow.source.name": "cowest", "mlflow.source.type": "JOB"}
            tags |= {"mlflow.parentRunId": parent} if part else {}
            run = self._client.create_run(self._experiment, tags=tags, run_name=title)
            if before:
                self._client.set_tag(before, "cowest.superseded", "true")
        self._runs[run.info.run_id] = run
        return run.info.run_id

    @override
    def log(self, run_id: str, new: Part, status: Status) -> None:
        from mlflow.entities import Metric, Param, RunTag

        run = self._runs[run_id]
        has, now = run.data.params, int(time.time() * 1000)
        params = [Param(key, text) for key, text in new.params.items() if key not in has]
        # MLflow keeps a parameter for good: what was changed since then is a tag.
        changed = {f"changed.{k}": v for k, v in new.params.items() if has.get(k, v) != v}
        tags = [RunTag(key, text) for key, text in {**changed, **new.tags}.items()]
        metrics = [
            Metric(key, value, now, 0)
            for key, value in new.metrics.items()
            if run.data.metrics.get(key) != value
        ]
        # The same point at the same time is one point, however often it is sent.
        metrics += [
            Metric(key, value, run.info.start_time + step, step)
            for step, row in new.rows.items()
            for key, value in row.items()
        ]
        for kind, items, most in (
            ("params", params, 100),
            ("tags", tags, 100),
            ("metrics", metrics, 1000),  # As many as MLflow takes in one request.
        ):
            for start in range(0, len(items), most):
                self._client.log_batch(run_id, **{kind: items[start : start + most]})
        if status == "RUNNING":
            self._client.update_run(run_id, status=status)
        else:
            self._client.set_terminated(run_id, status)

    @override
    def upload(self, run_id: str, folder: Path, names: list[str]) -> None:
        for name in names:
            place = str(Path(name).parent)
            self._client.log_artifact(run_id, str(folder / name), None if place == "." else place)

    @override
    def where(self, run_id: str) -> str:
        uri = masked(self._client.tracking_uri)
        if uri.startswith("http"):
            return f"{uri.rstrip('/')}/#/experiments/{self._experiment}/runs/{run_id}"
        return f"run {run_id} in {uri}"

    @override
    def variables(self, run_id: str) -> dict[str, str]:
        made = {
            "MLFLOW_RUN_ID": run_id,
            "MLFLOW_EXPERIMENT_NAME": self._target.project,
            "MLFLOW_NESTED_RUN": "true",
            "MLFLOW_MAX_LOG_PARAMS": "0",  # Those that were chosen are in the run already.
            "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        }
        uri = self._target.uri
        return made | ({"MLFLOW_TRACKING_URI": uri} if uri else {})


class Trackio(Tracker):
    """trackio: a run for each part, all in one group. It cannot be asked what it has, and finds a
    run by its name, which ends in a part of the key."""

    def __init__(self, target: Target) -> None:
        import trackio

        self._api: Any = trackio
        self._target = target

    @override
    def open(self, part: str, title: str, times: int, before: str | None, parent: str) -> str:
        return f"{title} [{self._target.key[:6]}]"

    def _init(self, run_id: str, config: dict[str, str]) -> Any:
        return self._api.init(
            project=self._target.project,
            name=run_id,
            group=self._target.group,
            config=config,
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    @override
    def log(self, run_id: str, new: Part, status: Status) -> None:
        run = self._init(run_id, {**new.params, **new.tags})
        for step, row in new.rows.items():
            run.log(row, step=step)
        if new.metrics:
            run.log(new.metrics)
        run.finish()

    @override
    def upload(self, run_id: str, folder: Path, names: list[str]) -> None:
        _upload_artifact(lambda: self._init(run_id, {}), folder, names, self._target.key)

    @override
    def where(self, run_id: str) -> str:
        return f'trackio show --project "{self._target.project}"'

    @override
    def variables(self, run_id: str) -> dict[str, str]:
        from trackio.utils import TRACKIO_DIR

        return {"TRACKIO_DIR": str(TRACKIO_DIR)}


class Wandb(Tracker):
    """W&B: a run for each part, all in one group. It cannot be asked what it has."""

    def __init__(self, target: Target) -> None:
        import wandb

        self._api: Any = wandb
        self._target, self._url = target, ""
        self._titles: dict[str, str] = {}
        self._folder = os.environ.get("WANDB_DIR") or str(target.folder.absolute())

    @override
    def open(self, part: str, title: str, times: int, before: str | None, parent: str) -> str:
        identity = f"{self._target.key} {part} {times}"
        run_id = hashlib.sha256(identity.encode()).hexdigest()[:16]
        self._titles[run_id] = title
        return run_id

    def _init(self, run_id: str, config: dict[str, str], reinit: str = "create_new") -> Any:
        # What W&B looks up by itself about the machine, its commands and its code is left out:
        # nobody has masked it.
        settings = self._api.Settings(
            console="off",
            silent=True,
            disable_git=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
            init_timeout=30,
        )
        Path(self._folder).mkdir(parents=True, exist_ok=True)
        run = self._api.init(
            project=self._target.project,
            name=self._titles[run_id],
            id=run_id,
            group=self._target.group,
            config=config,
            dir=self._folder,
            resume="allow",
            reinit=reinit,
            settings=settings,
        )
        run.config.update(config, allow_val_change=True)
        for key in ("training/*", "held_out/*", "rounds/*", "cycle/*"):
            run.define_metric(key, step_metric="step")
        self._url = self._url or run.url or ""
        return run

    @override
    def log(self, run_id: str, new: Part, status: Status) -> None:
        run = self._init(run_id, {**new.params, **new.tags})
        for step, row in new.rows.items():
            run.log({**row, "step": step})
        if new.metrics:
            run.summary.update(new.metrics)
        run.finish()

    @override
    def upload(self, run_id: str, folder: Path, names: list[str]) -> None:
        _upload_artifact(lambda: self._init(run_id, {}), folder, names, self._target.key)

    @override
    def where(self, run_id: str) -> str:
        return self._url or f"wandb sync {self._folder}/wandb/offline-run-*"

    @override
    def variables(self, run_id: str) -> dict[str, str]:
        return {
            "WANDB_PROJECT": self._target.project,
            "WANDB_RUN_ID": run_id,
            "WANDB_RESUME": "allow",
            "WANDB_DIR": self._folder,
        }

    @override
    def active(self, run_id: str) -> AbstractContextManager[Any]:
        # W&B reads its variables once in a process; TRL logs into a run that is active. One of the
        # user's own is left alone.
        return nullcontext() if self._api.run else self._init(run_id, {}, reinit="default")


def _upload_artifact(init: Callable[[], Any], folder: Path, names: list[str], key: str) -> None:
    """Upload a folder as an artifact, unless only the report was written again."""
    if set(names) - {"report.html", "report.json"}:
        run = init()
        run.log_artifact(str(folder), name=f"cowest-{key[:6]}", type="cowest-run")
        run.finish()


TRACKERS: dict[str, Callable[[Target], Tracker]] = {
    "mlflow": MLflow,
    "trackio": Trackio,
    "wandb": Wandb,
}
