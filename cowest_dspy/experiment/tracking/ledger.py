"""Which runs of a tracker a run of ours has, and what they were told: plain JSON, kept in the run's
store.

{"key": "3f0c...", "place": "...", "parts": {"": {"run": "...", "training": null, ...}, "round 1":
{...}}, "files": {...}}
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cowest_dspy.experiment.tracking.facts import Part, Row

Ledger = dict[str, Any]


def new(place: str = "", key: str | None = None) -> Ledger:
    """Of a run that nobody knows in that place. Its key is in every run that a tracker has of it,
    so that they are found again."""
    return {"key": key or uuid.uuid4().hex, "place": place, "parts": {}, "files": {}}


def entry(
    ledger: Ledger, part: Part, *, begins: bool = False
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What is known of a part; and what was known of it before, where its training was done anew:
    that is another run.

    ``begins``: its training begins now, so that one which is known is of the past.
    """
    known = ledger["parts"].get(part.name)
    before = None
    if known is None:
        known = _fresh(1)
    elif known["training"] and (begins or (part.training and part.training != known["training"])):
        before, known = known, _fresh(known["times"] + 1)
    if part.training:
        known["training"] = part.training
    ledger["parts"][part.name] = known
    return known, before


def with_beginning(parts: Sequence[Part], begins: str) -> list[Part]:
    """The parts, with an empty one in the place of that whose training begins now: what is known of
    it is of an earlier one."""
    others = [part for part in parts if part.name != begins]
    return [*others, Part(begins)] if begins else others


def _fresh(times: int) -> dict[str, Any]:
    return {"run": None, "training": None, "times": times, "rows": [], "values": {}}


def title_of(title: str, part: Part, known: Mapping[str, Any]) -> str:
    """What a part's run is called: "toy, seed 0: round 2", and "... (2)" when it was done again."""
    again = f" ({known['times']})" if known["times"] > 1 else ""
    return (f"{title}: {part.name}" if part.name else title) + again


def unique(title: str, ledger: Ledger) -> str:
    """A title that no other run's runs have: with a part of its key. For trackio, which finds runs
    by their names."""
    return f"{title} [{ledger['key'][:6]}]"


def digest_of(row: Row) -> str:
    """A row's content as 12 hexadecimal digits."""
    return hashlib.sha256(json.dumps([row.step, row.values], sort_keys=True).encode()).hexdigest()[
        :12
    ]


def changed_files(ledger: Ledger, folder: Path, names: list[str]) -> dict[str, str]:
    """The files that are not as they were when they were uploaded last, with their hashes."""
    now = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    return {name: found for name, found in now.items() if ledger["files"].get(name) != found}
