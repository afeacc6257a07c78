"""Writes docs/reference/cli.md and toml.md from the code: the verbs as Typer knows them, the tables
as their JSON schema says.

python docs/make_reference.py            # `make docs` runs it, too
python docs/make_reference.py --check    # exit code 1 when a page is not what the code says
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

from cowest_dspy.cli.main import app
from cowest_dspy.experiment.config_text import json_schema

HERE = Path(__file__).resolve().parent / "reference"
NOTE = "<!-- written by docs/make_reference.py: change the code, then run `make reference` -->"

CLI = """# The command line

`cowest VERB --help` says the same in a terminal. Most verbs take TOML files, the task first and then the backend, and a run's
folder: what it has already is not asked or trained again. Exit codes: 0 done; 1 an error, whose message says what to type; 2 a
command that cannot be read; 130 stopped by Ctrl-C, with everything kept."""

TOML = """# What a TOML may say

A task and a backend are TOML files, read from left to right: a later file replaces whole tables, and single keys at the top. An
unknown key is an error that names the nearest one. Paths, and references such as `"recipe.py:name"`, are relative to the file in
which they stand; `package.module:name` is of an installed package. An empty `[sft]`, `[judge]`, `[dpo]`, `[budget]`, `[cycle]` or
`[compare]` in a later file takes an earlier one away.

`cowest config show TASK.toml BACKEND.toml` prints what files make together, with every default; `cowest config schema` is this page
for editors. In the tables below "-" is a default that leaves the thing out."""

# Tables in the order of a run, and the definition in the schema of each; what is not here comes
# after them.
ORDER = (
    "data", "weak", "sft", "collect", "influence", "pairs", "dpo", "kto", "rounds", "cycle", "evaluate", "compare", "report",
    "serve", "budget", "ray",
)  # fmt: skip
ROLES = ("weak", "strong", "judge")
BOUNDS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
}
TYPES = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "true or false",
    "object": "table",
}
PLURALS = {"string": "texts", "integer": "whole numbers", "number": "numbers"}


def cli_page() -> str:
    """The reference of the command line: each verb with its arguments, options and defaults."""
    verbs = sorted(_verbs("cowest", typer.main.get_command(app)))
    contents = [
        f"- [`{name}`](#{name.replace(' ', '-')}): {_first_sentence(verb.help)}"
        for name, verb in verbs
    ]
    return (
        "\n".join(
            [
                NOTE,
                "",
                CLI,
                "",
                *contents,
                *(line for name, verb in verbs for line in _verb(name, verb)),
            ]
        )
        + "\n"
    )


def _verbs(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    inner = getattr(command, "commands", None)
    if inner is None and not command.hidden:
        yield name, command
    for key, one in (inner or {}).items():
        yield from _verbs(f"{name} {key}", one)


def _verb(name: str, verb: Any) -> Iterator[str]:
    arguments = [one for one in verb.params if not one.opts[0].startswith("-")]
    options = [
        one for one in verb.params if one.opts[0].startswith("-") and "--help" not in one.opts
    ]
    usage = " ".join([name, *map(_argument, arguments), *(["[OPTIONS]"] if options else [])])
    yield from (
        "",
        f"## {name}",
        "",
        f"`{usage}`",
        "",
        verb.help.strip(),
        "",
        "| | default | |",
        "|---|---|---|",
    )
    for one in arguments:
        yield f"| `{_metavar(one)}` | {'required' if one.required else '-'} | {_cell(one.help)} |"
    for one in options:
        value = "" if getattr(one, "is_flag", False) else f" {one.opts[0].lstrip('-').upper()}"
        shown = (
            "required"
            if one.required
            else "-"
            if one.default in (None, False)
            else f"`{one.default}`"
        )
        many = (
            " May be given several times."
            if one.multiple and "several times" not in one.help
            else ""
        )
        yield f"| `{', '.join(one.opts)}{value}` | {shown} | {_cell(one.help)}{many} |"


def _metavar(argument: Any) -> str:
    return (argument.metavar or argument.name).upper() + ("..." if argument.nargs == -1 else "")


def _argument(argument: Any) -> str:
    return _metavar(argument) if argument.required else f"[{_metavar(argument)}]"


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[.:]) |\n\n", " ".join(text.split("\n\n")[0].split()), maxsplit=1)[
        0
    ].rstrip(":")


REPEATED = 6
"""Rows that a table has in common with an earlier one, from which on they are not shown again."""


def toml_page() -> str:
    """The reference of the TOML: each table with its keys, their types, defaults, bounds and
    meanings."""
    schema = json_schema()
    known, top = schema["$defs"], schema["properties"]
    tables = [name for name in (*ORDER, *top) if name in top and _definitions(top[name], known)]
    tables = [name for name in dict.fromkeys(tables) if name not in ROLES[1:]]
    plain = {key: value for key, value in top.items() if not _definitions(value, known)}
    scalars = {"properties": plain, "required": ["name", "program", "metric"]}
    lines = [NOTE, "", TOML, "", "## At the top", "", *_keys(scalars, known)]
    said: dict[str, str] = {}
    for name in tables:
        lines.extend(
            _models(known)
            if name in ROLES
            else _table(f"[{name}]", _definitions(top[name], known)[0], known, said)
        )
    return "\n".join(lines) + "\n"


def _models(known: dict[str, Any]) -> Iterator[str]:
    yield from ("", "## [weak], [strong], [judge]", "")
    yield (
        "The models. The weak one drafts and is tuned, the strong one refines, a judge rates; "
        "without `[judge]` that is"
    )
    yield "the strong one. `kind` says where a model runs, and what else may be said of it."
    for name in ("InProcess", "Api", "Server", "Engine"):
        yield from _table(
            f"kind = {json.dumps(known[name]['properties']['kind']['const'])}", name, known, {}
        )


def _table(title: str, name: str, known: dict[str, Any], said: dict[str, str]) -> Iterator[str]:
    """A table's section, and those of the tables in it; what was ``said`` of a definition is not
    said again."""
    table = known[name]
    level = 2 if title.startswith("[") and "." not in title else 3
    text = (
        re.sub(r"^\[[\w.]+\]: ", "", " ".join(table.get("description", "").split()))
        .replace("``", "`")
        .replace(":class:", "")
    )
    yield from ("", f"{'#' * level} {title}", "")
    if name in said:
        yield f"As [`{said[name]}`](#{slug(said[name])})."
        return
    said[name] = title
    yield from (text[:1].upper() + text[1:], "", *_own_keys(title, table, known, said))
    inside = title.strip("[]") if title.startswith("[") else "weak"
    for key, value in table["properties"].items():
        if _is_model(value):  # [weak], [strong], [judge] have said what that is.
            continue
        for inner in _definitions(value, known):
            yield from _table(
                f"[{inside}.{key}{'.NAME' if 'additionalProperties' in value else ''}]",
                inner,
                known,
                said,
            )


def _is_model(value: dict[str, Any]) -> bool:
    return any("oneOf" in one for one in value.get("anyOf", ()))


def _own_keys(
    title: str, table: dict[str, Any], known: dict[str, Any], said: dict[str, str]
) -> Iterator[str]:
    """The keys of a table; of those that an earlier table has with the same words, if they are
    many, only the names."""
    rows = list(_keys(table, known))
    again = [row for row in rows[2:] if row in said]
    if len(again) < REPEATED:
        again = []
    yield from (row for row in rows if row not in again)
    if again:
        where = said[again[0]]
        names = ", ".join(row.split(" | ")[0].removeprefix("| ") for row in again)
        yield from ("", f"And as in [`{where}`](#{slug(where)}): {names}.")
    for row in rows[2:]:
        said.setdefault(row, title)


def slug(title: str) -> str:
    """The anchor that MkDocs and GitHub give to a heading."""
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower())


def _keys(table: dict[str, Any], known: dict[str, Any]) -> Iterator[str]:
    yield from ("| key | type | default | |", "|---|---|---|---|")
    for key, value in table["properties"].items():
        if "const" not in value:
            default = (
                "required" if key in table.get("required", ()) else _default(value.get("default"))
            )
            yield (
                f"| `{key}` | {_cell(_type(value, known))} | {_cell(default)} | "
                f"{_cell(_meaning(value, known))} |"
            )


def _meaning(value: dict[str, Any], known: dict[str, Any]) -> str:
    """What is said of the key; otherwise of the table that it holds."""
    inner = _definitions(value, known)
    return value.get("description") or (
        known[inner[0]].get("description", "").partition("\n")[0] if inner else ""
    )


def _definitions(value: dict[str, Any], known: dict[str, Any]) -> list[str]:
    """The tables that a key holds: its own, that of its alternatives, or that of each of its
    names."""
    reference = value.get("$ref", "").rpartition("/")[2]
    more = value.get("additionalProperties")
    inner = [
        *value.get("anyOf", ()),
        *value.get("oneOf", ()),
        *([more] if isinstance(more, dict) else []),
    ]
    found = [reference] if "properties" in known.get(reference, {}) else []
    return found + [name for one in inner for name in _definitions(one, known)]


def _type(value: dict[str, Any], known: dict[str, Any]) -> str:
    if "$ref" in value:
        return (
            "table"
            if _definitions(value, known)
            else _type(known[value["$ref"].rpartition("/")[2]], known)
        )
    if _is_model(value):
        return "table, as [strong]"
    if "anyOf" in value:
        kinds = [
            _type(one, known)
            for one in value["anyOf"]
            if one.get("type") != "null" and one.get("maxProperties") != 0
        ]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in value or "const" in value:
        return " or ".join(
            f"`{json.dumps(one)}`" for one in value.get("enum", [value.get("const")])
        )
    if value.get("type") == "array":
        items = value.get("items", {})
        plural = PLURALS.get(items.get("type", "")) if "enum" not in items else None
        return f"list of {plural or _type(items, known)}" if items else "list"
    bounds = [form.format(value[key]) for key, form in BOUNDS.items() if key in value]
    if value.get("type") == "object" and value.get("additionalProperties"):
        return "tables by name" if _definitions(value, known) else "table"
    return " ".join([TYPES.get(value.get("type", ""), "any value"), ", ".join(bounds)]).strip()


def _default(value: Any) -> str:
    return (
        "-"
        if value is None or value in ([], {}) or isinstance(value, dict)
        else f"`{json.dumps(value)}`"
    )


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("``", "`").replace("|", "\\|").replace("<", "&lt;")


PAGES = {"cli.md": cli_page, "toml.md": toml_page}


def stale() -> list[Path]:
    """The pages that are not what the code says."""
    return [
        HERE / name
        for name, page in PAGES.items()
        if not (HERE / name).is_file() or (HERE / name).read_text("utf-8") != page()
    ]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 when a page is stale"
    )
    old = stale()
    if parser.parse_args().check:
        sys.exit(
            f"stale: {', '.join(path.name for path in old)}. Run `make reference`." if old else 0
        )
    HERE.mkdir(exist_ok=True)
    for path in old:
        path.write_text(PAGES[path.name](), encoding="utf-8")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
