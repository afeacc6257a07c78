"""What every page of ours is made with: one Jinja environment, its assets, and its content security
policy.

A page is one file that asks the network for nothing: its policy allows only the styles and scripts
it carries, by their hashes. Jinja2 escapes every text; what a script reads of it is JSON in a block
that nobody runs.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cowest_dspy.errors import ReportError
from cowest_dspy.report.verdict import (
    bare_p,
    format_interval,
    format_p,
    format_points,
    format_share,
    format_usd,
)
from cowest_dspy.utils.reading import file_errors, read_json


def page_environment(package: str = "cowest_dspy.report", **filters: Any) -> Environment:
    """Templates of that package, and behind them those of the report, with the filters that all
    pages share and these ones."""
    packages = dict.fromkeys((package, "cowest_dspy.report"))
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(name) for name in packages]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "share": format_share,
        "span": format_interval,
        "p": format_p,
        "bare_p": bare_p,
        "points": format_points,
        "usd": format_usd,
        "gib": _gibibytes,
        "count": _count,
        **filters,
    }
    return environment


def asset(environment: Environment, *names: str) -> Markup:
    """The text of these templates' files, one after the other, as it stands: a style or a
    script."""
    assert environment.loader is not None
    texts = [
        environment.loader.get_source(environment, name)[0].replace("\r\n", "\n") for name in names
    ]
    return Markup("\n".join(texts))


def policy(styles: Iterable[str], scripts: Iterable[str] = ()) -> str:
    """The content security policy of a page that has these styles and scripts, and nothing else."""
    allowed = [f"default-src 'none'; img-src data:; style-src {_hashes(styles)}"]
    if ran := _hashes(scripts):
        allowed.append(f"script-src {ran}")
    return "; ".join([*allowed, "base-uri 'none'; form-action 'none'"])


def data_block(value: Any) -> Markup:
    """JSON for a ``<script type="application/json">``: no text in it can end the block, or begin
    another."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as dotted names and their values as JSON."""
    rows = []
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            rows += flat(value, f"{prefix}{key}.")
        else:
            rows.append(
                (
                    f"{prefix}{key}",
                    value if isinstance(value, str) else json.dumps(value, ensure_ascii=False),
                )
            )
    return rows


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


def _hashes(texts: Iterable[str]) -> str:
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
    return " ".join(f"'sha256-{digest}'" for digest in digests)


def _gibibytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**30:.2f} GiB"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,}"
