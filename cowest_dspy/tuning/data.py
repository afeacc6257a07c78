"""Training rows: what they must look like, which are held out, and their order.

    SFT         {"prompt": [{"role": "user", "content": "2 + 2?"}], "completion": [{"role":
                "assistant", "content": "4"}]}
    preference  {"prompt": [...], "chosen": [{"role": "assistant", ...}], "rejected": [{"role":
                "assistant", ...}]}
    unpaired    {"prompt": [...], "completion": [{"role": "assistant", ...}], "label": true}
    chat        {"messages": [..., {"role": "assistant", "content": "4"}]}     DSPy's; the last
                message is the completion

Other columns, such as a pair's lineage, are allowed and ignored. Everything wrong is found before a
model is loaded.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from cowest_dspy.errors import TuningError

Row = Mapping[str, Any]
Messages = list[dict[str, str]]


@runtime_checkable
class Preferences(Protocol):
    """What has rows, such as PreferencePairs."""

    def rows(self) -> list[dict[str, Any]]:
        """The rows, with the columns that say where each comes from."""
        ...


def read_rows(given: Iterable[Any] | Preferences, tuner: str) -> Sequence[Row]:
    """The rows of preferences, of a ``datasets.Dataset`` or of any other iterable, for a tuner
    ("SFT", "DPO" or "KTO"); not checked yet.

    Preference pairs are for SFT their chosen drafts, and for KTO a desirable and an undesirable
    draft each.
    """
    if not isinstance(given, Preferences):
        return given if isinstance(given, Sequence) else list(given)
    rows = given.rows()
    if not rows or "chosen" not in rows[0] or tuner == "DPO":
        return rows
    sides = (("chosen", True),) if tuner == "SFT" else (("chosen", True), ("rejected", False))
    return [
        {
            "prompt": row["prompt"],
            "completion": row[side],
            "example_id": row["example_id"],
            **({"label": good} if tuner == "KTO" else {}),
        }
        for row in rows
        for side, good in sides
    ]


def tuner_of(rows: Sequence[Row]) -> str:
    """The tuner that rows are for: "DPO" for pairs, "KTO" for labelled drafts, otherwise "SFT"."""
    first: Any = rows[0] if rows and isinstance(rows[0], Mapping) else {}
    if {"chosen", "rejected"} <= first.keys():
        return "DPO"
    return "KTO" if isinstance(first.get("label"), bool) else "SFT"


def check_rows(rows: Sequence[Row], tuner: str) -> list[dict[str, Any]]:
    """Rows as the tuner ("SFT", "DPO" or "KTO") takes them, without other columns.

    Raises:
        TuningError: rows that cannot be trained on, or that are another tuner's.
    """
    check_tuner(rows, tuner)
    return {"SFT": sft_rows, "DPO": preference_rows, "KTO": unpaired_rows}[tuner](rows)


def check_tuner(rows: Sequence[Row], tuner: str) -> None:
    """Raise TuningError for rows that are another tuner's: SFT would learn what DPO and KTO are to
    unlearn."""
    fits = tuner_of(rows)
    if fits not in (tuner, "SFT"):
        raise TuningError(
            f"Rows with {'chosen and rejected' if fits == 'DPO' else 'a label'} are tuned on with "
            f"{fits}(...), but settings is {tuner}(...)."
        )


def sft_rows(rows: Iterable[Row]) -> list[dict[str, Messages]]:
    """Checked rows with exactly ``prompt`` and ``completion``, which is a chat row's last message.

    Raises:
        TuningError: no rows, or one that is not of this shape.
    """
    split = [
        _split_chat(row, index) if isinstance(row, Mapping) and "messages" in row else row
        for index, row in enumerate(rows)
    ]
    return _checked(split, ("completion",), "SFT")


def _split_chat(row: Row, index: int) -> Row:
    messages: Any = row["messages"]
    if not isinstance(messages, Sequence) or len(messages) < 2:
        raise TuningError(
            f'Row {index} is no chat row: {{"messages": [user ..., assistant ...]}} was '
            f"expected, {_format_value(row)} given."
        )
    return {"prompt": messages[:-1], "completion": messages[-1:]}


def preference_rows(rows: Iterable[Row]) -> list[dict[str, Messages]]:
    """Checked rows with exactly ``prompt``, ``chosen`` and ``rejected``.

    Raises:
        TuningError: no rows, one that is not of this shape, or one whose two sides are the same.
    """
    checked = _checked(rows, ("chosen", "rejected"), "preference")
    same = [index for index, row in enumerate(checked) if row["chosen"] == row["rejected"]]
    if same:
        raise TuningError(
            f"{_some(same)}: chosen and rejected are the same text, so nothing can be learnt from "
            "them. Leave them out."
        )
    return checked


def unpaired_rows(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Checked rows with exactly ``prompt``, ``completion`` and ``label``, which is True for a
    desirable completion.

    Raises:
        TuningError: no rows, one that is not of this shape, a label that is no bool, or only one
            label.
    """
    rows = list(rows)
    checked = _checked(rows, ("completion",), "unpaired")
    labels = [row.get("label") for row in rows]
    for index, label in enumerate(labels):
        if not isinstance(label, bool):
            raise TuningError(
                f'Row {index}: "label" must be true (desirable) or false (undesirable); '
                f"{_format_value(label)} was given."
            )
    if len(set(labels)) < 2:
        raise TuningError(
            f"All {len(labels)} rows have the label {str(labels[0]).lower()}: KTO learns from the "
            "difference, so both labels are "
            "needed. Add rows of the other label" + (", or use SFT." if labels[0] else ".")
        )
    return [{**row, "label": label} for row, label in zip(checked, labels, strict=True)]


def _checked(rows: Iterable[Row], sides: tuple[str, ...], kind: str) -> list[dict[str, Messages]]:
    checked = [
        {key: _messages(row, key, index, sides) for key in ("prompt", *sides)}
        for index, row in enumerate(rows)
    ]
    if not checked:
        raise TuningError(f"There are no {kind} rows, so there is nothing to train on.")
    return checked


def _messages(row: Row, key: str, index: int, sides: tuple[str, ...]) -> Messages:
    value: Any = row.get(key) if isinstance(row, Mapping) else None
    if (
        not isinstance(value, Sequence)
        or isinstance(value, str)
        or not value
        or not all(map(_is_message, value))
    ):
        raise TuningError(
            f'Row {index}: "{key}" must be a list of messages such as [{{"role": "user", '
            '"content": "..."}}]; '
            f"{_format_value(value)} was given. A row has {', '.join(('prompt', *sides))}."
        )
    messages: Messages = [
        {"role": message["role"], "content": message["content"]} for message in value
    ]
    if key in sides and messages[-1]["role"] != "assistant":
        raise TuningError(
            f'Row {index}: "{key}" must end in an assistant message; it ends in one of '
            f"{messages[-1]['role']}."
        )
    if key in sides and not messages[-1]["content"].strip():
        raise TuningError(
            f'Row {index}: "{key}" is empty text: a model would learn to say nothing. Leave the '
            "row out."
        )
    return messages


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("role"), str)
        and isinstance(value.get("content"), str)
    )


def _some(indices: Sequence[int]) -> str:
    shown = ", ".join(map(str, indices[:10])) + (", ..." if len(indices) > 10 else "")
    return f"{len(indices)} {'row' if len(indices) == 1 else 'rows'} ({shown})"


def _format_value(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class Split(NamedTuple):
    """Indices of rows, ascending: ``train`` to be trained on, ``held_out`` to be evaluated on."""

    train: tuple[int, ...]
    held_out: tuple[int, ...]


def split_rows(
    rows: Sequence[Mapping[str, Any]], part: float, seed: int, examples: Sequence[Any] | None = None
) -> Split:
    """Hold out about ``part`` of the rows, in [0, 0.5]; rows of one example or of one prompt are
    on the same side.

    ``examples`` are the rows' example ids, None where a row has none. Groups are held out in an
    order that ``seed`` gives, each if not more than ``part`` is held out with it; where every group
    is larger than that, the smallest one is.

    Raises:
        TuningError: all rows are of one example or prompt, so that none can be held out.

    >>> split_rows([{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"}, {"prompt": "c"}], 0.5, 0)
    Split(train=(1, 3), held_out=(0, 2))
    """
    if not part:
        return Split(tuple(range(len(rows))), ())
    groups = _groups(rows, examples or [None] * len(rows))
    if len(groups) < 2:
        raise TuningError(
            f"held_out is {part}, but the {len(rows)} rows are all of one example or prompt, and "
            "what is trained on must not be evaluated on. Give rows of several prompts, or set "
            "held_out = 0."
        )
    wanted = max(1, round(part * len(rows)))
    held_out: list[int] = []
    for group in random.Random(f"held out {seed}").sample(groups, len(groups)):
        if len(held_out) + len(group) <= wanted:
            held_out += group
    held_out = held_out or min(groups, key=len)
    train = {*range(len(rows))} - {*held_out}
    return Split(tuple(sorted(train)), tuple(sorted(held_out)))


def _groups(rows: Sequence[Mapping[str, Any]], examples: Sequence[Any]) -> list[list[int]]:
    """Rows that share an example id or a prompt, directly or by way of others, in order of their
    first row."""
    leader = list(range(len(rows)))

    def first(index: int) -> int:
        while leader[index] != index:
            index = leader[index]
        return index

    seen: dict[tuple[str, str], int] = {}
    for index, (row, example) in enumerate(zip(rows, examples, strict=True)):
        keys = [("prompt", json.dumps(row["prompt"], sort_keys=True))]
        keys += [("example", str(example))] if example is not None else []
        for key in keys:
            one, other = sorted((first(seen.setdefault(key, index)), first(index)))
            leader[other] = one
    groups: dict[int, list[int]] = {}
    for index in range(len(rows)):
        groups.setdefault(first(index), []).append(index)
    return list(groups.values())


def training_order(lengths: Sequence[int], steps: int, step_rows: int, seed: int) -> list[int]:
    """Indices of rows, ``steps * step_rows`` of them: shuffled passes one after the other.

    ``lengths`` are the rows' tokens. A step at the end of a pass is filled from the next one, so
    that every step has equally many rows. Within a step the longest come first, so that a forward
    pass pads little; a step's gradient does not depend on their order.

    >>> training_order([5, 9, 7], steps=2, step_rows=2, seed=0)
    [1, 0, 2, 0]
    """
    chance = random.Random(seed)
    stream: list[int] = []
    while len(stream) < steps * step_rows:
        stream += chance.sample(range(len(lengths)), len(lengths))
    ordered: list[int] = []
    for start in range(0, steps * step_rows, step_rows):
        ordered += sorted(
            stream[start : start + step_rows], key=lambda index: (-lengths[index], index)
        )
    return ordered
