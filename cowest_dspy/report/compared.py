"""The facts of `cowest compare`: arms that answered the same examples, frozen and JSON-able, and
the paired test of two of them.

Nothing here computes but that test: compare.py does. An arm under several seeds is several
``ComparedArm`` with the same ``arm.name``.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter

from cowest_dspy.errors import ReportError
from cowest_dspy.report.facts import STRICT, Arm, Stage, dump, load
from cowest_dspy.report.significance import REPEATS, PairedTest, compare_seeds
from cowest_dspy.utils.notebook import html_of

SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True)
class ComparedArm:
    """One arm under one seed. ``extra`` maps the name of a further score to its value over the
    corpus; None: not computable.

    ``extra_intervals`` holds their 95 % intervals (low, high) where they are known. ``cost`` is
    what this arm's calls took; None where it was not measured.
    """

    arm: Arm
    seed: int = 0
    extra: dict[str, float | None] = dataclasses.field(default_factory=dict)
    extra_intervals: dict[str, tuple[float, float] | None] = dataclasses.field(default_factory=dict)
    cost: Stage | None = None

    def __post_init__(self) -> None:
        for name, value in self.extra.items():
            if value is not None and not math.isfinite(value):
                raise ReportError(
                    f'Score "{name}" of arm "{self.arm.name}" is {value}: give a finite number, '
                    "or None."
                )
        for name, ends in self.extra_intervals.items():
            if name not in self.extra:
                raise ReportError(
                    f'Arm "{self.arm.name}" has an interval of "{name}", which is none of its '
                    f"scores {list(self.extra)}."
                )
            if ends is not None and not (
                math.isfinite(ends[0]) and math.isfinite(ends[1]) and ends[0] <= ends[1]
            ):
                raise ReportError(
                    f'The interval of "{name}" of arm "{self.arm.name}" is {ends}: give (low, '
                    "high), both finite."
                )


@dataclasses.dataclass(frozen=True)
class SweepPoint:
    """One point of an ablation: ``settings`` (dotted key -> value, as JSON has values), and the arm
    that was measured there.

    ``pairs`` is the number of preference pairs that it was tuned on. The same settings under
    several seeds are several points.
    """

    settings: dict[str, Any]
    arm: ComparedArm
    pairs: int | None = None

    @property
    def key(self) -> str:
        """The settings as one text, the same for the same settings in another order."""
        return json.dumps(self.settings, sort_keys=True, default=str)


@dataclasses.dataclass(frozen=True, repr=False)
class Comparison:
    """Arms that answered the same examples. ``against`` names the arm that all others are tested
    against; ``metric`` is a name.

    ``target`` names the arm that has to beat its controls: the arms whose name begins with
    "control", or whose note says so. ``controls`` says of each tuned arm by name which arms are its
    controls, such as those of its own format of drafts; where it is empty, all controls are the
    target's. A name may stand here before its arm has been evaluated. ``created`` is an ISO 8601
    time.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    title: str
    created: str
    against: str
    metric: str
    arms: tuple[ComparedArm, ...]
    sweep: tuple[SweepPoint, ...] = ()
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    target: str = "collaboration"
    controls: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        _refuse_twins([(f'Arm "{one.arm.name}"', one.seed) for one in self.arms])
        _refuse_twins([(f"The sweep's point {point.key}", point.arm.seed) for point in self.sweep])

    def __repr__(self) -> str:
        arms = len({one.arm.name for one in self.arms})
        return (
            f"Comparison({self.title!r}, {arms} arms against {self.against!r}, "
            f"{len(self.sweep)} points of a sweep)"
        )

    def _repr_html_(self) -> str:
        """The comparison in a notebook."""
        return html_of(self)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values with ``schema_version``; see ``facts.dump``."""
        return dump(_ADAPTER, self, SCHEMA_VERSION)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Comparison:
        """The comparison in a parsed comparison.json; see ``facts.load``."""
        return load(_ADAPTER, document, SCHEMA_VERSION, 'Write it again with "cowest compare".')


def _refuse_twins(found: list[tuple[str, int]]) -> None:
    seen = set[tuple[str, int]]()
    for what, seed in found:
        if (what, seed) in seen:
            raise ReportError(f"{what} is there twice under seed {seed}: give each seed once.")
        seen.add((what, seed))


def paired_test(
    arm: Sequence[ComparedArm],
    other: Sequence[ComparedArm],
    *,
    strict: bool = False,
    repeats: int = REPEATS,
) -> PairedTest:
    """One arm (its seeds) against another on the examples that both have a score for; ``strict``
    scores a failure 0. See ``significance.compare_seeds``."""
    mine, theirs = (
        [(run.seed, run.arm.scores(strict=strict)) for run in runs] for runs in (arm, other)
    )
    return compare_seeds(mine, theirs, repeats=repeats)


_ADAPTER = TypeAdapter(Comparison)
