"""Preferences as data: pairs of drafts for DPO, single drafts that helped or hurt for KTO; as rows,
JSON Lines, a ``datasets.Dataset``, a dataset of the Hub."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

from rich.console import RenderableType

from cowest_dspy.errors import PairsError, TooFewPairs
from cowest_dspy.influence.statistics import Interval, bootstrap_mean_interval
from cowest_dspy.pairs.filters import advice, word_count
from cowest_dspy.pairs.formats import Messages, Pair, UnpairedPreference, read_pair, read_unpaired
from cowest_dspy.utils import notebook
from cowest_dspy.utils.hiding import Hiding, mark
from cowest_dspy.utils.jsonl import read_jsonl, write_jsonl

TRAINED_ON = ("prompt", "chosen", "rejected", "completion", "label")
SHOWN = 3
"""Pairs that a notebook shows."""
# A mean difference of lengths that is certain, but a smaller part of the mean length, is not warned
# of.
STRONG_BIAS = 0.2


Preference = TypeVar("Preference", Pair, UnpairedPreference)


@dataclass(frozen=True, repr=False)
class _Preferences(Sequence[Preference], Generic[Preference]):
    """A sequence in the order of examples, with what was dropped on the way. ``rules``: the
    settings that made it, empty where it was read from a file. ``hiding``: inputs that a notebook
    does not show."""

    items: tuple[Preference, ...] = ()
    dropped: dict[str, int] = field(default_factory=dict)
    rules: dict[str, Any] = field(default_factory=dict)
    hiding: Hiding | None = field(default=None, compare=False)

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Preference: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Preference, ...]: ...
    def __getitem__(self, index: int | slice) -> Preference | tuple[Preference, ...]:
        return self.items[index]

    @property
    def examples(self) -> int:
        """Of how many examples they are."""
        return len({item.example_id for item in self.items})

    def rows(self, *, lineage: bool = True) -> list[dict[str, Any]]:
        """TRL's conversational rows, followed by the columns that say where each comes from, or
        without these (``lineage=False``)."""
        return [
            {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in asdict(item).items()
                if lineage or name in TRAINED_ON
            }
            for item in self.items
        ]

    def save(self, path: Path) -> Path:
        """Write the rows as JSON Lines; the file appears whole or not at all."""
        return write_jsonl(path, self.rows())

    def _to_dataset(self) -> Any:
        from datasets import Dataset

        return Dataset.from_list(self.rows())


class PreferencePairs(_Preferences[Pair]):
    """Pairs in the order of their examples: ``pairs[0].chosen``. ``dropped`` counts drafts, pairs
    and examples that gave none, by reason; ``rules`` are the settings of
    :func:`~cowest_dspy.pairs.preference_pairs`."""

    def __repr__(self) -> str:
        return (
            f"PreferencePairs({len(self)} pairs of {self.examples} examples; "
            f"{notebook.format_dropped(self.dropped) or 'dropped: none'})"
        )

    def _repr_html_(self) -> str:
        """The pairs in a notebook: how many, what was dropped and why, and the first with what
        differs in their words."""
        lengths = self.lengths
        left = len(self) - SHOWN
        return notebook.view(
            f"{notebook.format_plural(len(self), 'preference pair')} of "
            f"{notebook.format_plural(self.examples, 'example')}",
            notebook.format_dropped(self.dropped),
            f"lengths: {lengths}" if lengths else None,
            f"Warning: {lengths.warning}" if lengths and lengths.warning else None,
            *(self._cells(pair) for pair in self.items[:SHOWN]),
            notebook.format_rest(left, "pair") if left > 0 else None,
        )

    def _cells(self, pair: Pair) -> RenderableType:
        prompt, one, other = (_last(side) for side in (pair.prompt, pair.chosen, pair.rejected))
        if self.hiding is not None:
            # A prompt is inputs in some format, of which only the whole is known here.
            prompt = mark(prompt)
            one, other = (self.hiding.shown(pair.example_id, text) for text in (one, other))
        chosen, rejected = notebook.word_diff(one, other)
        influences = [
            "not measured" if value is None else notebook.format_signed(value)
            for value in (pair.chosen_influence, pair.rejected_influence)
        ]
        rows = [
            ("prompt", notebook.format_text(prompt), ""),
            ("chosen", chosen, influences[0]),
            ("rejected", rejected, influences[1]),
        ]
        return notebook.table((pair.example_id, "", "influence"), rows, texts=2)

    @property
    def lengths(self) -> Lengths | None:
        """Whether chosen drafts are longer than rejected ones; None without pairs."""
        return Lengths.of(self)

    def at_most(self, count: int | None, *, seed: int = 0) -> PreferencePairs:
        """So many pairs, drawn at random and left in their order; all when there are no more, or
        ``count`` is None. With one seed, the pairs of a smaller count are among those of a larger
        one. What is left out is counted among ``dropped``."""
        if count is None or count >= len(self):
            return self
        drawn = sorted(random.Random(seed).sample(range(len(self)), len(self))[:count])
        return replace(
            self,
            items=tuple(self.items[place] for place in drawn),
            dropped={**self.dropped, "over [pairs] most": len(self) - count},
            rules={**self.rules, "most": count},
        )

    def to_dataset(self) -> Any:
        """A ``datasets.Dataset`` that ``trl.DPOTrainer`` takes as it is.

        Raises:
            PairsError: there are no pairs.
        """
        if not self:
            raise PairsError(describe_shortage(0, self.dropped))
        return self._to_dataset()

    def push_to_hub(self, repo_id: str, *, private: bool = True, token: str | None = None) -> str:
        """Upload the pairs, with a card (:func:`~cowest_dspy.pairs.hub.dataset_card`), as the Hub
        dataset ``repo_id``, and give its address.

        The dataset is private unless ``private=False``. Without ``token``, the one of ``hf auth
        login`` or of HF_TOKEN is used.

        Raises:
            PairsError: there are no pairs, a text in them looks like a secret, the Hub refuses or
                cannot be reached, or ``private`` is wanted and the dataset exists and is public.
        """
        from cowest_dspy.pairs import hub

        if not self:
            raise PairsError(describe_shortage(0, self.dropped))
        with tempfile.TemporaryDirectory(prefix="cowest-pairs-") as folder:
            hub.write_dataset(Path(folder), self)
            return hub.upload(
                Path(folder),
                repo_id,
                kind="dataset",
                message="Preference pairs",
                private=private,
                token=token,
                error=PairsError,
            )

    @classmethod
    def load(cls, path: str | Path) -> PreferencePairs:
        """Pairs of a JSON Lines file in any of TRL's formats, such as :meth:`save` writes.

        Raises:
            DataError: no such file, or a line that is not JSON.
            PairsError: the file is empty, or a row is no pair; with the row's number.
        """
        rows = read_jsonl(Path(path))
        if not rows:
            raise PairsError(
                f"{path} has no pairs in it. `cowest pairs` writes them from a run's traces."
            )
        return cls(tuple(read_pair(row, number, str(path)) for number, row in enumerate(rows, 1)))

    @classmethod
    def from_dataset(cls, dataset: Iterable[Any]) -> PreferencePairs:
        """Pairs of one split of a ``datasets.Dataset`` in any of TRL's formats.

        Raises:
            PairsError: the dataset is empty, or a row is no pair; with the row's number.
        """
        made = cls(tuple(read_pair(row, at, "the dataset") for at, row in enumerate(dataset, 1)))
        if not made:
            raise PairsError("The dataset has no rows.")
        return made


class UnpairedPreferences(_Preferences[UnpairedPreference]):
    """Drafts one by one, those that helped and those that hurt, in the order of examples and of
    sampling: what KTO learns from, with no need of two drafts to compare."""

    @property
    def helped(self) -> int:
        """How many are labelled as having helped; the others hurt."""
        return sum(draft.label for draft in self.items)

    def __repr__(self) -> str:
        hurt = len(self) - self.helped
        dropped = notebook.format_dropped(self.dropped) or "dropped: none"
        return f"UnpairedPreferences({self.helped} helped, {hurt} hurt; {dropped})"

    def _repr_html_(self) -> str:
        """The drafts in a notebook: how many of each label, what was dropped and why, and the first
        of them."""
        rows = [self._cells(draft) for draft in self.items[: notebook.MOST_ROWS]]
        heads = ("example", "prompt", "draft", "label", "influence")
        return notebook.view(
            f"{notebook.format_plural(len(self), 'labelled draft')} of "
            f"{notebook.format_plural(self.examples, 'example')}",
            notebook.format_shares({"helped": self.helped, "hurt": len(self) - self.helped}),
            notebook.format_dropped(self.dropped),
            notebook.table(heads, rows, texts=4, total=len(self)) if rows else None,
        )

    def _cells(self, draft: UnpairedPreference) -> tuple[Any, ...]:
        prompt, text = _last(draft.prompt), _last(draft.completion)
        if self.hiding is not None:
            prompt, text = mark(prompt), self.hiding.shown(draft.example_id, text)
        return (
            f"{draft.example_id}, {draft.draft_index}",
            notebook.format_text(prompt, 160),
            notebook.format_text(text, 160),
            "helped" if draft.label else "hurt",
            notebook.format_signed(draft.influence),
        )

    def to_dataset(self) -> Any:
        """A ``datasets.Dataset`` that ``trl.KTOTrainer`` takes as it is.

        Raises:
            PairsError: only drafts of one label, from which there is nothing to learn.
        """
        if self.helped in (0, len(self)):
            raise PairsError(
                f"{self.helped} of {len(self)} labelled drafts helped: both labels are needed. "
                "Sample more drafts ([collect] drafts), at a higher temperature, or on more "
                "examples."
            )
        return self._to_dataset()

    @classmethod
    def load(cls, path: str | Path) -> UnpairedPreferences:
        """The drafts of a file that :meth:`save` wrote.

        Raises:
            DataError: no such file, or a line that is not JSON.
            PairsError: a row is no labelled draft; with its number.
        """
        rows = enumerate(read_jsonl(Path(path)), start=1)
        return cls(tuple(read_unpaired(row, f"{path}, row {number}") for number, row in rows))


def _last(messages: Messages) -> str:
    return messages[-1]["content"] if messages else ""


# Enough of them


def at_least(pairs: PreferencePairs, least: int, *, tuned: bool = False) -> PreferencePairs:
    """The pairs, where there are as many as ``[pairs] least`` asks for (:func:`check_enough`)."""
    check_enough(len(pairs), least, pairs.dropped, tuned=tuned)
    return pairs


def check_enough(
    found: int, least: int, dropped: Mapping[str, int] | None = None, *, tuned: bool = False
) -> None:
    """See that there are ``least`` pairs to train on.

    Args:
        found: how many there are.
        least: as ``[pairs] least`` asks for.
        dropped: what was left out, by reason, where that is known.
        tuned: an earlier round has been tuned.

    Raises:
        TooFewPairs: it says why, what to try, and what there is without tuning, if there is no more
            than that.
    """
    if found < least:
        instead = (
            " What there is without tuning is shown by `cowest evaluate` with --arm strong "
            "--arm collaboration_sft."
        )
        message = (
            f"{describe_shortage(found, dropped)} [pairs] least asks for "
            f"{least}.{'' if tuned or dropped is None else instead}"
        )
        short = f"{notebook.format_plural(found, 'pair')}, {least} needed"
        raise TooFewPairs(message, found, short)


def describe_shortage(found: int, dropped: Mapping[str, int] | None) -> str:
    """What to say, and to try, when there are too few pairs; ``dropped`` is None where it is not
    known what was left out."""
    counted = ", ".join(f"{count} {reason}" for reason, count in (dropped or {}).items())
    reasons = "" if dropped is None else f": {counted or 'there were no traces'}"
    more = (
        "Sample more drafts ([collect] drafts), at a higher temperature, on more examples, or "
        "lower [pairs] margin when scores are graded."
    )
    return (
        f"Only {notebook.format_plural(found, 'preference pair')}{reasons}. "
        f"{advice(dropped or {}, more)}"
    )


# Their lengths


@dataclass(frozen=True)
class Lengths:
    """Words of chosen and rejected drafts, over all pairs: whether preference tuning would learn
    length first (Park et al. 2024, "Disentangling Length from Quality in Direct Preference
    Optimization", arXiv 2403.19159).

    ``difference`` is the mean of chosen less rejected, ``interval`` its 95 % bootstrap interval
    over examples (None for fewer than two); ``longer`` and ``shorter`` are the shares of pairs, in
    [0, 1], whose chosen draft is longer or shorter.
    """

    chosen: float
    rejected: float
    difference: float
    interval: Interval | None
    longer: float
    shorter: float

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> Lengths | None:
        """The lengths of pairs; None when there are none. The same pairs give the same interval."""
        if not pairs:
            return None
        chosen, rejected = (
            [sum(word_count(one["content"]) for one in getattr(pair, side)) for pair in pairs]
            for side in ("chosen", "rejected")
        )
        differences = [one - other for one, other in zip(chosen, rejected, strict=True)]
        groups: dict[tuple[int, str], list[float]] = {}
        for pair, difference in zip(pairs, differences, strict=True):
            groups.setdefault((pair.round, pair.example_id), []).append(difference)
        count = len(pairs)
        return cls(
            chosen=sum(chosen) / count,
            rejected=sum(rejected) / count,
            difference=sum(differences) / count,
            interval=bootstrap_mean_interval(list(groups.values())),
            longer=sum(difference > 0 for difference in differences) / count,
            shorter=sum(difference < 0 for difference in differences) / count,
        )

    @property
    def warning(self) -> str | None:
        """What to say, and to try, when the difference is certain (0 is outside the interval) and
        more than a fifth of the mean length."""
        certain = self.interval is not None and not self.interval.low <= 0 <= self.interval.high
        size = abs(self.difference)
        if not certain or size <= STRONG_BIAS * (self.chosen + self.rejected) / 2:
            return None
        word = "longer" if self.difference > 0 else "shorter"
        return (
            f"Chosen drafts are {word} than rejected ones by {size:.1f} words: tuning may teach "
            "length instead of content. [pairs] length_ratio = 1.5 keeps pairs of similar length "
            "only."
        )

    def __str__(self) -> str:
        spread = f" [{self.interval.low:+.1f}, {self.interval.high:+.1f}]" if self.interval else ""
        return (
            f"chosen {self.chosen:.1f} words, rejected {self.rejected:.1f}, difference "
            f"{self.difference:+.1f}{spread}; chosen is longer in {100 * self.longer:.0f} % and "
            f"shorter in {100 * self.shorter:.0f} % of the pairs"
        )
