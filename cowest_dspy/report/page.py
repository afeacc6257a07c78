"""Views as HTML pages.

A page is one file that asks the network for nothing: its content security policy allows only the
style and the script that it carries, by their hashes. Jinja2 escapes every text: a draft with
``<script>`` in it is shown, and not run. What the script reads is JSON in a block that is not
executed; the charts are SVG.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from cowest_dspy.errors import ReportError
from cowest_dspy.influence.arms import Answer
from cowest_dspy.report.view import Section, Table, View, format_date
from cowest_dspy.utils.extras import describe_missing
from cowest_dspy.utils.files import write_whole
from cowest_dspy.utils.jsonable import flatten
from cowest_dspy.utils.notebook import clip
from cowest_dspy.utils.reading import file_errors, read_json

MAX_SETTING = 2000  # characters
SERIES = 6  # colours of lines in page.css: --s0 and on


@dataclass(frozen=True)
class Browser:
    """A list to search and page through, as the page carries it: the ``name`` of what is in it, its
    JSON, how many ``rows`` it has, and of how many in ``total``."""

    name: str
    json: Markup
    rows: int
    total: int


@dataclass(frozen=True)
class WrittenPage:
    """Where a page, and the document with all of its numbers, are."""

    json: Path
    html: Path

    def write(self, document: Mapping[str, Any], page: str) -> None:
        """Writes both files, whole or not at all.

        Raises:
            ReportError: their folder cannot be written, or the disk is full; what was there before
                is as it was.
        """
        with file_errors(ReportError, self.json.parent):
            self.json.parent.mkdir(parents=True, exist_ok=True)
            write_whole({self.json: format_document(document), self.html: page})


def format_document(document: Mapping[str, Any]) -> str:
    """The text of a JSON file."""
    return json.dumps(document, ensure_ascii=False, indent=1, allow_nan=False) + "\n"


def read_document(path: str | os.PathLike[str], kind: str, command: str) -> dict[str, Any]:
    """The JSON object in the file, or in KIND.json of the folder, that ``command`` writes.

    Raises:
        ReportError: there is none.
    """
    file = Path(path) / f"{kind}.json" if os.path.isdir(path) else Path(path)
    with file_errors(ReportError, file):
        if not file.is_file():
            raise ReportError(f'No {kind} at {file}. Write one with "{command}".')
    document = read_json(file, ReportError, f'Write it again with "{command}".')
    if not isinstance(document, dict):
        raise ReportError(
            f"{file} holds a {type(document).__name__}, a {kind}.json holds an object."
        )
    return document


def render_page(view: View) -> str:
    """The page of a view; without the extra "charts" it says so, and has no charts."""
    no_charts = describe_missing("charts", "Drawing the charts of this page")
    scripted = any(isinstance(one.extra, Browser) and one.extra.rows for one in view.sections)
    style, script = read_asset("page.css"), read_asset("page.js") if scripted else Markup()
    filled = [_has_content(one) for one in view.sections]
    sections = [
        (one, one.charts() if shown and not no_charts else (), shown)
        for one, shown in zip(view.sections, filled, strict=True)
    ]
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            view=view,
            sections=sections,
            no_charts=no_charts,
            style=style,
            script=script,
            policy=_policy(style, script),
        )
    )


def _has_content(section: Section) -> bool:
    """Whether the section has something to show yet."""
    extra = section.extra.rows if isinstance(section.extra, Browser) else section.extra
    return bool(section.tables or extra or not section.missing)


def settings_section(config: Mapping[str, Any], versions: Mapping[str, str]) -> Section:
    """Configuration and versions, folded."""
    tables = tuple(
        Table(
            f"{name}, {len(rows)} entries",
            ("key", "value"),
            tuple((key, clip(value, MAX_SETTING)) for key, value in rows),
            texts=True,
            folded=True,
        )
        for name, rows in (
            ("Configuration", flatten_settings(config)),
            ("Versions", list(versions.items())),
        )
        if rows
    )
    return Section("settings", "Configuration", tables, missing="None recorded.")


def flatten_settings(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Nested settings as dotted names and their values as JSON."""
    return [
        (name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        for name, value in flatten(settings)
    ]


def read_asset(name: str) -> Markup:
    """The text of a file among the templates, as it stands: a style or a script."""
    file = files("cowest_dspy.report") / "templates" / name
    return Markup(file.read_text(encoding="utf-8").replace("\r\n", "\n"))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("cowest_dspy.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "clip": clip, "code": _code, "date": format_date, "fields": format_fields
    }  # fmt: skip
    environment.globals |= {"describe_outcome": describe_outcome}
    return environment


def format_fields(values: Mapping[str, Any] | None) -> str:
    """Fields as readable lines: the bare value of a single field, else one "Label: value" line per
    field."""
    if not values:
        return ""
    if len(values) == 1:
        return str(next(iter(values.values())))
    return "\n".join(
        f"{key.replace('_', ' ').capitalize()}: {value}" for key, value in values.items()
    )


def describe_outcome(answer: Answer | None) -> str:
    """A word or a number for an answer: right, wrong, a graded score, failed, or not asked."""
    if answer is None:
        return "not asked"
    if answer.score is None:
        return "failed"
    return {1.0: "right", 0.0: "wrong"}.get(answer.score, f"{answer.score:.2f}")


def _code(text: str) -> Markup:
    """The text with what stands in backquotes as code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def data_block(value: Any) -> Markup:
    """JSON for a ``<script type="application/json">``: no text in it can end the block, or begin
    another."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _policy(style: str, script: str) -> str:
    """The content security policy of a page that has this style and this script, which may be
    empty, and nothing else."""
    rules = ["default-src 'none'", "img-src data:", f"style-src {_hash(style)}"]
    if script:
        rules.append(f"script-src {_hash(script)}")
    return "; ".join([*rules, "base-uri 'none'", "form-action 'none'"])


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
