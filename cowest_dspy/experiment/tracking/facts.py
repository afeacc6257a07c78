"""What a tracker is told of a run: plain facts, the same for every tracker, which go to its process
as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

Number = int | float


@dataclass(frozen=True)
class Row:
    """Numbers at one step: an optimiser step of a training, the number of a round, or that of a
    candidate of a cycle."""

    step: int
    values: dict[str, float]


@dataclass(frozen=True)
class Part:
    """A run in a tracker: the run as a whole (``name`` is "" then), or one of its rounds ("round
    2") or trainings ("drafts").

    ``metrics`` are numbers that hold for all of it, ``rows`` those that go over steps. ``training``
    names the training that the part has done, by what it depends on; another one is another run in
    the tracker. ``done``: nothing will be added.
    """

    name: str
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    rows: tuple[Row, ...] = ()
    training: str | None = None
    done: bool = False


@dataclass(frozen=True)
class Facts:
    """A run as it is now. ``title`` names it for people, ``parts`` are its rounds and trainings, in
    order."""

    title: str
    whole: Part
    parts: tuple[Part, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Facts:
        """The inverse of :meth:`to_json`."""
        return cls(
            values["title"], _part(values["whole"]), tuple(_part(part) for part in values["parts"])
        )


def _part(values: Mapping[str, Any]) -> Part:
    return Part(**{**values, "rows": tuple(Row(**row) for row in values["rows"])})


def numbers(prefix: str = "", /, **values: Number | None) -> dict[str, float]:
    """Those of ``values`` that are finite numbers, under ``prefix``.

    >>> numbers("gain/", mean=0.5, low=None, n=3)
    {'gain/mean': 0.5, 'gain/n': 3.0}
    """
    return {
        f"{prefix}{name}": float(value)
        for name, value in values.items()
        if value is not None and math.isfinite(value)
    }
