"""Preferences as data: pairs of drafts for DPO, single drafts that helped or hurt for KTO; as rows,
JSON Lines, a ``datasets.Dataset``, a dataset of the Hub.

Pairs of others are read in each of TRL's formats (https://huggingface.co/docs/trl/dataset_formats):

    conversational    {"prompt": [user ...], "chosen": [assistant], "rejected": [assistant]}
                      what we write
    standard          {"prompt": "...", "chosen": "...", "rejected": "..."}
    implicit prompt   {"chosen": [user ..., assistant], "rejected": [user ..., assistant]}
                      with a shared beginning
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Generic, Self, TypeVar, overload

from pydantic import Field, ValidationError
from rich.console import RenderableType
from typing_extensions import TypedDict

from cowest_dspy.errors import PairsError, TooFewPairs, describe_faults
from cowest_dspy.influence.report import remedy
from cowest_dspy.pairs.texts import Lengths
from cowest_dspy.utils import notebook
from cowest_dspy.utils.hiding import Hiding, mark
from cowest_dspy.utils.jsonable import type_adapter
from cowest_dspy.utils.jsonl import read_jsonl, write_jsonl

TRAINED_ON = ("prompt", "chosen", "rejected", "completion", "label")
SHOWN = 3
"""Pairs that a notebook shows."""
EVERY_FAILED, ONLY_ONE = "every draft failed", "only one draft"
NO_CHANGE, FAILED = "drafts that changed nothing", "drafts that failed ("
EQUAL = "drafts equal to another"
"""Reasons in ``dropped``, or how they begin."""
_MORE = "Sample more drafts (raise drafts), at a higher temperature, or on more examples"


class Message(TypedDict):
    """A turn of a conversation."""

    role: str
    content: str


Messages = tuple[Message, ...]
Number = Annotated[float, Field(strict=True)]


@dataclass(frozen=True)
class Pair:
    """Two drafts for one prompt: the chosen one helped the strong model more. Messages are
    ``{"role", "content"}``.

    Beside the texts stands where they come from: the drafts' places in their example, their
    influence in [-1, 1], the scores in [0, 1] of the answers refined from them, the score of the
    strong model alone, the models, the round, and the run's name. Numbers are None where nobody
    measured them, as in pairs that were imported.
    """

    prompt: Messages
    chosen: Messages
    rejected: Messages
    example_id: str
    chosen_index: int
    rejected_index: int
    chosen_influence: Number | None
    rejected_influence: Number | None
    weak_model: str
    strong_model: str
    round: int
    chosen_score: Number | None = None
    rejected_score: Number | None = None
    alone_score: Number | None = None
    run: str = ""


@dataclass(frozen=True)
class UnpairedPreference:
    """One draft and whether it helped (``label`` True) or hurt (False), with its influence and
    where it comes from."""

    prompt: Messages
    completion: Messages
    label: Annotated[bool, Field(strict=True)]
    example_id: str
    draft_index: int
    influence: Number
    score: Number | None
    alone_score: Number | None
    weak_model: str
    strong_model: str
    round: int
    run: str = ""


Preference = TypeVar("Preference", Pair, UnpairedPreference)


@dataclass(frozen=True, repr=False)
class _Preferences(Sequence[Preference], Generic[Preference]):
    """A sequence in the order of examples, with what was dropped on the way; a slice is one of the
    same kind, with the same ``dropped``. ``rules``: the settings that made it, empty where it was
    read from a file. ``hiding``: inputs that a notebook does not show."""

    items: tuple[Preference, ...] = ()
    dropped: dict[str, int] = field(default_factory=dict)
    rules: dict[str, Any] = field(default_factory=dict)
    hiding: Hiding | None = field(default=None, compare=False)

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Preference: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> Preference | Self:
        return (
            replace(self, items=self.items[index])
            if isinstance(index, slice)
            else self.items[index]
        )

    @property
    def examples(self) -> int:
        """The number of different examples."""
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

    def save(self, path: str | Path) -> Path:
        """Write the rows as JSON Lines, which ``datasets.load_dataset("json", data_files=...)``
        reads too; the file appears whole or not at all."""
        return write_jsonl(Path(path), self.rows())

    def _to_dataset(self) -> Any:
        from datasets import Dataset

        return Dataset.from_list(self.rows())


class PreferencePairs(_Preferences[Pair]):
    """Pairs in the order of their examples: ``pairs[0].chosen``, ``pairs[:8].save("x.jsonl")``.
    ``dropped`` counts drafts, pairs
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
            one, other = (self.hiding.redact(pair.example_id, text) for text in (one, other))
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
        return Lengths.of(
            ((pair.round, pair.example_id), _text(pair.chosen), _text(pair.rejected))
            for pair in self
        )

    def check_enough(self, least: int) -> None:
        """See that there are as many as ``least`` asks for.

        Raises:
            TooFewPairs: it says why, and what to try.
        """
        if len(self) < least:
            raise TooFewPairs(
                f"{self._describe_shortage()} At least {least} are needed (least).",
                len(self),
                f"{notebook.format_plural(len(self), 'pair')}, {least} needed",
            )

    def _describe_shortage(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items())
        more = (
            "Sample more drafts (raise drafts), at a higher temperature, on more examples, or "
            "lower margin when scores are graded."
        )
        return (
            f"Only {notebook.format_plural(len(self), 'preference pair')}: "
            f"{reasons or 'there were no traces'}. {_advise(self.dropped, more)}"
        )

    def unpaired_rows(self) -> list[dict[str, Any]]:
        """Rows for KTO, two of each pair: the chosen text labelled True, the rejected one False."""
        sides = (("chosen", True), ("rejected", False))
        return [
            {"prompt": row["prompt"], "completion": row[side], "label": label}
            for row in self.rows(lineage=False)
            for side, label in sides
        ]

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
            dropped={**self.dropped, "over the limit of pairs (most)": len(self) - count},
            rules={**self.rules, "most": count},
        )

    def to_dataset(self) -> Any:
        """A ``datasets.Dataset`` that ``trl.DPOTrainer`` takes as it is.

        Raises:
            PairsError: there are no pairs.
        """
        if not self:
            raise PairsError(self._describe_shortage())
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
            raise PairsError(self._describe_shortage())
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
            prompt, text = mark(prompt), self.hiding.redact(draft.example_id, text)
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
                f"{_MORE}."
            )
        return self._to_dataset()

    def check_enough(self, least: int) -> None:
        """See that there are as many as ``least`` asks for, and of both labels.

        Raises:
            TooFewPairs: it says why, and what to try.
        """
        hurt = len(self) - self.helped
        reasons = "".join(f", {count} {reason}" for reason, count in self.dropped.items())
        found = f"{self.helped} drafts helped and {hurt} hurt{reasons}."
        counted = notebook.format_plural(len(self), "labelled draft")
        if len(self) < least:
            text = (
                f"Too few labelled drafts for KTO: {found} {_advise(self.dropped, f'{_MORE}.')} "
                f"At least {least} are needed (least)."
            )
            raise TooFewPairs(text, len(self), f"{counted}, {least} needed")
        if not self.helped or not hurt:
            instead = "; or tune with SFT, or with DPO if some helped more than others."
            text = (
                f"KTO needs drafts that helped and drafts that hurt: {found} "
                f"{_advise(self.dropped, _MORE + (instead if self.helped else '.'))}"
            )
            raise TooFewPairs(
                text,
                len(self),
                f"of {counted} {self.helped} helped and {hurt} hurt, KTO needs both",
            )

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


def _text(messages: Messages) -> str:
    return "\n".join(one["content"] for one in messages)


# Reading


def read_pair(row: Any, number: int, source: str) -> Pair:
    """The pair of a row in one of the three formats; other columns than ours are left aside.

    Args:
        row: a mapping.
        number: the row's number from 1, which is its example's id when it has none.
        source: where the row stands, for the message.

    Raises:
        PairsError: the row is of none of the formats, lacks a side, or has twice the same; with its
            number.
    """
    where = f"{source}, row {number}"
    if not isinstance(row, Mapping):
        text = repr(row)[:80]
        raise PairsError(
            f"{where}: {text} is no row. Of several splits, give one: dataset['train']."
        )
    given = {one.name: row[one.name] for one in fields(Pair) if row.get(one.name) is not None}
    given |= {name: str(given.get(name, other)) for name, other in _texts(number).items()}
    numbers = {"chosen_index": 0, "rejected_index": 0, "round": 0}
    influences = {"chosen_influence": None, "rejected_influence": None}
    pair = _validate(Pair, {**numbers, **influences, **given, **_sides(given, where)}, where)
    if not any(one["content"].strip() for one in pair.prompt):
        raise PairsError(f'{where}: "prompt" must be messages that say something.')
    for name, side in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if not side or side[-1]["role"] != "assistant" or not side[-1]["content"].strip():
            raise PairsError(
                f'{where}: "{name}" must end in an assistant message that says something.'
            )
    if pair.chosen == pair.rejected:
        raise PairsError(f"{where}: chosen and rejected are the same text: that is no preference.")
    return pair


def read_unpaired(row: dict[str, Any], where: str) -> UnpairedPreference:
    """The draft of a row that we wrote.

    Raises:
        PairsError: the row is none; it begins with ``where``.
    """
    names = {one.name for one in fields(UnpairedPreference)}
    if set(row) != names:
        raise PairsError(
            f"{where}: this is no labelled draft. Its columns are {', '.join(sorted(names))}."
        )
    return _validate(UnpairedPreference, row, where)


def _texts(number: int) -> dict[str, str]:
    imported = {"weak_model": "imported", "strong_model": "imported", "run": ""}
    return {"example_id": f"row {number}", **imported}


def _validate(kind: type[Preference], values: dict[str, Any], where: str) -> Preference:
    try:
        return type_adapter(kind).validate_python(values)
    except ValidationError as error:
        what = "pair" if kind is Pair else "labelled draft"
        raise PairsError(
            f"{where}: this is no {what}. {describe_faults(error, 'row')}. Each side must be a "
            'list of messages, such as [{"role": "user", "content": "..."}]; rename a column that '
            "means something else."
        ) from None


def _sides(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Prompt, chosen and rejected as far as they are there: texts as messages, and as the prompt
    what both conversations begin with, where it is not given apart."""
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    sides = {
        name: [{"role": role, "content": row[name]}] if isinstance(row[name], str) else row[name]
        for name, role in roles.items()
        if name in row
    }
    chosen, rejected = sides.get("chosen"), sides.get("rejected")
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        return sides
    # Some datasets repeat as a text what both conversations begin with.
    first = [
        side[0].get("role") for side in (chosen, rejected) if side and isinstance(side[0], dict)
    ]
    repeated = isinstance(row.get("prompt"), str) and "assistant" not in first
    if "prompt" in row and not repeated:
        return sides
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if not shared:
        raise PairsError(
            f'{where}: there is no "prompt", and chosen and rejected do not begin with the same '
            "messages, so that it is not clear what both answer."
        )
    if shared == len(chosen) == len(rejected):
        raise PairsError(f"{where}: chosen and rejected are the same text: that is no preference.")
    return {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


# Too few of them


def _advise(dropped: Mapping[str, int], more: str) -> str:
    """What to try when there are too few pairs, the cause first: what mends the failures that cost
    most drafts, before ``more``, the advice to sample more, where more was lost by failures than
    otherwise. ``dropped``: counts by reason."""
    failed = {
        name[len(FAILED) : -1]: count for name, count in dropped.items() if name.startswith(FAILED)
    }
    if not failed:
        return more
    # One draft is left of an example by failures, or since the drafter always writes the same.
    alike = dropped.get(EQUAL, 0) > sum(failed.values())
    by_failure = (f"examples: {EVERY_FAILED}", *(() if alike else (f"examples: {ONLY_ONE}",)))
    otherwise = sum(
        count
        for name, count in dropped.items()
        if name.startswith(("examples: ", NO_CHANGE)) and name not in by_failure
    )
    kind = max(failed, key=lambda one: failed[one])
    mend = f"{notebook.format_plural(failed[kind], 'draft')} failed ({kind}): {remedy(kind)}."
    return f"{mend} {more}" if sum(failed.values()) >= otherwise else f"{more} {mend}"
