"""Training rows: what they must look like, and chat rows turned into them.

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

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cowest_dspy.errors import TuningError

Row = Mapping[str, Any]
Messages = list[dict[str, str]]


def sft_rows(rows: Iterable[Row]) -> list[dict[str, Messages]]:
    """Checked rows with exactly ``prompt`` and ``completion``.

    Raises:
        TuningError: no rows, or one that is not of this shape.
    """
    return _checked(rows, ("completion",), "SFT")


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
                f"{_shown(label)} was given."
            )
    if len(set(labels)) < 2:
        raise TuningError(
            f"All {len(labels)} rows have the label {str(labels[0]).lower()}: KTO learns from the "
            "difference, so both labels are "
            "needed. Add rows of the other label" + (", or use SFT." if labels[0] else ".")
        )
    return [{**row, "label": label} for row, label in zip(checked, labels, strict=True)]


def chat_rows(rows: Iterable[Row]) -> list[dict[str, Messages]]:
    """DSPy's chat rows as prompt and completion: the last message is what is learnt.

    Raises:
        TuningError: no rows, or one that does not end in an assistant message.
    """
    split = []
    for index, row in enumerate(rows):
        messages = row.get("messages") if isinstance(row, Mapping) else None
        if not isinstance(messages, Sequence) or len(messages) < 2:
            raise TuningError(
                f'Row {index} is no chat row: {{"messages": [user ..., assistant ...]}} was '
                f"expected, {_shown(row)} given."
            )
        split.append({"prompt": messages[:-1], "completion": messages[-1:]})
    return sft_rows(split)


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
            f"{_shown(value)} was given. A row has {', '.join(('prompt', *sides))}."
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


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
