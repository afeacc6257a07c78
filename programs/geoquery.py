"""GeoQuery: questions about the geography of the United States (Zelle and Mooney, 1996) -> SQL
(Finegan-Dollak et al., ACL 2018), and the program that writes it.

The rows are those of jkkummerfeld/text2sql-data on GitHub, which states no licence for them. They
are given as a folder, [data] rows = "FOLDER", with

    train.jsonl, and perhaps dev.jsonl and test.jsonl: one question a line, with question, sql (one
        SELECT for SQLite, its variables filled in) and id, "SHAPE-NUMBER": two questions have the
        same shape where their SQL differs in names and numbers alone, as in the authors' file
    geography.sqlite: the database

All rows together become four splits by shape, so that no shape is in two of them: what is tested is
SQL of shapes that nobody was taught. There are five folds; fold in [data.arguments] names the one
that is tested on, so that over all five each question is tested once.

    test     the fold
    dev      a tenth of all rows: to choose settings and accept rounds
    train    a fifth: questions and answers, whose drafts are judged by what the strong model makes
             of them
    archive  the others: the drafter learns from these, and worked examples are of them
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import dspy

from cowest_dspy import Collaboration, LineAdapter
from cowest_dspy.errors import DataError, ProgramError
from cowest_dspy.experiment.data import read_rows
from cowest_dspy.optimizers.router import Head, Router
from cowest_dspy.program.adapters import labelled_lines, training_row
from cowest_dspy.program.collaboration import signature_of
from cowest_dspy.utils.sql import QueryResult, run_query

DATABASE = "geography.sqlite"
FOLDS = 5
SHARES = {"dev": 0.1, "train": 0.2}  # of all rows
SHOTS = 8  # worked examples
WRONG = (1, 4, 6)  # of these, the ones whose draft is wrong, so that none is believed unread
LONGEST_SHOT = 200  # characters of its SQL
SHOWN = 3  # rows of a result that a draft shows
LONGEST_ROW = 60  # characters of each
NOTHING = ("no rows", "1 row: NULL", "1 row: 0")

DRAFT_TASK = "Write the SQL query that answers the question."
NOTES_TASK = "Write which tables, columns and conditions answer the question in SQL."
ANSWER_TASK = (
    "Write one SELECT for SQLite that answers the question about geography. Give only the SQL."
)
PLAN_TASK = (
    "Write which tables, columns and conditions the question about geography asks for, then one "
    "SELECT for SQLite that answers it."
)


def examples(split: str, seed: int = 0, rows: str = "", fold: int = 0) -> list[dict[str, Any]]:
    """The questions of a split: dicts of id, question, sql and database (its path, for the metric).

    Args:
        split: archive, train, dev or test.
        seed: of the folds and splits.
        rows: the folder.
        fold: which fold is test, from 0 to 4.

    Raises:
        DataError: the folder cannot be read or lacks something, or there is no such split or fold.
    """
    made = _splits(str(rows), seed, fold)
    if split not in made:
        raise DataError(f'GeoQuery has no split "{split}": use {", ".join(reversed(made))}.')
    database = str(_database(rows))
    return [
        {"id": row["id"], "question": row["question"], "sql": row["sql"], "database": database}
        for row in made[split]
    ]


@lru_cache(maxsize=8)
def _splits(rows: str, seed: int, fold: int) -> dict[str, list[dict[str, Any]]]:
    if fold not in range(FOLDS):
        raise DataError(f"GeoQuery has no fold {fold}: use 0 to {FOLDS - 1}.")
    of_shape: dict[str, list[dict[str, Any]]] = {}
    for row in _read(rows):
        of_shape.setdefault(row["id"].rpartition("-")[0], []).append(row)
    size = {shape: len(those) for shape, those in of_shape.items()}
    shapes = random.Random(f"geoquery-{seed}").sample(sorted(size), len(size))
    folds: list[list[str]] = [[] for _ in range(FOLDS)]
    for shape in sorted(shapes, key=lambda shape: -size[shape]):  # the largest first: even folds
        min(folds, key=lambda held: sum(size[one] for one in held)).append(shape)
    parts = {"test": folds[fold]}
    left = [shape for shape in shapes if shape not in folds[fold]]
    for split, share in SHARES.items():
        parts[split], room = [], round(share * sum(size.values()))
        for shape in left:
            if size[shape] <= room:
                parts[split].append(shape)
                room -= size[shape]
        left = [shape for shape in left if shape not in parts[split]]
    parts["archive"] = left
    draw = random.Random(f"geoquery-rows-{seed}")
    made = {split: [row for one in held for row in of_shape[one]] for split, held in parts.items()}
    return {split: draw.sample(those, len(those)) for split, those in made.items()}


def _read(rows: str) -> list[dict[str, Any]]:
    """The rows of all files of the folder, checked, sorted by id."""
    folder = _database(rows).parent
    files = [name for name in ("train", "dev", "test") if (folder / f"{name}.jsonl").is_file()]
    made: dict[str, dict[str, Any]] = {}
    for name in files or ["train"]:
        for number, row in enumerate(read_rows(folder, name), start=1):
            shape, dash, _ = str(row.get("id", "")).rpartition("-")
            if not (shape and dash and row.get("question") and row.get("sql")):
                raise DataError(
                    f'GeoQuery ({name}), row {number}: a row has id ("SHAPE-NUMBER"), question '
                    "and sql."
                )
            if made.setdefault(row["id"], row) is not row:
                raise DataError(f"GeoQuery ({name}), row {number}: two rows are {row['id']}.")
    return [made[one] for one in sorted(made)]


def _database(rows: str) -> Path:
    file = Path(rows).expanduser() / DATABASE
    if not rows or not file.is_file():
        raise DataError(
            f"GeoQuery is not downloaded: [data] rows names {rows or 'nothing'}, and a folder "
            f"with train.jsonl (id, question, sql) and {DATABASE} is expected. The authors publish "
            "both on GitHub, jkkummerfeld/text2sql-data (data/geography*); geoquery.py says how "
            "a row looks."
        )
    return file.resolve()


# The database


@lru_cache(maxsize=8)
def tables(database: Path) -> dict[str, tuple[str, ...]]:
    """The columns of each table."""
    named = run_query(database, "SELECT name FROM sqlite_master WHERE type = 'table'").rows
    return {
        name: run_query(database, f'SELECT * FROM "{name}" LIMIT 0').columns for (name,) in named
    }


def schema(rows: str) -> str:
    """The database as text, one line a table: "city(city_name, population)"."""
    held = tables(_database(rows)).items()
    return "\n".join(f"{name}({', '.join(columns)})" for name, columns in held)


def result_text(result: QueryResult) -> str:
    """What running a query gave, on one line: "error: no such column: name", "no rows", "1 row:
    NULL", "51 rows: alabama; alaska; arizona; ..."."""
    if result.error:
        return f"error: {' '.join(result.error.split())}"
    if not result.rows:
        return "no rows"
    shown = [", ".join("NULL" if one is None else str(one) for one in row) for row in result.rows]
    first = [" ".join(row.split())[:LONGEST_ROW] for row in shown[:SHOWN]]
    more = ["..."] if len(shown) > SHOWN else []
    return f"{len(shown)} row{'s'[: len(shown) > 1]}: {'; '.join([*first, *more])}"


def gives_nothing(result: str) -> bool:
    """Whether a result's text is an error, no row, NULL or 0: nothing that could be an answer."""
    return result.startswith("error: ") or result in NOTHING


_CONDITION = r"[\w.]+\s*(?:<=|>=|<>|=|<|>)\s*(?:'[^']*'|[\w.]+\b(?!\s*\())"
_FUNCTION = re.compile(r"\b(?:COUNT|MAX|MIN|SUM|AVG)\b(?=\s*\()", re.IGNORECASE)


def notes(sql: str, database: Path) -> str:
    """Tables, columns, conditions and functions of a query: "Tables: city. Columns: city_name.
    Conditions: state_name = 'texas'."."""
    names = tables(database)
    bare = re.sub(r"'[^']*'", "''", sql)
    words = list(dict.fromkeys(re.findall(r"\w+", bare)))
    conditions = re.findall(_CONDITION, sql)
    parts = {
        "Tables": [word for word in words if word in names],
        "Columns": [word for word in words if any(word in held for held in names.values())],
        "Conditions": list(dict.fromkeys(" ".join(one.split()) for one in conditions)),
        "Functions": list(dict.fromkeys(_FUNCTION.findall(bare))),
    }
    return " ".join(f"{name}: {', '.join(held)}." for name, held in parts.items() if held)


# Drafts


class Write(dspy.Signature):
    __doc__ = DRAFT_TASK

    question: str = dspy.InputField()
    sql: str = dspy.OutputField()


class Note(dspy.Signature):
    __doc__ = NOTES_TASK

    question: str = dspy.InputField()
    notes: str = dspy.OutputField()


class Alone(dspy.Signature):
    __doc__ = ANSWER_TASK

    question: str = dspy.InputField()
    sql: str = dspy.OutputField()


class Refine(dspy.Signature):
    __doc__ = ANSWER_TASK

    question: str = dspy.InputField()
    draft: str = dspy.InputField()
    sql: str = dspy.OutputField()


class WriteAndRun(dspy.Module):
    """Writes SQL and runs it: the draft is the SQL and what it gave. Only the SQL is the model's,
    so only that is tuned.

    Args:
        rows: the folder with the database; without it nothing can be drafted.
    """

    output_names = ("sql", "result")

    def __init__(self, rows: str) -> None:
        super().__init__()
        self.rows, self.write = rows, dspy.Predict(Write)

    def forward(self, question: str) -> dspy.Prediction:
        """Write SQL for the question and run it."""
        sql = self.write(question=question).sql
        return dspy.Prediction(result=result_text(run_query(_database(self.rows), sql)), sql=sql)

    def draft_features(self, draft: str) -> dict[str, float]:
        """What a router is told of a draft: whether it fails, and whether it gives no row, NULL or
        0."""
        result = draft.rpartition("\nResult: ")[2]
        fails = result.startswith("error: ")
        return {"fails": float(fails), "gives_nothing": float(gives_nothing(result) and not fails)}


DRAFTS = ("sql", "result", "notes")


def _drafting(draft: str) -> type[dspy.Signature]:
    if draft not in DRAFTS:
        raise ProgramError(f'There is no draft format "{draft}": use {", ".join(DRAFTS)}.')
    return Note if draft == "notes" else Write


def _draft_text(draft: str, sql: str, database: Path) -> str:
    """A draft of this format that says this SQL."""
    if draft == "notes":
        return notes(sql, database)
    result = {"result": result_text(run_query(database, sql))} if draft == "result" else {}
    return labelled_lines({"sql": sql, **result})


def draft_rows(
    seed: int = 0, rows: str = "", fold: int = 0, draft: str = "result"
) -> list[dict[str, Any]]:
    """What the drafter learns from: the questions of archive in the prompts of ``program(draft)``,
    and their SQL; of the format "notes", the notes that are made of it."""
    signature, database = _drafting(draft), _database(rows)
    return [
        training_row(
            signature,
            {"question": row["question"]},
            {"sql": row["sql"], "notes": notes(row["sql"], database)},
        )
        for row in _splits(str(rows), seed, fold)["archive"]
    ]


# Worked examples


def shots(
    draft: str = "result", rows: str = "", seed: int = 0, fold: int = 0, most: int = SHOTS
) -> list[dspy.Example]:
    """Worked examples of archive, each of another shape, with drafts of this format. Three in eight
    drafts are wrong: of the gold SQL a condition is left out, or a column exchanged."""
    database, draw = _database(rows), random.Random(f"geoquery-shots-{seed}-{fold}")
    of_shape: dict[str, Mapping[str, Any]] = {}
    for row in _splits(str(rows), seed, fold)["archive"]:
        if len(row["sql"]) <= LONGEST_SHOT:
            of_shape.setdefault(row["id"].rpartition("-")[0], row)
    made: list[dspy.Example] = []
    for row in of_shape.values():
        if len(made) == most:
            break
        place, gold = len(made), run_query(database, row["sql"])
        drafted = row["sql"] if gold.rows else ""
        if drafted and place % SHOTS in WRONG:
            faults = _faults(row["sql"], database, draw, leave_out=place % SHOTS == WRONG[0])
            drafted = next(
                (one for one in faults if not run_query(database, one).matches(gold)), ""
            )
        if drafted:
            text = _draft_text(draft, drafted, database)
            shot = dspy.Example(question=row["question"], draft=text, sql=row["sql"])
            made.append(shot.with_inputs("question", "draft"))
    return made


def _faults(sql: str, database: Path, draw: random.Random, *, leave_out: bool) -> Iterator[str]:
    """The query with one fault: without one of its conditions, or with another column."""
    if leave_out:
        whole = rf"\s+AND\s+{_CONDITION}|\s+WHERE\s+{_CONDITION}(?=\s*(?:\)|$))"
        for found in re.finditer(whole, sql):
            yield sql[: found.start()] + sql[found.end() :]
        return
    columns = sorted({column for held in tables(database).values() for column in held})
    places = list(re.finditer(rf"\b(?:{'|'.join(map(re.escape, columns))})\b", sql))
    for found in draw.sample(places, len(places)):
        other = draw.choice([column for column in columns if column != found[0]])
        yield sql[: found.start()] + other + sql[found.end() :]


# Programs


def program(draft: str = "result", rows: str = "", seed: int = 0, fold: int = 0) -> Collaboration:
    """The weak model drafts SQL, SQL with what it gave, or notes; the strong one, which has the
    schema and worked examples, writes the SQL. Without ``rows`` it has neither."""
    signature = _drafting(draft)
    return Collaboration(
        draft=WriteAndRun(rows) if draft == "result" else dspy.Predict(signature),
        refine=dspy.Predict(_with_schema(Refine, rows) if rows else Refine),
        demos=shots(draft, rows, seed, fold) if rows else [],
        adapter=LineAdapter(),
    )


def planned(draft: str = "result", rows: str = "", seed: int = 0, fold: int = 0) -> Collaboration:
    """As :func:`program`, but before the SQL the strong model writes which tables, columns and
    conditions the question asks for, with a draft and alone: so that a draft that lacks some of
    them, or has others, is not copied unread."""
    made = program(draft, rows, seed, fold)
    plan = dspy.OutputField(desc="tables, columns and conditions that the question asks for")
    (refine,) = made.refine.predictors()
    signature = signature_of(refine)
    told = signature.instructions.replace(ANSWER_TASK, PLAN_TASK)
    return Collaboration(
        draft=made.draft,
        refine=dspy.Predict(signature.with_instructions(told).insert(0, "plan", plan, str)),
        demos=[shot.copy(plan=notes(shot.sql, _database(rows))) for shot in refine.demos],
        adapter=LineAdapter(),
    )


class CheckFirst(dspy.Module):
    """Writes SQL without the draft and runs it; only where that fails, or gives no row, NULL or 0,
    it writes anew with the draft. Without a draft both prompts are the same, and so is the SQL.

    Args:
        rows: the folder with the database.
        write: question -> sql.
        read: question, draft -> sql.
        own: whether it is shown its own SQL and what that gave, in the place of a draft.
    """

    def __init__(
        self, rows: str, write: dspy.Module, read: dspy.Module, *, own: bool = False
    ) -> None:
        super().__init__()
        self.rows, self.write, self.read, self.own = rows, write, read, own

    def forward(self, question: str, **draft: str) -> dspy.Prediction:
        """Write SQL for the question."""
        made = self.write(question=question)
        database = _database(self.rows)
        if not gives_nothing(result_text(run_query(database, made.sql))):
            return made
        shown = {"draft": _draft_text("result", made.sql, database)} if self.own else draft
        return self.read(question=question, **shown)


def checked(draft: str = "result", rows: str = "", seed: int = 0, fold: int = 0) -> Collaboration:
    """As :func:`program`, but the strong model checks first what its own SQL gives, and reads a
    draft only where that is nothing: so that a wrong draft is not copied over right SQL. Without
    ``rows`` there is nothing to check with."""
    made = program(draft, rows, seed, fold)
    if not rows:
        return made
    (read,) = made.refine.predictors()
    refine = CheckFirst(rows, made.alone.module, read)
    return Collaboration(draft=made.draft, refine=refine, adapter=LineAdapter())


def repaired(rows: str, seed: int = 0, fold: int = 0) -> dspy.Module:
    """The strong model alone, which is shown its own SQL where that gives nothing, in the prompt
    that :func:`checked` shows the weak model's in."""
    made = program("result", rows, seed, fold)
    (read,) = made.refine.predictors()
    return CheckFirst(rows, made.alone.module, read, own=True)


def bare() -> dspy.Module:
    """The strong model alone with the question only."""
    return dspy.Predict(Alone)


def with_schema(rows: str) -> dspy.Module:
    """The strong model alone with the schema, and no worked example."""
    return dspy.Predict(_with_schema(Alone, rows))


def with_examples(rows: str, seed: int = 0, fold: int = 0) -> dspy.Module:
    """The strong model alone with worked examples, and no schema."""
    module = dspy.Predict(Alone)
    module.demos = [
        dspy.Example(question=shot.question, sql=shot.sql).with_inputs("question")
        for shot in shots("sql", rows, seed, fold)
    ]
    return module


def keep_what_gives() -> Router:
    """The router that is a rule and not fitted: SQL that gives something is the answer; where it
    fails, or gives no row, NULL or 0, the strong model answers alone."""
    return Router(
        features=("fails", "gives_nothing"),
        heads={
            "weak": Head(weights=(-2.0, -2.0), intercept=1.0),
            "strong": Head(weights=(0.0, 0.0), intercept=0.0),
            "collaborate": Head(weights=(0.0, 0.0), intercept=-9.0),
        },
        costs={"weak": 0.0, "strong": 1.0, "collaborate": 1.0},
    )


def _with_schema(signature: type[dspy.Signature], rows: str) -> type[dspy.Signature]:
    # In the instructions: it is the same for all questions, and the drafter does without.
    told = f"{ANSWER_TASK} Text in the tables is lower case. The tables:\n{schema(rows)}"
    return signature.with_instructions(told)
