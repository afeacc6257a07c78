"""The state of a run at one moment, as a value: what the live display shows, ``cowest watch``
follows and ``--log json`` says.

Kept as ``progress.json`` in the run's folder. Times are ISO 8601 in UTC; ``usd`` is None where a
price is not known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from cowest_dspy.errors import DataError
from cowest_dspy.store.budget import Limit
from cowest_dspy.utils.reading import read_json

FILE = "progress.json"
"""The file in a run's folder."""
SCHEMA_VERSION = 1
State = Literal["running", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class StageDone:
    """A stage that has ended; ``failures`` counts failed calls and answers by kind. ``earlier``: in
    an earlier process, which it took all of what is said here, as the report has it. ``whole`` is
    False where it was left by an error or a stop."""

    name: str
    title: str
    seconds: float
    calls: int = 0
    cached: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    usd: float | None = 0.0
    failures: dict[str, int] = field(default_factory=dict)
    done: int = 0
    total: int | None = None
    earlier: bool = False
    whole: bool = True


@dataclass(frozen=True)
class StageNow:
    """A stage that is under way: ``done`` of ``total`` (None: not known) after ``seconds``;
    ``left`` is an estimate in seconds."""

    name: str
    title: str
    seconds: float
    done: int = 0
    total: int | None = None
    left: float | None = None


@dataclass(frozen=True)
class Best:
    """The best score on held-out examples so far: whose, in [0, 1], on how many that were
    answered."""

    name: str
    score: float
    n: int


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment.

    ``stages`` have ended, ``now`` are under way (the outermost first). ``calls``, ``cached``,
    ``tokens`` and ``failures`` are of this process; ``calls_kept`` is what the store has, and
    ``usd`` and ``limits`` are of the whole run. ``error`` says why it stopped or failed, ``signal``
    is the number of the signal that stopped it. ``command`` is what continues it. ``said`` are the
    last lines that people were told, of ``lines`` in all.
    """

    state: State
    updated: str
    pid: int
    host: str
    process_started: float
    started: str = ""
    run: str = ""
    task: str | None = None
    verb: str | None = None
    command: str | None = None
    stages: tuple[StageDone, ...] = ()
    now: tuple[StageNow, ...] = ()
    calls: int = 0
    calls_kept: int = 0
    cached: int = 0
    calls_per_second: float = 0.0
    tokens: int = 0
    usd: float | None = 0.0
    failures: dict[str, int] = field(default_factory=dict)
    limits: tuple[Limit, ...] = ()
    best: Best | None = None
    said: tuple[str, ...] = ()
    lines: int = 0
    verdict: str | None = None
    error: str | None = None
    signal: int | None = None
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def stage(self) -> StageNow | None:
        """The innermost stage that is under way."""
        return self.now[-1] if self.now else None

    @property
    def last(self) -> StageDone | None:
        """The stage that has ended last."""
        return self.stages[-1] if self.stages else None

    @property
    def left(self) -> StageDone | None:
        """The stage of this process that was left last, by an error or a stop."""
        return next(
            (one for one in reversed(self.stages) if not one.whole and not one.earlier), None
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Snapshot:
        """The inverse; what a newer version has added is passed over.

        Raises:
            ValueError: it is no state of a run.
        """
        try:
            return _ADAPTER.validate_python(dict(values))
        except (ValidationError, TypeError) as error:
            raise ValueError(f"not the state of a run: {error}") from error


_ADAPTER = TypeAdapter(Snapshot)


def read_snapshot(folder: Path) -> Snapshot | None:
    """What a run's folder says of its state; None where it says nothing, or nothing that can be
    read."""
    try:
        return Snapshot.from_dict(read_json(folder / FILE))
    except (DataError, ValueError):
        return None
