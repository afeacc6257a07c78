"""[tracking]: a run in MLflow, trackio and W&B while it goes on. A tracker can never stop a run.

    tracking = Tracking(config, store, print)
    tracking.update()            # when a stage begins
    tracking.finish(report)      # at the end, with files

Trackers are called in this process. The first exception of one, or an answer that takes longer than
[tracking] wait, is one line of warning; then the run goes on without it, and ``cowest track RUN``
tells it later. What a tracker has been told is recorded in the run's store, so that a run that is
continued is the same run there, and nothing is sent twice.
"""

from __future__ import annotations

import contextvars
import hashlib
import io
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, TypeVar

from cowest_dspy.errors import masked
from cowest_dspy.experiment.config import Config
from cowest_dspy.experiment.trackers import (
    TRACKERS,
    Status,
    Target,
    Tracker,
    check_installed,
    uri_of,
)
from cowest_dspy.experiment.tracking_facts import Part, gather, part_of, read_parts
from cowest_dspy.optimizers.run import Settings
from cowest_dspy.report import RunReport
from cowest_dspy.store.serialize import digest
from cowest_dspy.store.store import Store

Known = dict[str, Any]
"""The record of what was sent of a part: ``run`` (its id in the tracker), ``times`` (1: the first
training of it), ``training``, ``status``, ``texts``, ``metrics``, ``rows``."""
Made = TypeVar("Made")
QUIET = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_SILENT": "true",
}
"""Unless the environment says otherwise."""


class Tracking:
    """The trackers of a run. Where there is no [tracking], nothing happens at all.

    Args:
        config: the run's configuration.
        store: its store, where it is recorded what the trackers know.
        say: shows what went wrong, and where the run can be seen.
        on: whether [tracking] is looked at.

    Raises:
        ConfigError: the package of a tracker is not installed.
    """

    def __init__(
        self, config: Config, store: Store, say: Callable[[str], None], *, on: bool = True
    ) -> None:
        check_installed(config)
        self._config, self._store, self._say = config, store, say
        self._rules = config.tracking if on else None
        self._working = list(self._rules.to) if self._rules else []
        self._trackers: dict[str, Tracker] = {}
        self._begun = False

    def touch(self) -> None:
        """Note that there is something to send at the end."""
        self._begun = True

    def update(self) -> None:
        """Send what is new of the run."""
        self.touch()
        for tracker in list(self._working):
            self._call(tracker, lambda tracker=tracker: self._send(tracker, "RUNNING"))

    @contextmanager
    def training(self, name: str, settings: Settings) -> Iterator[Settings]:
        """A context for a training whose ``report_to`` names one of these trackers: its logs go
        into the run of its round there.

        Gives the settings to train with: without a tracker that does not answer.
        """
        part, going, variables = part_of(name), list(settings.report_to), dict[str, str]()
        run_name: str | None = None
        runs = ExitStack()

        def begin(tracker: str) -> tuple[str, str]:
            title, run_id = self._send(tracker, "RUNNING", begins=part)
            variables.update(self._trackers[tracker].variables(run_id))
            runs.enter_context(self._trackers[tracker].active(run_id))
            return title, run_id

        for tracker in settings.report_to:
            if self._rules is None or tracker not in self._rules.to:
                continue
            made = self._call(tracker, lambda tracker=tracker: begin(tracker))
            if made is None:
                going.remove(tracker)
            elif tracker == "trackio":  # It finds a run by its name.
                run_name = made[1]
            else:
                run_name = run_name or made[0]
        names = {"project": self._project, "run_name": run_name} if run_name else {}
        limits = self._limits if variables else {}
        with runs, _environment({**limits, **variables}):
            yield settings.model_copy(update={"report_to": tuple(going), **names})

    def close(self, report: Callable[[], RunReport], error: BaseException | None = None) -> None:
        """Send the rest, if anything was begun; with files, unless an error has ended the work."""
        if not (self._begun and self._working):
            return
        if error is not None:
            self.finish(None, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            return
        try:
            made = report()
        except Exception as problem:
            self._say(f"Warning: no report is tracked: {masked(str(problem))}")
            made = None
        self.finish(made)

    def finish(self, report: RunReport | None = None, status: Status = "FINISHED") -> bool:
        """Send all that there is, with files where there is a report. Gives whether all trackers
        have taken it."""

        def send(tracker: str, folder: Path, names: list[str]) -> str:
            _, run_id = self._send(tracker, status, report=report, last=True)
            self._upload(tracker, run_id, folder, names)
            return self._trackers[tracker].where(run_id)

        with tempfile.TemporaryDirectory() as folder:
            names = self._gather(report, Path(folder)) if report is not None else []
            for tracker in list(self._working):
                where = self._call(
                    tracker,
                    lambda tracker=tracker: send(tracker, Path(folder), names),
                    at_the_end=True,
                )
                if where:
                    self._say(f"tracked: {where}")
        return self._rules is None or len(self._working) == len(self._rules.to)

    def _call(
        self, tracker: str, work: Callable[[], Made], *, at_the_end: bool = False
    ) -> Made | None:
        """Do work that calls a tracker, and give its result; None where that has failed, now or
        before. The first failure is a warning, and the tracker is not called again.

        The work is done in a context of its own, so that a run that trackio or W&B is at in this
        process is left as it is.
        """
        if self._rules is None or tracker not in self._working:
            return None
        first, began, problem = tracker not in self._trackers, time.monotonic(), ""
        try:
            with _environment(self._limits), redirect_stdout(io.StringIO()):
                made = contextvars.Context().run(work)
            # The first call imports the tracker's package.
            if first or at_the_end or time.monotonic() - began <= 2 * self._rules.wait:
                return made
            problem = "it took too long ([tracking] wait)"
        except Exception as error:  # Whatever it is, it must not be what ends a run.
            problem = masked(f"{type(error).__name__}: {error}")[:400]
        self._working.remove(tracker)
        self._say(
            f"Warning: {tracker} was not told: {problem}. The run goes on; later, type "
            f"cowest track {self._store.folder}"
        )
        return None

    def _send(
        self,
        tracker: str,
        status: Status,
        *,
        begins: str = "",
        report: RunReport | None = None,
        last: bool = False,
    ) -> tuple[str, str]:
        """Sends what a tracker does not have yet.

        Args:
            tracker: its name.
            status: of the run.
            begins: the part whose training begins now; what is known of it is of an earlier one.
            report: for the verdict.
            last: every part is looked for there, also where nothing is new.

        Returns:
            Title and id of the run of the part that begins, or of the whole.
        """
        parts = read_parts(self._config, self._store, report)
        if begins:
            parts = [part for part in parts if part.name != begins] + [Part(begins)]
        made, parent = ("", ""), ""
        for part in parts:
            now: Status = "FINISHED" if part.done else status
            one = self._send_part(tracker, part, now, parent, begins=part.name == begins, last=last)
            parent = parent or one[1]
            made = one if part.name in ("", begins) else made
        return made

    def _send_part(
        self, tracker: str, part: Part, status: Status, parent: str, *, begins: bool, last: bool
    ) -> tuple[str, str]:
        record = f"{tracker} {self._destination(tracker)} {part.name}"
        known: Known = self._store.record("tracking", record) or {"times": 1, "training": None}
        another = part.training and known["training"] not in (None, part.training)
        if another or (begins and part.name and known["training"]):
            known = {"times": known["times"] + 1, "training": None, "before": known["run"]}
        known["training"] = part.training or known["training"]
        title = self._title + (f": {part.name}" if part.name else "")
        title += f" ({known['times']})" if known["times"] > 1 else ""
        if last or "run" not in known or _unsent(part, known) != Part(part.name):
            there = self._tracker(tracker)
            before = known.get("before")
            run_id = there.open(part.name, title, known["times"], before, parent)
            if run_id != known.get("run"):
                known = {key: known[key] for key in ("times", "training")} | {"run": run_id}
            news = _unsent(part, known)
            if news != Part(part.name) or known.get("status") != status:
                there.log(run_id, news, status)
            known |= {"status": status, "texts": {**part.params, **part.tags}}
            known |= {"metrics": part.metrics, "rows": part.rows}
            self._store.keep("tracking", record, known)
        return title, known["run"]

    def _upload(self, tracker: str, run_id: str, folder: Path, names: list[str]) -> None:
        record = f"{tracker} {self._destination(tracker)} files"
        known = self._store.record("tracking", record) or {}
        now = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
        before = known.get("files", {}) if known.get("run") == run_id else {}
        changed = [name for name, found in now.items() if before.get(name) != found]
        if changed:
            self._tracker(tracker).upload(run_id, folder, changed)
            self._store.keep("tracking", record, {"run": run_id, "files": before | now})

    def _gather(self, report: RunReport, folder: Path) -> list[str]:
        if not (self._working and self._rules and self._rules.artifacts):
            return []
        try:
            return gather(self._config, self._store.folder, report, folder)
        except Exception as error:
            self._say(f"Warning: files cannot be uploaded: {masked(str(error))}")
            return []

    def _tracker(self, name: str) -> Tracker:
        if name not in self._trackers:
            # All runs that trackers have of a run have its key.
            records = self._store.records("tracking").values()
            key = next((one["key"] for one in records if "key" in one), None)
            if key is None:
                key = uuid.uuid4().hex
                self._store.keep("tracking", "key", {"key": key})
            group = f"{self._title} [{key[:6]}]"
            uri = self._rules.uri if self._rules else None
            target = Target(self._project, uri, key, group, self._store.folder / "tracking")
            self._trackers[name] = TRACKERS[name](target)
        return self._trackers[name]

    @property
    def _limits(self) -> dict[str, str]:
        """Environment variables by which trackers are quick and quiet, but for those that are
        set."""
        wait = max(self._rules.wait, 1.0) if self._rules else 1.0
        limits = {"MLFLOW_HTTP_REQUEST_TIMEOUT": f"{wait:.0f}", **QUIET}
        return {name: value for name, value in limits.items() if name not in os.environ}

    @property
    def _project(self) -> str:
        return (self._rules.project if self._rules else None) or self._config.name

    @property
    def _title(self) -> str:
        given = self._rules.name if self._rules else None
        return given or f"{self._config.name}, seed {self._config.seed}"

    def _destination(self, tracker: str) -> str:
        """A digest of the server, folder and project that a tracker writes to."""
        folder = os.environ.get(f"{tracker.upper()}_DIR")
        return digest([uri_of(self._config) if tracker == "mlflow" else folder, self._project])


def _unsent(part: Part, known: Known) -> Part:
    """The part with what the tracker does not have yet."""

    def changed(values: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in values.items() if before.get(key) != value}

    texts, before = known.get("texts", {}), known.get("rows", {})
    rows = {step: changed(row, before.get(str(step), {})) for step, row in part.rows.items()}
    return Part(
        part.name,
        changed(part.params, texts),
        changed(part.tags, texts),
        changed(part.metrics, known.get("metrics", {})),
        {step: row for step, row in rows.items() if row},
    )


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """A context with these variables; afterwards all of the trackers' are as they were, also those
    that they set themselves."""
    if not variables:
        yield
        return
    before = _tracker_variables()
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in _tracker_variables():
            del os.environ[name]
        os.environ.update(before)


def _tracker_variables() -> dict[str, str]:
    names = ("MLFLOW_", "TRACKIO_", "WANDB_")
    return {name: value for name, value in os.environ.items() if name.startswith(names)}
