"""To MLflow, by its client: one run, with a nested run for each round and training. Used by the
sender's process only.

A server is asked what it has before it is told anything, so that a run that is logged again, or was
killed between the two, is not there twice. Nothing of MLflow's own state (an active run, an
experiment) is used or changed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cowest_dspy.errors import masked
from cowest_dspy.experiment.tracking import ledger as ledgers
from cowest_dspy.experiment.tracking.facts import Facts, Part

KEY, PART, TIMES = "cowest.key", "cowest.part", "cowest.times"
PARENT, SUPERSEDED = "mlflow.parentRunId", "cowest.superseded"
# What MLflow takes in one request.
METRICS, PARAMS_AND_TAGS = 1000, 100


def send(job: Mapping[str, Any]) -> dict[str, Any]:
    """Logs what the job says; gives the ledger as it is then, and where the run can be seen.

    Raises:
        Exception: whatever MLflow raises.
    """
    from mlflow import MlflowClient

    made = _Sending(MlflowClient(tracking_uri=job["uri"]), job)
    facts = Facts.from_json(job["facts"])
    parent = made.log(facts.title, facts.whole, None, job["status"])
    for part in ledgers.with_beginning(facts.parts, job["begins"]):
        made.log(facts.title, part, parent, "FINISHED" if part.done else job["status"])
    if job["files"]:
        made.upload(parent, Path(job["folder"]), job["files"])
    return {"ledger": made.ledger, "where": made.where(parent)}


class _Sending:
    """One sending: a client, the experiment, and the ledger."""

    def __init__(self, client: Any, job: Mapping[str, Any]) -> None:
        self.client, self.ledger, self._begins = client, job["ledger"], job["begins"]
        self.experiment = self._experiment(job["project"])

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                return self.client.create_experiment(name)
            except MlflowException:  # Another run has made it meanwhile; otherwise there is none still, and it is said below.
                found = self.client.get_experiment_by_name(name)
                if found is None:
                    raise
        if found.lifecycle_stage != "active":
            raise ValueError(
                f'MLflow\'s experiment "{name}" is deleted: restore it there, or give another '
                "[tracking] project"
            )
        return found.experiment_id

    def log(self, title: str, part: Part, parent: str | None, status: str) -> str:
        """Brings a part's run up to date; gives its id."""
        known, before = ledgers.entry(self.ledger, part, begins=part.name == self._begins)
        if before and before["run"]:
            self._supersede(before["run"])
        called = ledgers.title_of(title, part, known)
        run = self._run(called, part, parent, known)
        if run.info.run_name == ledgers.unique(called, self.ledger):
            # A training that reports by itself, to trackio too, has one name for all.
            self.client.update_run(run.info.run_id, name=called)
        known["run"] = run.info.run_id
        data = run.data
        params = {key: value for key, value in part.params.items() if key not in data.params}
        # A parameter of MLflow's is there for good: what was changed since the run began is said
        # beside it.
        tags = {
            f"changed.{key}": value
            for key, value in part.params.items()
            if data.params.get(key, value) != value
        } | part.tags
        tags = {key: value for key, value in tags.items() if data.tags.get(key) != value}
        self._batches(run.info.run_id, params, tags, list(self._metrics(run, part)))
        self._set_status(run, status)
        return run.info.run_id

    def _run(self, title: str, part: Part, parent: str | None, known: Mapping[str, Any]) -> Any:
        run = self._found(part, known)
        if run is not None:
            return run
        tags = {KEY: self.ledger["key"], PART: part.name or "whole", TIMES: str(known["times"])}
        if parent is not None:
            tags[PARENT] = parent
        tags |= {"mlflow.source.name": "cowest", "mlflow.source.type": "JOB"}
        return self.client.create_run(self.experiment, tags=tags, run_name=title)

    def _found(self, part: Part, known: Mapping[str, Any]) -> Any:
        """The part's run by its id, or by its tags where the id got lost, or is of another
        server."""
        from mlflow.exceptions import MlflowException

        if known["run"]:
            try:
                run = self.client.get_run(known["run"])
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
            else:
                if (
                    run.info.lifecycle_stage == "active"
                    and run.info.experiment_id == self.experiment
                ):
                    return run
        tags = {KEY: self.ledger["key"], PART: part.name or "whole", TIMES: str(known["times"])}
        wanted = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
        runs = self.client.search_runs([self.experiment], filter_string=wanted, max_results=1)
        return runs[0] if runs else None

    def _supersede(self, run: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self.client.set_tag(run, SUPERSEDED, "true")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise

    def _metrics(self, run: Any, part: Part) -> Iterator[Any]:
        """What the run does not have yet. A number that holds for all of it has another point when
        it has changed."""
        from mlflow.entities import Metric

        now, has = int(time.time() * 1000), run.data.metrics
        for key, value in part.metrics.items():
            if key not in has or not _same(has[key], value):
                yield Metric(key, value, now, 0)
        history: dict[str, dict[int, list[float]]] = {}
        for row in part.rows:
            for key, value in row.values.items():
                if key in has and key not in history:
                    history[key] = self._history(run.info.run_id, key)
                if not any(_same(one, value) for one in history.get(key, {}).get(row.step, [])):
                    yield Metric(key, value, now, row.step)

    def _history(self, run: str, key: str) -> dict[int, list[float]]:
        made: dict[int, list[float]] = {}
        for metric in self.client.get_metric_history(run, key):
            made.setdefault(metric.step, []).append(metric.value)
        return made

    def _batches(
        self, run: str, params: Mapping[str, str], tags: Mapping[str, str], metrics: Sequence[Any]
    ) -> None:
        from mlflow.entities import Param, RunTag

        for some in _chunks([Param(key, value) for key, value in params.items()], PARAMS_AND_TAGS):
            self.client.log_batch(run, params=some)
        for some in _chunks([RunTag(key, value) for key, value in tags.items()], PARAMS_AND_TAGS):
            self.client.log_batch(run, tags=some)
        for some in _chunks(metrics, METRICS):
            self.client.log_batch(run, metrics=some)

    def _set_status(self, run: Any, status: str) -> None:
        if run.info.status == status:
            return
        if status == "RUNNING":
            self.client.update_run(run.info.run_id, status=status)
        else:
            self.client.set_terminated(run.info.run_id, status)

    def upload(self, run: str, folder: Path, names: list[str]) -> None:
        """Uploads the files that have changed, under the names that they have in the folder."""
        for name, found in ledgers.changed_files(self.ledger, folder, names).items():
            place = str(Path(name).parent)
            self.client.log_artifact(run, str(folder / name), None if place == "." else place)
            self.ledger["files"][name] = found

    def where(self, run: str) -> str:
        """The page of a run on a server; otherwise its id and the address of the store."""
        uri = masked(self.client.tracking_uri)
        if uri.startswith("http"):
            return f"{uri.rstrip('/')}/#/experiments/{self.experiment}/runs/{run}"
        return f"run {run} in {uri}"


def _same(one: float, other: float) -> bool:
    """Databases round."""
    return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12)


def _chunks(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])
