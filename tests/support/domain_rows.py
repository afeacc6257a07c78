"""Rows in the schemas in which MedMCQA, IfQA and GeoQuery are published, about things that do not
exist: made here, none of it is theirs."""

from __future__ import annotations

import json
import random
import sqlite3
from contextlib import closing
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


ISLANDS = ("arn", "bost", "cull", "dray", "eck", "fenn", "gorse", "holm", "innis", "jarl")
# Of each shape of SQL a question, and the query that answers it.
_ASKED = (
    ("what is baked on {}", "SELECT bread FROM island WHERE island_name = '{}'"),
    ("how many live on {}", "SELECT people FROM island WHERE island_name = '{}'"),
    ("which ferry lands at {}", "SELECT ferry_name FROM ferry WHERE island_name = '{}'"),
    ("how many ferries reach {}", "SELECT COUNT(ferry_name) FROM ferry WHERE island_name = '{}'"),
    (
        "who bakes as {} does",
        "SELECT island_name FROM island WHERE bread = "
        "(SELECT bread FROM island WHERE island_name = '{}')",
    ),
    (
        "which slow ferry lands at {}",
        "SELECT ferry_name FROM ferry WHERE knots < 12 AND island_name = '{}'",
    ),
    ("is {} an island", "SELECT island_name FROM island WHERE island_name = '{}' AND people > 0"),
)
_ASKED_ONCE = tuple(
    (f"where do more than {count} live", f"SELECT island_name FROM island WHERE people > {count}")
    for count in range(100, 150)
)


def islands(folder: Path) -> Path:
    """The folder, with a small database of islands and ferries, and 120 questions with their SQL:
    seven shapes of ten, fifty of one."""
    rows = [
        {"id": f"{shape}-{number}", "question": asked.format(name), "sql": sql.format(name)}
        for shape, (asked, sql) in enumerate(_ASKED)
        for number, name in enumerate(ISLANDS)
    ]
    for shape, (asked, sql) in enumerate(_ASKED_ONCE, len(_ASKED)):
        rows.append({"id": f"{shape}-0", "question": asked, "sql": sql})
    write_rows(folder, train=rows[:100], dev=rows[100:])
    with closing(sqlite3.connect(folder / "geography.sqlite")) as database:
        database.execute("CREATE TABLE island (island_name TEXT, people INT, bread TEXT)")
        database.execute("CREATE TABLE ferry (ferry_name TEXT, knots REAL, island_name TEXT)")
        for number, name in enumerate(ISLANDS):
            bread = ("rye", "oat", "spelt")[number % 3]
            database.execute("INSERT INTO island VALUES (?, ?, ?)", (name, 40 * number, bread))
            ferry = (f"the {name} maid", 8.5 + number, name)
            database.execute("INSERT INTO ferry VALUES (?, ?, ?)", ferry)
        database.commit()
    return folder


def write_rows(folder: Path, **splits: list[dict[str, Any]]) -> Path:
    """The folder, with a JSON Lines file for each split."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )
    return folder
