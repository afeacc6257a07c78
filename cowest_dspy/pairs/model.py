"""Preference pairs as a whole: what was kept, what was dropped; as rows, a file, a
``datasets.Dataset``, a dataset of the Hub."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from cowest_dspy.errors import PairsError, TooFewPairs
from cowest_dspy.influence.report import remedy
from cowest_dspy.pairs import sharing
from cowest_dspy.pairs.filters import failed_kinds, lost_otherwise
from cowest_dspy.pairs.lengths import Lengths, lengths_of
from cowest_dspy.pairs.pair import Pair, listed, pair_from
from cowest_dspy.utils import notebook
from cowest_dspy.utils.hiding import Hiding, mark
from cowest_dspy.utils.jsonl import read_jsonl, write_jsonl

TRAINED_ON = ("prompt", "chosen", "rejected")
SHOWN = 3
"""Pairs that a notebook shows."""


@dataclass(frozen=True, repr=False)
class PreferencePairs:
    """Pairs in the order of their examples; how many drafts, pairs or examples were dropped for
    which reason; and the gate's rules (strategy, margin, ...), empty for pairs that were read from
    a file. ``hiding``: inputs that a notebook does not show."""

    pairs: tuple[Pair, ...]
    dropped: dict[str, int] = field(default_factory=dict)
    rules: dict[str, Any] = field(default_factory=dict)
    hiding: Hiding | None = field(default=None, compare=False)

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.pairs)

    @property
    def examples(self) -> int:
        """Of how many examples the pairs are."""
        return len({pair.example_id for pair in self.pairs})

    def __repr__(self) -> str:
        return (
            f"PreferencePairs({len(self)} pairs of {self.examples} examples; "
            f"{notebook.counted(self.dropped) or 'dropped: none'})"
        )

    def _repr_html_(self) -> str:
        """The pairs in a notebook: how many, what was dropped and why, and the first with what
        differs in their words."""
        lengths = self.lengths
        left = len(self.pairs) - SHOWN
        return notebook.view(
            f"{notebook.several(len(self), 'preference pair')} of "
            f"{notebook.several(self.examples, 'example')}",
            notebook.counted(self.dropped),
            f"lengths: {lengths}" if lengths else None,
            f"Warning: {lengths.warning}" if lengths and lengths.warning else None,
            *(self._shown(pair) for pair in self.pairs[:SHOWN]),
            notebook.more(left, "pair") if left > 0 else None,
        )

    def _shown(self, pair: Pair) -> notebook.RenderableType:
        prompt, one, other = (
            _last(messages) for messages in (pair.prompt, pair.chosen, pair.rejected)
        )
        if self.hiding is not None:
            # A prompt is inputs in some format, of which only the whole is known here.
            prompt, one, other = (
                mark(prompt),
                *(self.hiding.shown(pair.example_id, text) for text in (one, other)),
            )
        chosen, rejected = notebook.word_diff(one, other)
        rows = [
            ("prompt", notebook.said(prompt), ""),
            ("chosen", chosen, _influence(pair.chosen_influence)),
            ("rejected", rejected, _influence(pair.rejected_influence)),
        ]
        return notebook.table((pair.example_id, "", "influence"), rows, texts=2)

    @property
    def lengths(self) -> Lengths | None:
        """Whether chosen drafts are longer than rejected ones; None without pairs."""
        return lengths_of(self.pairs)

    def at_most(self, count: int | None, *, seed: int = 0) -> PreferencePairs:
        """So many pairs, drawn at random and left in their order; all when there are no more, or
        ``count`` is None. With one seed, the pairs of a smaller count are among those of a larger
        one. What is left out is counted among ``dropped``."""
        if count is None or count >= len(self.pairs):
            return self
        drawn = set(random.Random(seed).sample(range(len(self.pairs)), len(self.pairs))[:count])
        kept = tuple(pair for place, pair in enumerate(self.pairs) if place in drawn)
        left_out = {"over [pairs] most": len(self.pairs) - count}
        return replace(
            self,
            pairs=kept,
            dropped={**self.dropped, **left_out},
            rules={**self.rules, "most": count},
        )

    def rows(self, *, lineage: bool = True) -> list[dict[str, Any]]:
        """TRL's conversational rows, with lineage columns or with ``prompt``, ``chosen`` and
        ``rejected`` only."""
        rows = ({key: listed(value) for key, value in asdict(pair).items()} for pair in self.pairs)
        return [row if lineage else {key: row[key] for key in TRAINED_ON} for row in rows]

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

    def push_to_hub(self, repo_id: str, *, private: bool = True, token: str | None = None) -> str:
        """Uploads the pairs, with a card (:func:`dataset_card`), as the Hub dataset ``repo_id``;
        gives its address.

        The dataset is private unless ``private=False``. Without ``token``, the one of ``hf auth
        login`` or of HF_TOKEN is used.

        Raises:
            PairsError: there are no pairs, a text in them looks like a secret, the Hub refuses or
                cannot be reached, or ``private`` is wanted and the dataset exists and is public.
        """
        if not self.pairs:
            raise PairsError(nothing_to_train_on(self))
        with tempfile.TemporaryDirectory(prefix="cowest-pairs-") as folder:
            sharing.write_folder(Path(folder), self.rows(), sharing.dataset_card(self))
            return sharing.upload(Path(folder), repo_id, private=private, token=token)

    @classmethod
    def load(cls, path: str | Path) -> PreferencePairs:
        """Pairs from a file that :meth:`save` wrote, or from any JSON Lines in one of TRL's formats
        (see pair.py).

        Raises:
            DataError: no such file, or a line that is not JSON.
            PairsError: the file is empty, or a row is no pair; with the row's number.
        """
        rows = read_jsonl(Path(path))
        if not rows:
            raise PairsError(
                f"{path} has no pairs in it. `cowest pairs` writes them from a run's traces."
            )
        return cls._of(rows, str(path))

    @classmethod
    def from_dataset(cls, dataset: Iterable[Any]) -> PreferencePairs:
        """Pairs from one split of a ``datasets.Dataset``, in one of TRL's formats.

        Raises:
            PairsError: the dataset is empty, or a row is no pair; with the row's number.
        """
        made = cls._of(dataset, "the dataset")
        if not made.pairs:
            raise PairsError("The dataset has no rows.")
        return made

    @classmethod
    def _of(cls, rows: Iterable[Any], source: str) -> PreferencePairs:
        return cls(
            tuple(pair_from(row, number, source) for number, row in enumerate(rows, start=1))
        )


def _last(messages: tuple[dict[str, str], ...]) -> str:
    return messages[-1]["content"] if messages else ""


def _influence(value: float | None) -> str:
    return "not measured" if value is None else notebook.signed(value)


def at_least(pairs: PreferencePairs, least: int, *, tuned: bool = False) -> PreferencePairs:
    """The pairs, when there are as many as ``[pairs] least`` asks for. ``tuned``: an earlier round
    has been tuned.

    Raises:
        TooFewPairs: it says why, what to try, and what there is without tuning, if there is no more
            than that.
    """
    check_enough(len(pairs), least, pairs.dropped, tuned=tuned)
    return pairs


def check_enough(
    found: int, least: int, dropped: Mapping[str, int] | None = None, *, tuned: bool = False
) -> None:
    """See that there are ``least`` pairs to train on. ``dropped``: what was left out, by reason,
    where that is known.

    Raises:
        TooFewPairs: there are fewer.
    """
    if found < least:
        instead = (
            " What there is without tuning is shown by `cowest evaluate` with --arm strong "
            "--arm collaboration_sft."
        )
        message = (
            f"{_shortage_text(found, dropped)} [pairs] least asks for "
            f"{least}.{'' if tuned or dropped is None else instead}"
        )
        raise TooFewPairs(message, found, f"{notebook.several(found, 'pair')}, {least} needed")


def nothing_to_train_on(pairs: PreferencePairs) -> str:
    """What to say, and to try, when there are too few pairs."""
    return _shortage_text(len(pairs), pairs.dropped)


def _shortage_text(found: int, dropped: Mapping[str, int] | None) -> str:
    """What to say, and to try, when there are too few pairs; ``dropped`` is None where it is not
    known what was left out."""
    counted = ", ".join(f"{count} {reason}" for reason, count in (dropped or {}).items())
    reasons = "" if dropped is None else f": {counted or 'there were no traces'}"
    more = (
        "Sample more drafts ([collect] drafts), at a higher temperature, on more examples, or "
        "lower [pairs] margin when scores are "
        "graded."
    )
    return (
        f"Only {notebook.several(found, 'preference pair')}{reasons}. {advice(dropped or {}, more)}"
    )


def advice(dropped: Mapping[str, int], more: str) -> str:
    """What to try, the cause first: what mends the failures that cost most drafts, where more was
    lost by failures than otherwise, before ``more``, the advice to sample more."""
    failed = failed_kinds(dropped)
    if not failed:
        return more
    kind = max(failed, key=lambda one: failed[one])
    mend = f"{notebook.several(failed[kind], 'draft')} failed ({kind}): {remedy(kind)}."
    return f"{mend} {more}" if sum(failed.values()) >= lost_otherwise(dropped) else f"{more} {mend}"
