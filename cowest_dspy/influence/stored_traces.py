"""The traces of a collection: a list, or a sequence that is read from the run's store when it is
asked for.

Both are sequences of traces in the order of examples and drafts, and both say in ``saved`` what was
not asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, overload

from cowest_dspy.influence.report import InfluenceReport, failure_kind, format_kinds
from cowest_dspy.influence.trace import Trace
from cowest_dspy.store.store import Store
from cowest_dspy.utils import notebook
from cowest_dspy.utils.hiding import Hiding, hide_inputs, names_hidden_in

KIND = "trace"
Saved = dict[str, int]
"""``weak_calls`` and ``strong_calls``: drafts that were not sampled because there were enough, and
answers of the strong model that need not be asked, because of that or because drafts were equal."""


class HeldTraces(list[Trace]):
    """Traces in memory: those of a collection without a store."""

    saved: Saved

    def __repr__(self) -> str:
        return f"HeldTraces({len(self)} traces, {influence_report(self)})"

    def _repr_html_(self) -> str:
        """The traces in a notebook: their influence, and the first of them."""
        return _view(self, self.saved, ())


class StoredTraces(Sequence[Trace]):
    """The traces of a run, read from its store a few hundred at a time, as often as one iterates
    over them.

    They are there as long as the run's folder is, also when the store is closed. An index takes a
    pass over those before it.

    Args:
        store: the run's.
        round: only those of this round; all by default.
        types: of the program's outputs (``Collaboration.output_types``), by which answers become
            again what they were: pydantic models, enums, times. Without them they are in what JSON
            has.
    """

    def __init__(
        self, store: Store, *, round: int | None = None, types: Mapping[str, Any] | None = None
    ) -> None:
        self._store, self._start, self._types = store, "" if round is None else f"{round}/", types
        self.saved: Saved = {"weak_calls": 0, "strong_calls": 0}
        for key, record in store.records("saved").items():
            if round is None or key == str(round):
                self.saved = {
                    name: count + record.get(name, 0) for name, count in self.saved.items()
                }

    def __len__(self) -> int:
        return self._store.count(KIND, start=self._start)

    def __iter__(self) -> Iterator[Trace]:
        return (
            Trace.from_dict(value, self._types)
            for _, value in self._store.each(KIND, start=self._start)
        )

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
        return len(self) == len(other) and all(
            mine == theirs for mine, theirs in zip(self, other, strict=True)
        )

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    @property
    def hide(self) -> tuple[str, ...]:
        """The inputs that the run's configuration does not want shown ([report] hide)."""
        return names_hidden_in(self._store.folder)

    def __repr__(self) -> str:
        return f"StoredTraces({len(self)} traces, {influence_report(self)})"

    def _repr_html_(self) -> str:
        """The traces in a notebook: their influence, and the first of them; without the inputs that
        the run hides."""
        return _view(self, self.saved, self.hide)


Traces = StoredTraces | HeldTraces
"""The traces of a collection, with a store or without one: a sequence."""


def influence_report(traces: Iterable[Trace]) -> InfluenceReport:
    """The influences of traces: helped, hurt, same, failed by kind. Reads them once, and keeps two
    values of each."""
    values: list[float | None] = []
    examples: list[str] = []
    failures = Counter[str]()
    for trace in traces:
        if trace.error is not None:
            failures[failure_kind(trace.error)] += 1
        values.append(trace.influence)
        examples.append(trace.example_id)
    return InfluenceReport(tuple(values), tuple(examples), failures=dict(failures))


def _view(traces: Traces, saved: Saved, hide: tuple[str, ...]) -> str:
    """Reads them once, whatever their number, and keeps a few."""
    first: list[Trace] = []

    def noted() -> Iterator[Trace]:
        for trace in traces:
            if len(first) < notebook.MOST_ROWS:
                first.append(trace)
            yield trace

    report = influence_report(noted())
    counts = {
        "helped": report.helped,
        "same": report.same,
        "hurt": report.hurt,
        "failed": report.failed,
    }
    drafts, answers = (
        notebook.several(saved["weak_calls"], "draft"),
        notebook.several(saved["strong_calls"], "answer"),
    )
    spared = f"not asked, as there was no need: {drafts}, {answers}"
    return notebook.view(
        f"{notebook.several(len(report.values), 'trace')} of "
        f"{notebook.several(len(set(report.examples)), 'example')}",
        str(report),
        notebook.shares(counts),
        f"failed: {format_kinds(report.failures)}" if report.failures else None,
        spared if any(saved.values()) else None,
        notebook.table(
            _HEADS, [_row(trace, hide) for trace in first], texts=5, total=len(report.values)
        )
        if first
        else None,
    )


_HEADS = ("example", "input", "draft", "alone", "with the draft", "influence")


def _row(trace: Trace, hide: tuple[str, ...]) -> tuple[object, ...]:
    hiding = Hiding(hide)
    hiding.note(trace.example_id, trace.inputs)
    shown = hide_inputs(trace.inputs, hide)
    refined = {name: value for name, value in (trace.refined or {}).items() if name != "draft"}
    texts = (trace.draft or trace.completion, trace.alone or "", refined or "")
    rest = (hiding.shown(trace.example_id, one) for one in texts)
    last = notebook.signed(trace.influence)
    return (
        f"{trace.example_id}, {trace.draft_index}",
        *(notebook.said(_text(one), 160) for one in (shown, *rest)),
        last,
    )


def _text(value: object) -> str:
    """A text as it is; of several fields one line each, of one field its value."""
    if not isinstance(value, dict):
        return str(value)
    named = len(value) > 1
    return "\n".join(f"{name}: {one}" if named else str(one) for name, one in value.items())
