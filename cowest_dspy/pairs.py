"""The gate: traces -> preference pairs. Two drafts of one example, ranked by influence.

A pair is made when its chosen draft did not hurt, its rejected draft did worse by at least the margin, and their texts differ.
Everything that is dropped is counted with its reason. ``pairs.to_dataset()`` is what TRL takes: conversational ``prompt``,
``chosen``, ``rejected``, and beside them where the pair comes from.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cowest_dspy.data import read_jsonl, write_jsonl
from cowest_dspy.errors import PairsError
from cowest_dspy.traces import Trace

Messages = tuple[dict[str, str], ...]


@dataclass(frozen=True)
class Pair:
    """Two drafts for one prompt: the chosen one helped the strong model more. Messages are ``{"role", "content"}``."""

    prompt: Messages
    chosen: Messages
    rejected: Messages
    example_id: str
    chosen_index: int
    rejected_index: int
    chosen_influence: float
    rejected_influence: float
    weak_model: str
    strong_model: str
    round: int


@dataclass(frozen=True)
class PreferencePairs:
    """Pairs in the order of their examples, and how many drafts or examples were dropped for which reason."""

    pairs: tuple[Pair, ...]
    dropped: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.pairs)

    def rows(self) -> list[dict[str, Any]]:
        """TRL's conversational rows with lineage columns."""
        return [{key: _listed(value) for key, value in asdict(pair).items()} for pair in self.pairs]

    def to_dataset(self) -> Any:
        """A ``datasets.Dataset`` that ``trl.DPOTrainer`` takes as it is.

        Raises:
            PairsError: there are no pairs.
        """
        if not self.pairs:
            raise PairsError(nothing_to_train_on(self))
        from datasets import Dataset

        return Dataset.from_list(self.rows())

    def save(self, path: Path) -> Path:
        """Writes the pairs as JSON Lines; the file appears whole or not at all."""
        return write_jsonl(path, self.rows())

    @classmethod
    def load(cls, path: Path) -> PreferencePairs:
        """Pairs from a file that :meth:`save` wrote, or any JSON Lines with TRL's prompt, chosen and rejected.

        Raises:
            PairsError: the file is empty, or a row is no conversational pair.
        """
        rows = read_jsonl(path)
        if not rows:
            raise PairsError(f"{path} has no pairs in it. `cowest pairs` writes them from a run's traces.")
        return cls(tuple(_pair_from(row, f"{path}, row {number}") for number, row in enumerate(rows, start=1)))


def preference_pairs(traces: Iterable[Trace], *, margin: float = 0.5, per_example: int = 1) -> PreferencePairs:
    """The best drafts of each example against its worst, by influence.

    Args:
        margin: smallest difference of influence, above 0 and at most 2.
        per_example: at most so many pairs per example: its worst, second worst, ... draft, each rejected once, against the
            best one; where several are equally good, they take turns.

    Ties are broken by the order in which drafts were sampled, so that equal traces give equal pairs.

    Raises:
        PairsError: a margin that is not above 0.
    """
    if not 0 < margin <= 2:
        raise PairsError(f"margin is {margin}: it must be above 0 (a tie is no preference) and at most 2.")
    dropped: Counter[str] = Counter()
    pairs: list[Pair] = []
    for drafts in _by_example(traces).values():
        pairs.extend(_pairs_of(_usable(drafts, dropped), margin, per_example, dropped))
    return PreferencePairs(tuple(pairs), dict(sorted(dropped.items())))


def nothing_to_train_on(pairs: PreferencePairs) -> str:
    """What to say, and to try, when there are too few pairs."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in pairs.dropped.items()) or "there were no traces"
    return (
        f"Only {len(pairs)} preference pairs: {reasons}. Sample more drafts ([collect] drafts), at a higher temperature, on more "
        "examples, or lower [pairs] margin when scores are graded."
    )


def _by_example(traces: Iterable[Trace]) -> dict[tuple[int, str], list[Trace]]:
    grouped: dict[tuple[int, str], list[Trace]] = {}
    for trace in traces:
        grouped.setdefault((trace.round, trace.example_id), []).append(trace)
    return grouped


def _usable(drafts: Sequence[Trace], dropped: Counter[str]) -> list[Trace]:
    """Drafts with an influence, each text once, best first."""
    kept: dict[str, Trace] = {}
    for trace in sorted(drafts, key=lambda trace: trace.draft_index):
        if trace.error is not None or trace.influence is None:
            dropped["drafts that failed"] += 1
        elif " ".join(trace.completion.split()) in kept:
            dropped["drafts equal to another"] += 1
        else:
            kept[" ".join(trace.completion.split())] = trace
    return sorted(kept.values(), key=lambda trace: (-(trace.influence or 0.0), trace.draft_index))


def _pairs_of(ranked: list[Trace], margin: float, per_example: int, dropped: Counter[str]) -> list[Pair]:
    if not ranked:
        dropped["examples: every draft failed"] += 1
        return []
    reason = _objection(ranked[0], ranked[-1], margin)
    if reason:
        dropped[f"examples: {reason}"] += 1
        return []
    best = [trace for trace in ranked if trace.influence == ranked[0].influence]
    worst = [trace for trace in reversed(ranked) if _objection(ranked[0], trace, margin) is None][:per_example]
    return [_pair(best[place % len(best)], rejected) for place, rejected in enumerate(worst)]


def _objection(best: Trace, worst: Trace, margin: float) -> str | None:
    chosen, rejected = best.influence or 0.0, worst.influence or 0.0
    if best is worst:
        return "only one draft"
    if best.prompt != worst.prompt:
        return "drafts of different prompts"
    if chosen == rejected:
        return "all drafts had the same influence"
    if chosen < 0:
        return "the best draft hurt"
    return "the difference is below the margin" if chosen - rejected < margin else None


def _pair(best: Trace, worst: Trace) -> Pair:
    return Pair(
        prompt=best.prompt,
        chosen=({"role": "assistant", "content": best.completion},),
        rejected=({"role": "assistant", "content": worst.completion},),
        example_id=best.example_id,
        chosen_index=best.draft_index,
        rejected_index=worst.draft_index,
        chosen_influence=best.influence or 0.0,
        rejected_influence=worst.influence or 0.0,
        weak_model=best.weak_model,
        strong_model=best.strong_model,
        round=best.round,
    )


def _pair_from(row: dict[str, Any], where: str) -> Pair:
    for name in ("prompt", "chosen", "rejected"):
        messages = row.get(name)
        if not isinstance(messages, list) or not messages or not all(_is_message(message) for message in messages):
            raise PairsError(f'{where}: "{name}" must be a list of messages, such as [{{"role": "user", "content": "..."}}].')
    if json.dumps(row["chosen"]) == json.dumps(row["rejected"]):
        raise PairsError(f"{where}: chosen and rejected are the same text: that is no preference.")
    return Pair(
        prompt=tuple(row["prompt"]),
        chosen=tuple(row["chosen"]),
        rejected=tuple(row["rejected"]),
        example_id=str(row.get("example_id", where)),
        chosen_index=int(row.get("chosen_index", 0)),
        rejected_index=int(row.get("rejected_index", 1)),
        chosen_influence=float(row.get("chosen_influence", 1.0)),
        rejected_influence=float(row.get("rejected_influence", 0.0)),
        weak_model=str(row.get("weak_model", "imported")),
        strong_model=str(row.get("strong_model", "imported")),
        round=int(row.get("round", 0)),
    )


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)


def _listed(value: Any) -> Any:
    return [dict(message) for message in value] if isinstance(value, tuple) else value
