"""Rows -> ``dspy.Example``: from a recipe's function, a JSONL file or the Hub; with ids, splits and
a check for overlap."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import dspy

from cowest_dspy.errors import ConfigError, DataError
from cowest_dspy.experiment.config import Config
from cowest_dspy.experiment.tables import Data
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.program.examples import check_inputs, examples, inputs_key
from cowest_dspy.utils.importing import call
from cowest_dspy.utils.jsonl import read_jsonl
from cowest_dspy.utils.reading import describe_os_error, expand_user, file_errors

Kind = TypeVar("Kind")
SPLITS = ("train", "dev", "test")


def read_split(
    source: str,
    split: str,
    inputs: Sequence[str],
    *,
    seed: int = 0,
    limit: int | None = None,
    rows: str | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> list[dspy.Example]:
    """The examples of one split: ``source`` is "file.py:function" (called with the split,
    ``seed=``, ``rows=`` where it is given, and ``arguments``), "file.jsonl" with a ``split`` field
    in each row, or "hub:NAME" (optionally "hub:NAME:CONFIG").

    Raises:
        DataError: nothing in that split, no such file (also one that a recipe's function reads), or
            a line that is not JSON.
    """
    where = f"{Path(source.rpartition(':')[0] or source).name} ({split})"
    if source.startswith("hub:"):
        found = _from_hub(source, split)
    elif source.endswith(".jsonl"):
        found = [row for row in read_jsonl(Path(source)) if row.get("split", "train") == split]
    else:
        given = {"seed": seed, "rows": rows, **(arguments or {})}
        found = _from_function(source, split, where, given)
    return examples(found[:limit], inputs, where=where)


def load_program(config: Config) -> Collaboration:
    """The recipe's program, not bound yet.

    Raises:
        ConfigError: the function that [program] names gave something else.
    """
    return from_recipe(config, config.program, Collaboration, draft=config.draft)


def from_recipe(config: Config, reference: str, kind: type[Kind], **given: Any) -> Kind:
    """What a function of a recipe gives, called with ``given`` and, where it takes them, with the
    arguments of [data].

    Raises:
        ConfigError: it gave something that is not of this kind.
    """
    made = call(reference, given=given, offered=config.data.given)
    if not isinstance(made, kind):
        raise ConfigError(
            f"{reference} gave {type(made).__name__}: a function that returns a "
            f"{kind.__module__}.{kind.__name__} is expected."
        )
    return made


def load_splits(config: Config, program: Collaboration) -> dict[str, list[dspy.Example]]:
    """The examples of train, dev and test.

    Raises:
        DataError: as :func:`read_split`; the same inputs in two splits; or an input is missing that
            the program, or the one of [evaluate] weak, needs.
    """
    made = {split: configured_split(config.data, split) for split in SPLITS}
    check_apart(made, config.data.inputs)
    weak = config.evaluate.weak
    modules = {"[evaluate] weak": call(weak, offered=config.data.given)} if weak else {}
    for split, rows in made.items():
        check_inputs(program, rows[:1], modules=modules, where=split, table=True)
    return made


def configured_split(source: Data, split: str) -> list[dspy.Example]:
    """The examples of one split as a configuration's [data] names and limits them. Raises DataError
    as :func:`read_split`."""
    return read_split(
        source.source,
        split,
        source.inputs,
        limit=getattr(source, split),
        seed=source.seed,
        rows=source.rows,
        arguments=source.arguments,
    )


def read_rows(where: str | Path, split: str) -> list[dict[str, Any]]:
    """The rows of one split as they were published: ``where`` is a folder with ``<split>.jsonl``,
    or "hub:NAME[:CONFIG]".

    A recipe over a public dataset reads its rows with this, so that the same recipe works from a
    local copy and from the Hub.

    Raises:
        DataError: no such folder or file (with what the folder holds), a line that is not JSON, or
            a Hub dataset that cannot be had, for instance without a network.
    """
    if str(where).startswith("hub:"):
        return _from_hub(str(where), split)
    folder = expand_user(where)
    file = folder / f"{split}.jsonl"
    with file_errors(DataError, folder):
        if not folder.is_dir():
            raise DataError(
                f"There is no folder {folder}. Rows come from a folder with {file.name}, or from "
                'the Hub: "hub:NAME".'
            )
        if not file.is_file():
            held = (
                ", ".join(sorted(path.name for path in folder.glob("*.jsonl"))) or "no .jsonl file"
            )
            raise DataError(f"There is no {file.name} in {folder}, which holds {held}.")
    return read_jsonl(file)


def check_apart(splits: Mapping[str, Sequence[dspy.Example]], inputs: Sequence[str]) -> None:
    """Raises DataError when the same inputs, but for case and spacing, stand in two splits."""
    owner: dict[str, tuple[str, str]] = {}
    for split, made in splits.items():
        for example in made:
            key = inputs_key({name: example[name] for name in inputs})
            before = owner.setdefault(key, (split, example.id))
            if before[0] != split:
                raise DataError(
                    f"{before[0]} ({before[1]}) and {split} ({example.id}) hold the same inputs: "
                    "what is tested must not be "
                    "trained on. Drop one of the two."
                )


def _from_function(source: str, split: str, where: str, given: Mapping[str, Any]) -> list[Any]:
    """What a recipe's function gives. A file that it cannot read is named; any other error of it is
    its own."""
    try:
        found = call(source, split, given=given)
        if isinstance(found, Iterable):
            return list(cast("Iterable[Any]", found))
    except FileNotFoundError as error:
        raise DataError(
            f"{where}: [data] source {source} reads {error.filename}, and there is no such file."
        ) from error
    except (OSError, UnicodeError, RecursionError, csv.Error, json.JSONDecodeError) as error:
        what = (
            describe_os_error(error)
            if isinstance(error, OSError)
            else f"{type(error).__name__}: {error}."
        )
        raise DataError(
            f"{where}: [data] source {source} reads a file that cannot be read. {what}"
        ) from error
    raise DataError(
        f"{where}: [data] source {source} gave a {type(found).__name__}; rows are expected, a "
        "list of dictionaries."
    )


def _from_hub(source: str, split: str) -> list[dict[str, Any]]:
    from datasets import load_dataset

    _, name, *config = source.split(":")
    try:
        return [dict(row) for row in load_dataset(name, *config, split=split)]
    except Exception as error:
        raise DataError(
            f'The Hub dataset "{name}" ({split}) cannot be had: {type(error).__name__}: {error}. '
            "Rows that are here are named in "
            'the TOML: [data] rows = "FOLDER", with a file for each split, such as train.jsonl.'
        ) from error


def sft_rows(config: Config, reference: str, which: str, **offered: Any) -> list[dict[str, Any]]:
    """The rows of a function of [sft]: ``which`` is "drafts" or "answers"; ``offered`` are
    arguments that it gets where it takes them.

    Raises:
        ConfigError: it gave none.
    """
    given = config.data.given
    if which == "drafts":
        given["draft"] = config.draft
    rows = call(reference, given=given, offered=offered)
    if not rows:
        raise ConfigError(f"[sft] {which} = {reference} gave no rows.")
    return list(rows)
