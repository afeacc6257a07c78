"""Rows in the schemas in which MedMCQA and IfQA are published, about things that do not exist: made
here, none of it is theirs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

SECRET = "zebrasecret"
"""Stands in every invented explanation, so that a prompt which holds it has leaked one."""


def _word(draw: random.Random) -> str:
    return "".join(draw.choice("bdfklmnprst") + draw.choice("aeiou") for _ in range(3))


def medical(count: int, name: str, explained: float = 1.0) -> list[dict[str, Any]]:
    """``count`` questions of four options; a part of them ``explained``, as the published ones with
    the answer given away."""
    draw = random.Random(f"medical-{name}")
    rows: list[dict[str, Any]] = []
    for number in range(count):
        gland, part, *options = (_word(draw) for _ in range(6))
        right = draw.randrange(4)
        known = f"The {gland} of the {part} gives {options[right]} to {SECRET} cells."
        said = f"Ans. {'ABCD'[right]}. {options[right]}{known} So option D is wrong."
        rows.append(
            {
                "id": f"{name}-{number}",
                "question": f"What does the {gland} gland beside the {part} make?",
                **dict(zip(("opa", "opb", "opc", "opd"), options, strict=True)),
                "cop": right,
                "choice_type": "single",
                "exp": said if number < explained * count else None,
                "subject_name": "Anatomy of the unreal",
                "topic_name": None,
            }
        )
    return rows


def counterfactual(count: int, name: str) -> list[dict[str, Any]]:
    """``count`` questions that begin with "if", each with two accepted answers and a passage of
    several sentences."""
    draw = random.Random(f"counterfactual-{name}")
    rows: list[dict[str, Any]] = []
    for number in range(count):
        town, river, king, year = (
            _word(draw).title(),
            _word(draw).title(),
            _word(draw).title(),
            draw.randint(1000, 1999),
        )
        rows.append(
            {
                "idx": number,
                "question": (
                    f"If {king} had not built {town} on the {river}, in what year would "
                    "its bridge have been first?"
                ),
                "answers": [str(year), f"in {year}"],
                "context": [
                    f"Nothing much is told of the {river} before. {king} built {town} and its "
                    f"bridge over the {river} in {year}. "
                    f"Later the people of {SECRET} ate fish on Sundays, as they had always done."
                ],
            }
        )
    return rows


def write_rows(folder: Path, **splits: list[dict[str, Any]]) -> Path:
    """The folder, with a JSON Lines file for each split."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )
    return folder
