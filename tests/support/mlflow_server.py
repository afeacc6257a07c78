"""A real MLflow server on 127.0.0.1 with SQLite, ended with all that it has started; nothing of it
is left."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from cowest_dspy.utils.processes import end_group, free_port

STARTUP = 120.0


@contextmanager
def mlflow_server(folder: Path, port: int | None = None) -> Iterator[str]:
    """The address of a server whose runs and files are in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    url = f"http://127.0.0.1:{(port := port or free_port())}"
    command = [
        *(
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--workers",
            "1",
        ),
        *(
            "--backend-store-uri",
            f"sqlite:///{folder}/mlflow.db",
            "--artifacts-destination",
            str(folder / "artifacts"),
        ),
    ]
    quiet = {
        **os.environ,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=folder, env=quiet, start_new_session=True
        )
    try:
        deadline = time.monotonic() + STARTUP
        while not _answers(url):
            assert process.poll() is None, (folder / "server.log").read_text()
            assert time.monotonic() < deadline, (folder / "server.log").read_text()
            time.sleep(0.2)
        yield url
    finally:
        end_group(process)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2, trust_env=False).is_success
    except httpx.TransportError:
        return False


class Seen:
    """What the server has of an experiment, asked with a client of its own."""

    def __init__(self, url: str, experiment: str) -> None:
        from mlflow import MlflowClient

        self.client = MlflowClient(url)
        found = self.client.get_experiment_by_name(experiment)
        assert found is not None
        self.runs = list(
            self.client.search_runs([found.experiment_id], order_by=["attributes.start_time"])
        )

    def named(self, name: str) -> Any:
        (run,) = [run for run in self.runs if run.info.run_name == name]
        return run

    def points(self, run: Any, key: str) -> list[tuple[int, float]]:
        return sorted(
            (one.step, one.value) for one in self.client.get_metric_history(run.info.run_id, key)
        )

    def every_point(self) -> dict[str, list[tuple[int, float]]]:
        return {
            f"{run.info.run_name} {key}": self.points(run, key)
            for run in self.runs
            for key in run.data.metrics
        }
