"""comparison.json, .csv, .tex, .md and .html, written together: none shows a number that does not follow from the JSON.

The page is one file that asks the network for nothing and runs no script: its content security policy allows only the style
that it carries, by its hash. Jinja2 escapes every text. No input and no answer is on it: some data sets are disturbing.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cowest_dspy.comparison import charts
from cowest_dspy.comparison.latex import to_latex
from cowest_dspy.comparison.markdown import to_markdown
from cowest_dspy.comparison.model import Comparison
from cowest_dspy.comparison.numbers import Numbers, numbers_of
from cowest_dspy.comparison.tables import text_tables, to_csv
from cowest_dspy.comparison.verdict import format_difference, verdict
from cowest_dspy.report.html import flat, read_document, write_whole
from cowest_dspy.report.masking import mask_settings, mask_text
from cowest_dspy.report.verdict import format_share


@dataclasses.dataclass(frozen=True)
class WrittenComparison:
    """Where the five files are."""

    json: Path
    csv: Path
    tex: Path
    md: Path
    html: Path


def write_comparison(comparison: Comparison, folder: str | os.PathLike[str]) -> WrittenComparison:
    """Writes comparison.json, .csv, .tex, .md and .html into the folder. Secrets are masked in all of them.

    All five are made, and lie on the disk under other names, before the first takes its place: an error leaves the old
    files, and each is there whole or not at all. The JSON holds the facts and, under "numbers", what follows from them.
    """
    facts = mask_text(comparison.to_json())
    facts["config"] = mask_settings(facts["config"])
    shown = Comparison.from_json(facts)
    numbers = numbers_of(shown)
    document = {**facts, "numbers": figures(shown, numbers)}
    texts = {
        "json": json.dumps(document, ensure_ascii=False, indent=1, allow_nan=False) + "\n",
        "csv": to_csv(shown, numbers),
        "tex": to_latex(shown, numbers),
        "md": to_markdown(shown, numbers),
        "html": render_comparison(shown, numbers),
    }
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    paths = {kind: target / f"comparison.{kind}" for kind in texts}
    write_whole({paths[kind]: text for kind, text in texts.items()})
    return WrittenComparison(**paths)


def read_comparison(path: str | os.PathLike[str]) -> Comparison:
    """The comparison in a folder, or in a comparison.json.

    Raises:
        ReportError: there is none, or it is not one that this version reads.
    """
    return Comparison.from_json(read_document(path, "comparison", "cowest compare"))


def figures(comparison: Comparison, numbers: Numbers) -> dict[str, Any]:
    """Every number of the tables and the page, as plain JSON."""
    return {"verdict": dataclasses.asdict(verdict(comparison, numbers)), **dataclasses.asdict(numbers)}


def render_comparison(comparison: Comparison, numbers: Numbers | None = None) -> str:
    """The page; ``numbers`` are those of ``numbers_of(comparison)``, where they are at hand already."""
    numbers = numbers or numbers_of(comparison)
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("cowest_dspy.comparison"), PackageLoader("cowest_dspy.report")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"share": format_share, "difference": format_difference}
    style = Markup("\n").join(_asset(environment, name) for name in ("report.css", "comparison.css"))
    against, axis = numbers.arm(comparison.against), charts.sweep_axis(numbers)
    tested = [line for line in numbers.arms if line.test is not None and line.test.n]
    reach = charts.difference_reach(numbers)
    return environment.get_template("comparison.html.j2").render(
        comparison=comparison,
        found=verdict(comparison, numbers),
        style=style,
        policy=_policy(style),
        against=against,
        seeds=any(line.spread for line in numbers.arms),
        scores=[(line, charts.score_dots(line, against)) for line in numbers.arms],
        differences=[(line, charts.difference_dots(line, reach)) for line in tested],
        reach=reach,
        axis=axis,
        sweep_chart=charts.sweep_chart(numbers, axis, against) if axis else Markup(),
        series=list(charts.sweep_series(numbers, axis)) if axis else [],
        styles=charts.SERIES,
        tables=text_tables(comparison, numbers),
        settings=flat(comparison.config),
    )


def _asset(environment: Environment, name: str) -> Markup:
    assert environment.loader is not None
    return Markup(environment.loader.get_source(environment, name)[0].replace("\r\n", "\n"))


def _policy(style: str) -> str:
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
