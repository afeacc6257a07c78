"""What a side-by-side view is made of: frozen facts of several runs, and as JSON. Nothing here
computes: numbers.py does."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from cowest_dspy.influence.statistics import Interval
from cowest_dspy.report.comparison import Paired
from cowest_dspy.report.model import sayable
from cowest_dspy.report.numbers import PairedTest

SCHEMA_VERSION, KIND = 1, "side by side"


@dataclasses.dataclass(frozen=True)
class ArmCell:
    """One arm of one run: ``score`` in [0, 1] over the ``n`` answered, with its 95 % interval;
    ``failed`` apart."""

    name: str
    title: str
    n: int
    failed: int
    score: float | None
    interval: Interval | None


@dataclasses.dataclass(frozen=True)
class RunColumn:
    """One run. ``tuning`` is the paired test of the arms before and after tuning; ``examples``
    counts its test examples.

    ``calls`` were made, ``cached`` came from the store; ``usd`` is US dollars, None where a price
    is not known.
    """

    name: str
    title: str
    created: str
    seed: int
    verdict: tuple[str, ...]
    good: bool | None
    warnings: tuple[str, ...]
    examples: int
    arms: tuple[ArmCell, ...]
    tuning: PairedTest | None
    rounds: tuple[str, ...]
    pairs: int | None
    calls: int
    cached: int
    tokens: int
    usd: float | None
    seconds: float
    models: dict[str, str]

    def arm(self, name: str) -> ArmCell | None:
        """The arm of that name, or None when the run has not evaluated it."""
        return next((arm for arm in self.arms if arm.name == name), None)


@dataclasses.dataclass(frozen=True)
class RunTest:
    """The run ``second`` against the run ``first``, on the arm that both are about and on the
    ``shared`` test examples.

    ``test`` goes from first to second: a difference above 0 says that the second is better.
    ``holm`` is its p, corrected over all tests of the view; ``finding`` 1 (better), -1 (worse) or 0
    (not distinguishable). Where they cannot be compared all three are None, and ``why`` says why.
    """

    first: str
    second: str
    arm: str
    shared: int
    test: Paired | None
    holm: float | None
    finding: int | None
    why: str = ""


@dataclasses.dataclass(frozen=True)
class SideBySide:
    """Runs in the order given. ``settings`` maps each key in which their configurations differ to
    its value in each run, in that order, as text; ``versions`` likewise. ``sentences`` say what the
    tests found."""

    runs: tuple[RunColumn, ...]
    tests: tuple[RunTest, ...]
    settings: dict[str, tuple[str, ...]]
    versions: dict[str, tuple[str, ...]]
    sentences: tuple[str, ...]

    @property
    def arms(self) -> dict[str, str]:
        """Names and titles of all arms, in order of appearance; a title that two arms have gets the
        arm's name into it."""
        titles: dict[str, str] = {}
        for run in self.runs:
            titles = {**{arm.name: arm.title for arm in run.arms}, **titles}
        ordered = dict.fromkeys(arm.name for run in self.runs for arm in run.arms)
        every = list(titles.values())
        return {
            name: f"{titles[name]} ({name})" if every.count(titles[name]) > 1 else titles[name]
            for name in ordered
        }

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, with ``schema_version`` and ``kind``."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND,
            **sayable(json.loads(json.dumps(dataclasses.asdict(self)))),
        }
