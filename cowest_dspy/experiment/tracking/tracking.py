"""Tracking: tells a run's trackers of it, while it goes on and when a command ends, and never waits
long for them."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from cowest_dspy.errors import CowestError, masked
from cowest_dspy.experiment.config import Config
from cowest_dspy.experiment.tracking import ledger as ledgers
from cowest_dspy.experiment.tracking.checking import check_installed, uri_of
from cowest_dspy.experiment.tracking.child import Child
from cowest_dspy.experiment.tracking.facts import Part
from cowest_dspy.experiment.tracking.files import gather
from cowest_dspy.experiment.tracking.reading import Reading, round_part
from cowest_dspy.optimizers.run import Settings, Watch
from cowest_dspy.report import RunReport
from cowest_dspy.store.serialize import digest
from cowest_dspy.store.store import Store
from cowest_dspy.tuning import reporting

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]
FOLDER = "tracking"
STOPPING = 15.0
"""Seconds that an interrupted command waits for a tracker, at most."""


class Tracking:
    """The trackers of a run. Where there is no [tracking], nothing happens at all.

    Whatever goes wrong is said in one line, once for each tracker, and the run goes on; ``cowest
    track RUN`` tells them later.

    Args:
        config: the run's configuration.
        store: its store; what the trackers know of the run is kept there.
        watch: who is told what went wrong, and where the run can be seen.
        on: whether [tracking] is looked at.

    Raises:
        ConfigError: the package of a tracker is not installed.
    """

    def __init__(self, config: Config, store: Store, watch: Watch, *, on: bool = True) -> None:
        check_installed(config)
        self._config, self._store, self._watch = config, store, watch
        self._rules, self._warned = config.tracking if on else None, set[str]()
        self._folder = store.folder / FOLDER
        self._children: dict[str, Child] = {}
        self._where: dict[str, str] = {}
        self._begun = False
        if self._rules is not None:
            self._reading = Reading(config, store)
            self._children = {
                name: Child(name, self._folder, self._places()) for name in self._rules.to
            }

    def touch(self) -> None:
        """Says that there is something to tell at the end."""
        self._begun = bool(self._children)

    def update(self) -> None:
        """Tells the trackers how the run is now, without waiting; one that is busy is told more the
        next time."""
        self.touch()
        idle = [child for child in self._children.values() if not child.busy or self._heard(child)]
        if idle and (facts := self._facts()) is not None:
            for child in idle:
                self._give(child, facts, "RUNNING")

    @contextmanager
    def training(self, name: str, settings: Settings) -> Iterator[Settings]:
        """A context for a training whose ``report_to`` names one of these trackers: its logs go
        into the run of its round there.

        Gives the settings to train with: without a tracker that does not answer.
        """
        ours = [tracker for tracker in settings.report_to if tracker in self._children]
        part, going, variables = round_part(name), list(settings.report_to), dict[str, str]()
        called: tuple[str, str] | None = None
        for tracker in ours:
            answer = self._begin(self._children[tracker], part)
            if answer is None:
                going.remove(tracker)
                continue
            known = answer["ledger"]["parts"][part]
            variables |= self._variables(tracker, known["run"], answer.get("folder", ""))
            if tracker == "trackio":  # It finds a run by its name.
                called = (self._project, known["run"])
            called = called or (
                self._project,
                ledgers.title_of(self._reading.title, Part(part), known),
            )
        with _environment(variables), reporting.called(called):
            yield settings.model_copy(update={"report_to": tuple(going)})

    def close(self, report: Callable[[], RunReport], error: BaseException | None = None) -> None:
        """Tells the trackers the rest, if anything was begun; with files, unless an error has ended
        the work."""
        if not self._begun:
            return
        if error is not None:
            self.finish(None, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            return
        try:
            made = report()
        except CowestError as problem:
            self._watch.say(f"Warning: no report is tracked: {problem}")
            made = None
        self.finish(made)

    def finish(self, report: RunReport | None = None, status: Status = "FINISHED") -> bool:
        """Tells the trackers all that there is, waits for them as long as [tracking] wait says, and
        ends their processes.

        With a report, files are uploaded too. Gives whether all trackers have taken it.
        """
        if not self._children:
            return True
        wait = self._rules.wait if self._rules else 0.0
        deadline = time.monotonic() + (wait if status == "FINISHED" else min(wait, STOPPING))
        try:
            return self._finish(report, status, deadline)
        finally:
            for child in self._children.values():
                child.end()
            shutil.rmtree(self._folder / "files", ignore_errors=True)
            if self._folder.is_dir() and not any(self._folder.iterdir()):
                self._folder.rmdir()

    def _finish(self, report: RunReport | None, status: Status, deadline: float) -> bool:
        facts = self._facts(report)
        names = self._gathered(report) if report is not None and facts is not None else []
        taken = facts is not None
        for child in self._children.values():
            if child.busy and not self._heard(child, deadline - time.monotonic()):
                self._late(child)
                taken = False
            elif facts is not None:
                self._give(child, facts, status, files=names)
        for child in self._children.values():
            if child.busy and not self._heard(child, max(0.1, deadline - time.monotonic())):
                self._late(child)
            answered = child.tracker in self._where and child.tracker not in self._warned
            taken = taken and answered
            if answered:
                self._watch.say(f"tracked: {self._where[child.tracker]}")
        return taken

    # With a child

    def _give(
        self,
        child: Child,
        facts: dict[str, Any],
        status: Status,
        *,
        begins: str = "",
        files: list[str] | None = None,
    ) -> None:
        place = self._place(child.tracker)
        ledger = self._store.record("tracking", child.tracker)
        if ledger is None or ledger.get("place") != place:
            known = next(
                iter(self._store.records("tracking").values()), None
            )  # All trackers of a run have one key.
            ledger = ledgers.new(place, known["key"] if known else None)
            self._store.keep("tracking", child.tracker, ledger)
        job = {
            "tracker": child.tracker,
            "project": self._project,
            "uri": self._rules.uri
            if self._rules
            else None,  # That of the environment may hold a password, and is read there.
            "facts": facts,
            "ledger": ledger,
            "status": status,
            "begins": begins,
            "folder": str((self._folder / "files").absolute()),
            "files": files or [],
        }
        try:
            child.give(job)
        except OSError as error:
            self._warn(child.tracker, f"{type(error).__name__}: {error}")

    def _heard(self, child: Child, seconds: float = 0.0) -> dict[str, Any] | None:
        """The child's answer, if there is one by then: what it says is kept, or warned of."""
        answer = child.answer(seconds)
        if answer is None:
            return None
        if "error" in answer:
            self._warn(child.tracker, answer["error"])
        else:
            self._store.keep("tracking", child.tracker, answer["ledger"])
            self._where[child.tracker] = answer["where"]
            self._warned.discard(child.tracker)
        return answer

    def _begin(self, child: Child, part: str) -> dict[str, Any] | None:
        """The answer to: a training of this part begins. None when the tracker does not answer."""
        deadline = time.monotonic() + (self._rules.wait if self._rules else 0.0)
        if child.busy and not self._heard(child, deadline - time.monotonic()):
            self._late(child)
            return None
        facts = self._facts()
        if facts is None:
            return None
        self._give(child, facts, "RUNNING", begins=part)
        answer = self._heard(child, max(0.1, deadline - time.monotonic()))
        if answer is None:
            self._late(child)
        return answer if answer and "error" not in answer else None

    def _late(self, child: Child) -> None:
        child.end()
        self._warn(child.tracker, "it took too long ([tracking] wait)")

    def _warn(self, tracker: str, what: str) -> None:
        if tracker not in self._warned:
            self._warned.add(tracker)
            command = f"cowest track {self._store.folder}"
            self._watch.say(
                f"Warning: {tracker} was not told: {masked(what)}. The run goes on; later, type "
                f"{command}"
            )

    # What is told

    def _facts(self, report: RunReport | None = None) -> dict[str, Any] | None:
        try:
            return self._reading.facts(report).to_json()
        except (
            Exception
        ) as error:  # Tracking must not be what ends a run, whatever is wrong with it.
            for tracker in self._children:
                self._warn(tracker, f"{type(error).__name__}: {error}")
            return None

    def _gathered(self, report: RunReport) -> list[str]:
        if self._rules is None or not self._rules.artifacts:
            return []
        shutil.rmtree(self._folder / "files", ignore_errors=True)
        try:
            return gather(self._config, self._store.folder, report, self._folder / "files")
        except OSError as error:
            self._watch.say(f"Warning: files cannot be uploaded: {masked(str(error))}")
            return []

    @property
    def _project(self) -> str:
        return (self._rules.project if self._rules else None) or self._config.name

    def _place(self, tracker: str) -> str:
        """Where a tracker keeps the run; in another place it knows nothing of it."""
        where = (
            uri_of(self._config)
            if tracker == "mlflow"
            else os.environ.get(f"{tracker.upper()}_DIR")
        )
        return digest([where, self._project])

    def _places(self) -> dict[str, str]:
        """W&B writes into the working directory unless it is told otherwise."""
        folder = os.environ.get("WANDB_DIR") or str(self._folder.absolute())
        if self._rules and "wandb" in self._rules.to:
            Path(folder).mkdir(parents=True, exist_ok=True)
        return {"WANDB_DIR": folder}

    def _variables(self, tracker: str, run: str, folder: str) -> dict[str, str]:
        """What has a training's own logs go into a run that is there already."""
        if tracker == "mlflow":
            made = {
                "MLFLOW_RUN_ID": run,
                "MLFLOW_EXPERIMENT_NAME": self._project,
                "MLFLOW_NESTED_RUN": "true",
            }
            # Of the hundreds of parameters that a trainer has, those that were chosen are in the
            # run's own.
            made |= {"MLFLOW_DISABLE_TELEMETRY": os.environ.get("MLFLOW_DISABLE_TELEMETRY", "true")}
            made |= {"MLFLOW_MAX_LOG_PARAMS": "0", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}
            return made | (
                {"MLFLOW_TRACKING_URI": self._rules.uri} if self._rules and self._rules.uri else {}
            )
        if tracker == "trackio":
            return {"TRACKIO_DIR": folder}
        return {
            "WANDB_PROJECT": self._project,
            "WANDB_RUN_ID": run,
            "WANDB_RESUME": "allow",
            "WANDB_DIR": folder,
        }


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """A context with these variables; afterwards all of the trackers' are as they were, also those
    that they set themselves."""
    if not variables:
        yield
        return
    before = _of_trackers()
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in _of_trackers():
            del os.environ[name]
        os.environ.update(before)


def _of_trackers() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(("MLFLOW_", "TRACKIO_", "WANDB_"))
    }
