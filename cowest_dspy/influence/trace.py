"""Trace: one draft of one example with everything that is needed to audit it; Traces, those of a
collection; Sampling, how drafts are sampled."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice
from typing import Annotated, Any, ClassVar, overload

from pydantic import ConfigDict, Field

from cowest_dspy.errors import ReportError
from cowest_dspy.influence.report import InfluenceReport, format_kinds
from cowest_dspy.store.store import Store
from cowest_dspy.utils import notebook
from cowest_dspy.utils.hiding import Hiding, hide_inputs, names_hidden_in
from cowest_dspy.utils.jsonable import restore_fields

KIND = "trace"
"""The kind of the store's records that are traces."""
FIRST_DRAFTS = 2
"""Drafts with which an adaptive collection begins: with fewer there is no pair."""
HOPELESS = 0.25
"""A smaller chance that a draft still to come differs in influence is not sampled for."""


@dataclass(frozen=True)
class Trace:
    """One draft of one example, with everything that is needed to audit it.

    Scores are in [0, 1], influence in [-1, 1]. ``influence`` is None when there is an ``error``
    ("kind: text"), and a score is None where there is no answer to score. ``draft_score`` is the
    score of the draft as an answer, where it holds one. ``tokens`` has weak_in, weak_out,
    strong_in, strong_out; like ``usd`` (US dollars, None where a price is not known) they are of
    drafting and of refining this draft, without alone and without a judge. ``feedback`` is what the
    metric said of the refined answer.

    With several answers each (``collect(answers=m)``), ``refined_score`` and ``alone_score`` are
    the means of ``refined_scores`` and ``alone_scores``, and ``refined`` and ``alone`` are the
    first of them. One that failed fails the whole. ``refined_parts`` and ``alone_parts`` are the
    scores of each evaluator where there are several (``Weighted``), means too.

    ``requests`` has the keys, in the run's store, of what was asked for "draft", "alone" and
    "refine": of the last call of each, where it took several.
    """

    example_id: str
    draft_index: int
    round: int
    inputs: dict[str, Any]
    gold: dict[str, Any]
    prompt: tuple[dict[str, str], ...]
    completion: str
    draft: str
    refined: dict[str, Any] | None
    alone: dict[str, Any] | None
    refined_score: float | None
    alone_score: float | None
    influence: float | None
    draft_score: float | None
    weak_model: str
    strong_model: str
    tokens: dict[str, int] = field(default_factory=dict)
    error: str | None = None
    feedback: str = ""
    usd: float | None = None
    refined_scores: tuple[float, ...] = ()
    alone_scores: tuple[float, ...] = ()
    refined_parts: dict[str, float] = field(default_factory=dict)
    alone_parts: dict[str, float] = field(default_factory=dict)
    requests: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.influence is None) == (self.error is None):
            raise ReportError(
                f'Draft {self.draft_index} of "{self.example_id}" has influence '
                f"{self.influence!r} and error {self.error!r}: give either an influence in "
                "[-1, 1], or influence=None with its error."
            )

    @property
    def key(self) -> str:
        """The key in a store: round, example and draft."""
        return f"{self.round}/{self.example_id}/{self.draft_index}"

    def to_dict(self) -> dict[str, Any]:
        """The trace as data; shares what is in it."""
        return {name: getattr(self, name) for name in _FIELDS}

    @classmethod
    def from_dict(cls, values: dict[str, Any], types: Mapping[str, Any] | None = None) -> Trace:
        """The inverse of :meth:`to_dict`, also after a round trip through JSON, where ``types`` has
        the types of the program's outputs (``Collaboration.output_types``); without them answers
        stay in what JSON has."""
        answers = {name: restore_fields(values[name], types or {}) for name in ("refined", "alone")}
        return cls(
            **{
                **values,
                **answers,
                **{name: tuple(values[name]) for name in _TUPLES if name in values},
            }
        )


_FIELDS = tuple(one.name for one in fields(Trace))
_TUPLES = ("prompt", "refined_scores", "alone_scores")


@dataclass(frozen=True)
class Sampling:
    """How drafts are sampled: ``drafts`` per example, at a temperature and top_p, from a seed.

    ``adaptive``: two drafts first, then one at a time, until two of them differ in influence by the
        ``margin`` that a pair needs, or until it is not worth while (:meth:`enough`). Drafts keep
        their index and seed: an adaptive run's are the first of the full run's.
    """

    # What a dictionary that is given in its place is checked by.
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    drafts: Annotated[int, Field(ge=1)] = 4
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: int = 0
    round: Annotated[int, Field(ge=1)] = 1
    adaptive: bool = False
    margin: Annotated[float, Field(gt=0, le=2)] = 0.5

    def seed_of(self, example_id: str, draft_index: int) -> int:
        """The random seed of one draft: 31 bits, different for every (seed, round, example,
        draft)."""
        return seed_from(f"{self.seed}|{self.round}|{example_id}|{draft_index}")

    def draft_settings(self, example_id: str, draft_index: int) -> dict[str, Any]:
        """The sampling settings of one draft."""
        settings: dict[str, Any] = {
            "temperature": self.temperature,
            "seed": self.seed_of(example_id, draft_index),
        }
        return settings | ({"top_p": self.top_p} if self.top_p < 1 else {})

    def answer_settings(self, example_id: str, number: int) -> dict[str, Any]:
        """The sampling settings of one of several answers of the strong model. The first is asked
        as if it were the only one, so that asking for more later asks only for the rest."""
        return (
            {"seed": seed_from(f"{self.seed}|{self.round}|{example_id}|answer {number}")}
            if number
            else {}
        )

    def enough(self, made: Sequence[Trace]) -> bool:
        """Whether to sample no more drafts of an example after these.

        There is a pair when one draft that did not hurt is better than another text by the margin.
        There will hardly be one when all drafts so far had the same influence, and the chance of
        another one in what is left is below ``HOPELESS``.
        """
        left = self.drafts - len(made)
        scored = [trace for trace in made if trace.influence is not None]
        if any(_apart(better, worse, self.margin) for better in scored for worse in scored):
            return True
        if not scored:
            return left == 0
        same = len({trace.influence for trace in scored}) == 1
        return left == 0 or (same and chance_of_another(len(scored), left) < HOPELESS)


def seed_from(text: str) -> int:
    """A random seed of 31 bits from a text."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:4], "big") >> 1


def chance_of_another(same: int, left: int) -> float:
    """The chance that one of ``left`` draws differs, after ``same`` draws that were all alike: 1 -
    (same + 1) / (same + left + 1).

    Laplace's rule of succession: with every rate of "alike" equally likely beforehand, the next
    draw is alike with probability (same + 1) / (same + 2), and the product over ``left`` draws
    telescopes (Laplace, Essai philosophique sur les probabilites, 1814; Jaynes, Probability Theory,
    2003, chapter 18).
    """
    return 1 - (same + 1) / (same + left + 1)


def _apart(better: Trace, worse: Trace, margin: float) -> bool:
    high, low = better.influence or 0.0, worse.influence or 0.0
    return (
        high >= 0
        and high - low >= margin
        and " ".join(better.completion.split()) != " ".join(worse.completion.split())
    )


class Traces(Sequence[Trace]):
    """The traces of a collection, in the order of examples and drafts: in memory, or read from a
    run's store a few hundred at a time, as often as one iterates over them (:meth:`load`).

    ``saved`` counts what a collection did not need: ``weak_calls``, drafts that were not sampled
    because there were enough, and ``strong_calls``, answers that need not be asked, because of that
    or because drafts were equal. ``hide`` names inputs that a view does not show.
    """

    def __init__(
        self, traces: Sequence[Trace] = (), saved: Mapping[str, int] | None = None
    ) -> None:
        self._traces: Sequence[Trace] = list(traces)
        self._store: Store | None = None
        self._start = ""
        self._types: Mapping[str, Any] | None = None
        self.saved = {"weak_calls": 0, "strong_calls": 0, **(saved or {})}
        self.hide: tuple[str, ...] = ()

    @classmethod
    def load(
        cls, store: Store, *, round: int | None = None, types: Mapping[str, Any] | None = None
    ) -> Traces:
        """The traces of a run. They are there as long as its folder is, also when the store is
        closed; an index takes a pass over those before it.

        Args:
            store: the run's.
            round: only those of this round; all by default.
            types: of the program's outputs (``Collaboration.output_types``), by which answers
                become again what they were: pydantic models, enums, times. Without them they are in
                what JSON has.
        """
        made = cls()
        made._store, made._types = store, types
        made._start = "" if round is None else f"{round}/"
        made.hide = names_hidden_in(store.folder)
        for key, record in store.records("saved").items():
            if round is None or key == str(round):
                made.saved = {name: made.saved[name] + record.get(name, 0) for name in made.saved}
        return made

    def __len__(self) -> int:
        if self._store is None:
            return len(self._traces)
        return self._store.count(KIND, start=self._start)

    def __iter__(self) -> Iterator[Trace]:
        if self._store is None:
            return iter(self._traces)
        rows = self._store.each(KIND, start=self._start)
        return (Trace.from_dict(value, self._types) for _, value in rows)

    @overload
    def __getitem__(self, index: int) -> Trace: ...
    @overload
    def __getitem__(self, index: slice) -> list[Trace]: ...
    def __getitem__(self, index: int | slice) -> Trace | list[Trace]:
        if self._store is None or isinstance(index, slice):
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

    def __repr__(self) -> str:
        return f"Traces({len(self)} traces, {InfluenceReport.from_traces(self)})"

    def _repr_html_(self) -> str:
        """The traces in a notebook: their influence, and the first of them, without the inputs that
        the run hides."""
        report = InfluenceReport.from_traces(self)
        drafts = notebook.format_plural(self.saved["weak_calls"], "draft")
        answers = notebook.format_plural(self.saved["strong_calls"], "answer")
        first = self[: notebook.MOST_ROWS]
        return notebook.view(
            f"{notebook.format_plural(len(self), 'trace')} of "
            f"{notebook.format_plural(len(set(report.examples)), 'example')}",
            str(report),
            notebook.format_shares(report.counts),
            f"failed: {format_kinds(report.failures)}" if report.failures else None,
            f"not asked, as there was no need: {drafts}, {answers}"
            if any(self.saved.values())
            else None,
            notebook.table(
                ("example", "input", "draft", "alone", "with the draft", "influence"),
                [_row(trace, self.hide) for trace in first],
                texts=5,
                total=len(self),
            )
            if first
            else None,
        )


def _row(trace: Trace, hide: tuple[str, ...]) -> tuple[object, ...]:
    hiding = Hiding(hide)
    hiding.note(trace.example_id, trace.inputs)
    refined = {name: value for name, value in (trace.refined or {}).items() if name != "draft"}
    texts = [
        _text(hide_inputs(trace.inputs, hide)),
        *(
            _text(hiding.redact(trace.example_id, one))
            for one in (trace.draft or trace.completion, trace.alone or "", refined or "")
        ),
    ]
    return (
        f"{trace.example_id}, {trace.draft_index}",
        *(notebook.format_text(text, 160) for text in texts),
        notebook.format_signed(trace.influence),
    )


def _text(value: object) -> str:
    """A text as it is; of several fields one line each, of one field its value."""
    if not isinstance(value, dict):
        return str(value)
    named = len(value) > 1
    return "\n".join(f"{name}: {one}" if named else str(one) for name, one in value.items())
