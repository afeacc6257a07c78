"""Drafts one by one, as those that helped and those that hurt: what KTO learns from, with no need
of two drafts to compare."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import dspy
from pydantic import TypeAdapter, ValidationError

from cowest_dspy.errors import PairsError, faults
from cowest_dspy.influence.trace import Trace
from cowest_dspy.pairs.filters import NO_CHANGE, Gate, Rules, influence_of
from cowest_dspy.pairs.pair import Messages, listed
from cowest_dspy.program.escaping import escape
from cowest_dspy.utils import notebook
from cowest_dspy.utils.hiding import Hiding, mark
from cowest_dspy.utils.jsonl import read_jsonl, write_jsonl


@dataclass(frozen=True)
class UnpairedPreference:
    """One draft and whether it helped (``label`` True) or hurt (False), with its influence and
    where it comes from."""

    prompt: Messages
    completion: Messages
    label: bool
    example_id: str
    draft_index: int
    influence: float
    score: float | None
    alone_score: float | None
    weak_model: str
    strong_model: str
    round: int
    run: str = ""


@dataclass(frozen=True, repr=False)
class UnpairedPreferences:
    """Labelled drafts in the order of examples and of sampling, and how many were dropped for which
    reason. ``hiding``: inputs that a notebook does not show."""

    drafts: tuple[UnpairedPreference, ...]
    dropped: dict[str, int] = field(default_factory=dict)
    hiding: Hiding | None = field(default=None, compare=False)

    def __len__(self) -> int:
        return len(self.drafts)

    def __iter__(self) -> Iterator[UnpairedPreference]:
        return iter(self.drafts)

    @property
    def helped(self) -> int:
        """How many are labelled as having helped; the others hurt."""
        return sum(draft.label for draft in self.drafts)

    def __repr__(self) -> str:
        hurt, dropped = len(self) - self.helped, notebook.counted(self.dropped) or "dropped: none"
        return f"UnpairedPreferences({self.helped} helped, {hurt} hurt; {dropped})"

    def _repr_html_(self) -> str:
        """The drafts in a notebook: how many of each label, what was dropped and why, and the first
        of them."""
        counts = {"helped": self.helped, "hurt": len(self) - self.helped}
        rows = [self._row(draft) for draft in self.drafts[: notebook.MOST_ROWS]]
        heads = ("example", "prompt", "draft", "label", "influence")
        examples = len({draft.example_id for draft in self.drafts})
        return notebook.view(
            f"{notebook.several(len(self), 'labelled draft')} of "
            f"{notebook.several(examples, 'example')}",
            notebook.shares(counts),
            notebook.counted(self.dropped),
            notebook.table(heads, rows, texts=4, total=len(self)) if rows else None,
        )

    def _row(self, draft: UnpairedPreference) -> tuple[Any, ...]:
        prompt, text = (
            messages[-1]["content"] if messages else ""
            for messages in (draft.prompt, draft.completion)
        )
        if self.hiding is not None:
            prompt, text = mark(prompt), self.hiding.shown(draft.example_id, text)
        label = "helped" if draft.label else "hurt"
        name = f"{draft.example_id}, {draft.draft_index}"
        return (
            name,
            notebook.said(prompt, 160),
            notebook.said(text, 160),
            label,
            notebook.signed(draft.influence),
        )

    def rows(self) -> list[dict[str, Any]]:
        """TRL's conversational rows with ``prompt``, ``completion`` and ``label``, and lineage
        columns."""
        return [
            {key: listed(value) for key, value in asdict(draft).items()} for draft in self.drafts
        ]

    def to_dataset(self) -> Any:
        """A ``datasets.Dataset`` that ``trl.KTOTrainer`` takes as it is.

        Raises:
            PairsError: only drafts of one label, from which there is nothing to learn.
        """
        if self.helped in (0, len(self.drafts)):
            raise PairsError(
                f"{self.helped} of {len(self.drafts)} labelled drafts helped: both labels are "
                "needed. Sample more drafts "
                "([collect] drafts), at a higher temperature, or on more examples."
            )
        from datasets import Dataset

        return Dataset.from_list(self.rows())

    def save(self, path: Path) -> Path:
        """Writes the drafts as JSON Lines; the file appears whole or not at all."""
        return write_jsonl(path, self.rows())

    @classmethod
    def load(cls, path: str | Path) -> UnpairedPreferences:
        """The drafts of a file that :meth:`save` wrote.

        Raises:
            DataError: no such file, or a line that is not JSON.
            PairsError: a row is no labelled draft; with its number.
        """
        rows = enumerate(read_jsonl(Path(path)), start=1)
        return cls(tuple(_draft_from(row, f"{path}, row {number}") for number, row in rows))


def unpaired_preferences(
    traces: Iterable[Trace],
    *,
    same: bool | None = None,
    leak: str | None = None,
    held_out: Iterable[dspy.Example] = (),
    run: str = "",
) -> UnpairedPreferences:
    """Every usable draft with its label: True for an influence above 0, False below 0.

    Args:
        traces: read once, as a stream, in which the drafts of an example stand together.
        same: the label of drafts that changed nothing; None drops them, False is the paper's (not
            above 0 is rejected).
        leak: as for :func:`~cowest_dspy.pairs.preference_pairs`: a draft that says the answer is
            never labelled True.
        held_out: as there, examples none of which may be among the traces.
        run: the run's name, for the drafts' lineage.

    Raises:
        PairsError: as for :func:`~cowest_dspy.pairs.preference_pairs`.
    """
    gate = Gate(Rules(margin=1, near=1, leak=leak, length_ratio=None), held_out)
    made: list[UnpairedPreference] = []
    names = getattr(traces, "hide", ())
    hiding = Hiding(names) if names else None
    for drafts in gate.examples(traces):
        if hiding:
            hiding.note(drafts[0].example_id, drafts[0].inputs)
        labelled = [(trace, _label(trace, same)) for trace in gate.usable(drafts)]
        if unlabelled := sum(label is None for _, label in labelled):
            gate.dropped[NO_CHANGE] += unlabelled
        honest = {
            trace.draft_index
            for trace in gate.honest([trace for trace, label in labelled if label])
        }
        kept = [
            (trace, label)
            for trace, label in labelled
            if label is False or trace.draft_index in honest
        ]
        kept.sort(key=lambda item: item[0].draft_index)
        made.extend(_draft(trace, bool(label), run) for trace, label in kept)
    return UnpairedPreferences(tuple(made), dict(sorted(gate.dropped.items())), hiding)


def _label(trace: Trace, same: bool | None) -> bool | None:
    return same if trace.influence == 0 else influence_of(trace) > 0


def _draft(trace: Trace, label: bool, run: str) -> UnpairedPreference:
    return UnpairedPreference(
        prompt=trace.prompt,
        completion=({"role": "assistant", "content": escape(trace.completion)},),
        label=label,
        example_id=trace.example_id,
        draft_index=trace.draft_index,
        influence=influence_of(trace),
        score=trace.refined_score,
        alone_score=trace.alone_score,
        weak_model=trace.weak_model,
        strong_model=trace.strong_model,
        round=trace.round,
        run=run,
    )


def _draft_from(row: dict[str, Any], where: str) -> UnpairedPreference:
    names = {one.name for one in fields(UnpairedPreference)}
    if set(row) != names or not isinstance(row["label"], bool):
        raise PairsError(
            f"{where}: this is no labelled draft. Its columns are {', '.join(sorted(names))}; "
            "label is true or false."
        )
    try:
        draft = _ADAPTER.validate_python(row)
    except ValidationError as error:
        raise PairsError(f"{where}: this is no labelled draft. {faults(error, 'row')}.") from None
    if not all(
        message.keys() >= {"role", "content"} for message in (*draft.prompt, *draft.completion)
    ):
        raise PairsError(
            f'{where}: prompt and completion must be lists of messages, [{{"role": "user", '
            '"content": "..."}}].'
        )
    return draft


_ADAPTER = TypeAdapter(UnpairedPreference)
