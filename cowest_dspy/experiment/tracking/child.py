"""A sender's process, as seen from here: a job is given to it, and its answer is waited for as long
as one likes."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[2]
# The environment has the last word. MLflow's own are two minutes and seven retries.
DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_SILENT": "true",
}


class Child:
    """One process for one tracker, started with the first job. A job is a file of JSON in
    ``folder``."""

    def __init__(
        self, tracker: str, folder: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.tracker, self._folder, self._environment = tracker, folder, dict(environment or {})
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[dict[str, Any]] = queue.Queue()
        self.busy = False

    @property
    def pid(self) -> int | None:
        """The id of the process, while there is one."""
        return self._process.pid if self._process else None

    def give(self, job: Mapping[str, Any]) -> None:
        """Hands a job over; only to a child that is not busy."""
        assert not self.busy
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / f"{self.tracker}.json"
        file.write_text(json.dumps(job), encoding="utf-8")
        if self._process is None or self._process.poll() is not None:
            self._start()
        process = self._process
        assert process is not None and process.stdin is not None
        self.busy = True
        try:
            process.stdin.write(f"{file.absolute()}\n")
            process.stdin.flush()
        except OSError:
            self._answers.put({"error": _DIED})

    def answer(self, seconds: float = 0.0) -> dict[str, Any] | None:
        """The answer to the job under way; None when there is none after so many seconds."""
        with contextlib.suppress(queue.Empty):
            made = self._answers.get(timeout=seconds) if seconds > 0 else self._answers.get_nowait()
            self.busy = False
            return made
        return None

    def end(self) -> None:
        """Ends the process, whatever it is at, and takes its files away."""
        process, self._process = self._process, None
        if process is not None:
            if process.stdin is not None:
                with contextlib.suppress(OSError):
                    process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.0 if self.busy else 5.0)
            if process.poll() is None:
                process.kill()
            process.wait()
        self.busy = False
        (self._folder / f"{self.tracker}.json").unlink(missing_ok=True)

    def _start(self) -> None:
        given = {**DEFAULTS, **os.environ, **self._environment}
        given["PYTHONPATH"] = os.pathsep.join(filter(None, [given.get("PYTHONPATH"), str(PACKAGE)]))
        # Of a training that reports by itself: this process has its own.
        given.pop("MLFLOW_RUN_ID", None)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "cowest_dspy.experiment.tracking.sender"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env=given,
            # Ctrl-C is for us: what is under way here is finished, or ended, when we end.
            start_new_session=True,
        )
        self._answers = queue.Queue()
        threading.Thread(target=_read, args=(self._process, self._answers), daemon=True).start()


_DIED = "its process died"


def _read(process: subprocess.Popen[str], answers: queue.Queue[dict[str, Any]]) -> None:
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            answers.put(json.loads(line))
    answers.put({"error": _DIED})
