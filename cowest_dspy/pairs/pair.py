"""One preference pair, and how it is read from a row of JSON Lines or of a dataset, also from one
that others made.

    conversational    {"prompt": [user ...], "chosen": [assistant], "rejected": [assistant]}
                      what we write
    standard          {"prompt": "...", "chosen": "...", "rejected": "..."}
    implicit prompt   {"chosen": [user ..., assistant], "rejected": [user ..., assistant]}
                      with a shared beginning

These are the formats of TRL (https://huggingface.co/docs/trl/dataset_formats). Texts of the
standard one become messages.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cowest_dspy.errors import PairsError

Messages = tuple[dict[str, str], ...]
_AN_EXAMPLE = 'a text, or a list of messages such as [{"role": "user", "content": "..."}]'


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
    chosen_influence: float | None
    rejected_influence: float | None
    weak_model: str
    strong_model: str
    round: int
    chosen_score: float | None = None
    rejected_score: float | None = None
    alone_score: float | None = None
    run: str = ""


def pair_from(row: Any, number: int, source: str) -> Pair:
    """The pair of a row in one of the three formats; other columns than ours are left aside.

    Args:
        number: the row's number from 1, which is its example's id when it has none.
        source: where the row stands, for the message.

    Raises:
        PairsError: the row is of none of the formats, lacks a side, or has twice the same; with its
            number.
    """
    where = f"{source}, row {number}"
    if not isinstance(row, Mapping):
        raise PairsError(
            f"{where}: {_shown(row)} is no row. Of several splits, give one: dataset['train']."
        )
    prompt, chosen, rejected = _sides(row, where)
    if chosen == rejected:
        raise PairsError(f"{where}: chosen and rejected are the same text: that is no preference.")
    return Pair(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        example_id=_text(row, "example_id", f"row {number}"),
        chosen_index=int(_number(row, "chosen_index", where) or 0),
        rejected_index=int(_number(row, "rejected_index", where) or 0),
        chosen_influence=_number(row, "chosen_influence", where),
        rejected_influence=_number(row, "rejected_influence", where),
        weak_model=_text(row, "weak_model", "imported"),
        strong_model=_text(row, "strong_model", "imported"),
        round=int(_number(row, "round", where) or 0),
        chosen_score=_number(row, "chosen_score", where),
        rejected_score=_number(row, "rejected_score", where),
        alone_score=_number(row, "alone_score", where),
        run=_text(row, "run", ""),
    )


def listed(value: Any) -> Any:
    """Messages as the list of dictionaries that JSON and datasets have; anything else as it is."""
    return [dict(message) for message in value] if isinstance(value, tuple) else value


def _sides(row: Mapping[str, Any], where: str) -> tuple[Messages, Messages, Messages]:
    chosen, rejected = (
        _messages(row.get(name), name, "assistant", where) for name in ("chosen", "rejected")
    )
    given = row.get("prompt")
    # Some datasets repeat as a text what both conversations begin with.
    whole = isinstance(given, str) and "assistant" not in (chosen[0]["role"], rejected[0]["role"])
    if given is None or whole:
        prompt, chosen, rejected = _without_shared_beginning(chosen, rejected, where)
    else:
        prompt = _messages(given, "prompt", "user", where)
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if not side or side[-1]["role"] != "assistant" or not side[-1]["content"].strip():
            raise PairsError(
                f'{where}: "{name}" must end in an assistant message that says something.'
            )
    return prompt, chosen, rejected


def _without_shared_beginning(
    chosen: Messages, rejected: Messages, where: str
) -> tuple[Messages, Messages, Messages]:
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if not shared:
        raise PairsError(
            f'{where}: there is no "prompt", and chosen and rejected do not begin with the same '
            "messages, so that it is not clear "
            f"what both answer. Give a prompt: {_AN_EXAMPLE}."
        )
    if shared == len(chosen) == len(rejected):
        raise PairsError(f"{where}: chosen and rejected are the same text: that is no preference.")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _messages(value: Any, name: str, role: str, where: str) -> Messages:
    """Messages of a list, or the one message of a text."""
    if isinstance(value, str) and value.strip():
        return ({"role": role, "content": value},)
    if (
        not isinstance(value, Sequence)
        or isinstance(value, str)
        or not value
        or not all(_is_message(item) for item in value)
    ):
        raise PairsError(
            f'{where}: "{name}" must be a list of messages or a text; {_shown(value)} was given. '
            f"Expected: {_AN_EXAMPLE}."
        )
    return tuple({"role": message["role"], "content": message["content"]} for message in value)


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("role"), str)
        and isinstance(value.get("content"), str)
    )


def _number(row: Mapping[str, Any], name: str, where: str) -> float | None:
    value = row.get(name)
    if value is None:
        return None
    # Not a number of hundreds of digits either, which is larger than any float.
    if (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max
    ):
        return float(value)
    raise PairsError(
        f'{where}: "{name}" must be a number; {_shown(value)} was given. Rename a column that '
        "means something else."
    )


def _text(row: Mapping[str, Any], name: str, otherwise: str) -> str:
    value = row.get(name)
    return otherwise if value is None else str(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
