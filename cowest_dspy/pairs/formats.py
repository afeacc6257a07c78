"""One preference, and how it is read from a row of JSON Lines or of a dataset, also of one that
others made. Pairs are read in each of TRL's formats (https://huggingface.co/docs/trl/dataset_formats):

    conversational    {"prompt": [user ...], "chosen": [assistant], "rejected": [assistant]}
                      what we write
    standard          {"prompt": "...", "chosen": "...", "rejected": "..."}
    implicit prompt   {"chosen": [user ..., assistant], "rejected": [user ..., assistant]}
                      with a shared beginning
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from cowest_dspy.errors import PairsError, describe_faults


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


Row = TypeVar("Row")


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


def _validate(kind: type[Row], values: dict[str, Any], where: str) -> Row:
    try:
        return TypeAdapter(kind).validate_python(values)
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
