"""Trace: one draft of one example with everything that is needed to audit it. Sampling: how drafts
are sampled."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from cowest_dspy.utils.jsonable import restored_fields


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

    @property
    def key(self) -> str:
        """Under which a store keeps it: round, example and draft."""
        return f"{self.round}/{self.example_id}/{self.draft_index}"

    def to_dict(self) -> dict[str, Any]:
        """The trace as data; shares what is in it."""
        return {name: getattr(self, name) for name in _FIELDS}

    @classmethod
    def from_dict(cls, values: dict[str, Any], types: Mapping[str, Any] | None = None) -> Trace:
        """The inverse of :meth:`to_dict`, also after a round trip through JSON, where ``types`` has
        the types of the program's outputs (``Collaboration.output_types``); without them answers
        stay in what JSON has."""
        answers = {
            name: restored_fields(values[name], types or {}) for name in ("refined", "alone")
        }
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
        ``margin`` that a pair needs, or until it is not worth while (enough.py). Drafts keep their
        index and seed: an adaptive run's are the first of the full run's.
    """

    drafts: int = 4
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    round: int = 1
    adaptive: bool = False
    margin: float = 0.5

    def seed_of(self, example_id: str, draft_index: int) -> int:
        """The random seed of one draft: 31 bits, different for every (seed, round, example,
        draft)."""
        return _bits(f"{self.seed}|{self.round}|{example_id}|{draft_index}")

    def draft_settings(self, example_id: str, draft_index: int) -> dict[str, Any]:
        """The sampling settings of one draft."""
        settings: dict[str, Any] = {
            "temperature": self.temperature,
            "seed": self.seed_of(example_id, draft_index),
        }
        return settings | ({"top_p": self.top_p} if self.top_p < 1 else {})

    def answer_settings(self, example_id: str, number: int) -> dict[str, Any]:
        """Those of one of several answers of the strong model. The first is asked as if it were the
        only one, so that asking for more answers later asks only for the rest."""
        return (
            {"seed": _bits(f"{self.seed}|{self.round}|{example_id}|answer {number}")}
            if number
            else {}
        )


def _bits(content: str) -> int:
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:4], "big") >> 1
