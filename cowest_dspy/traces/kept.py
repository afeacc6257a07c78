"""The traces of a collection: a list, or a sequence that is read from the run's store when it is asked for.

Both are sequences of traces in the order of examples and drafts, and both say in ``saved`` what was not asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import overload

from cowest_dspy.store import Store
from cowest_dspy.traces.trace import Trace

KIND = "trace"
Saved = dict[str, int]
"""``weak_calls`` and ``strong_calls``: drafts that were not sampled because there were enough, and answers of the strong model
that need not be asked, because of that or because drafts were equal."""


class HeldTraces(list[Trace]):
    """Traces in memory: those of a collection without a store."""

    saved: Saved


class StoredTraces(Sequence[Trace]):
    """The traces of a run, read from its store a few hundred at a time, as often as one iterates over them.

    They are there as long as the run's folder is, also when the store is closed. An index takes a pass over those before it.

    Args:
        store: the run's.
        round: only those of this round; all by default.
    """

    def __init__(self, store: Store, *, round: int | None = None) -> None:
        self._store, self._start = store, "" if round is None else f"{round}/"
        self.saved: Saved = {"weak_calls": 0, "strong_calls": 0}
        for key, record in store.records("saved").items():
            if round is None or key == str(round):
                self.saved = {name: count + record.get(name, 0) for name, count in self.saved.items()}

    def __len__(self) -> int:
        return self._store.count(KIND, start=self._start)

    def __iter__(self) -> Iterator[Trace]:
        return (Trace.from_dict(value) for _, value in self._store.each(KIND, start=self._start))

    @overload
    def __getitem__(self, index: int) -> Trace: ...
    @overload
    def __getitem__(self, index: slice) -> list[Trace]: ...
    def __getitem__(self, index: int | slice) -> Trace | list[Trace]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step > 0:
                return list(islice(self, start, stop, step))
            return list(self)[index]
        place = index if index >= 0 else index + len(self)
        found = next(islice(self, place, None), None) if place >= 0 else None
        if found is None:
            raise IndexError(f"There is no trace {index}: there are {len(self)}.")
        return found

    def __eq__(self, other: object) -> bool:
        """Equal to any sequence of equal traces."""
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # pyright: ignore[reportAssignmentType]


Traces = StoredTraces | HeldTraces
"""The traces of a collection, with a store or without one: a sequence."""
