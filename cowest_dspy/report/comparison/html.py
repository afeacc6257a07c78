"""comparison.json, .csv, .tex, .md and .html, written together: none shows a number that does not
follow from the JSON.

The page is one file that asks the network for nothing and runs no script: its content security
policy allows only the style that it carries, by its hash. Jinja2 escapes every text. No input and
no answer is on it: some data sets are disturbing.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from markupsafe import Markup

from cowest_dspy.report.comparison import charts
from cowest_dspy.report.comparison.latex import to_latex
from cowest_dspy.report.comparison.markdown import to_markdown
from cowest_dspy.report.comparison.model import Comparison
from cowest_dspy.report.comparison.numbers import Numbers, numbers_of
from cowest_dspy.report.comparison.tables import text_tables, to_csv
from cowest_dspy.report.comparison.verdict import format_difference, verdict
from cowest_dspy.report.masking import mask_document
from cowest_dspy.report.page import asset, flat, page_environment, policy, read_document
from cowest_dspy.utils.files import write_whole


@dataclasses.dataclass(frozen=True)
class WrittenComparison:
    """Where the five files are."""

    json: Path
    csv: Path
    tex: Path
    md: Path
    html: Path


def write_comparison(comparison: Comparison, folder: str | os.PathLike[str]) -> WrittenComparison:
    """Writes comparison.json, .csv, .tex, .md and .html into the folder. Secrets are masked in all
    of them.

    All five are made, and lie on the disk under other names, before the first takes its place: an
    error leaves the old files, and each is there whole or not at all. The JSON holds the facts and,
    under "numbers", what follows from them.
    """
    facts = mask_document(comparison.to_json())
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
    return {
        "verdict": dataclasses.asdict(verdict(comparison, numbers)),
        **dataclasses.asdict(numbers),
    }


def render_comparison(comparison: Comparison, numbers: Numbers | None = None) -> str:
    """The page; ``numbers`` are those of ``numbers_of(comparison)``, where they are at hand
    already."""
    numbers = numbers or numbers_of(comparison)
    environment = page_environment("cowest_dspy.report.comparison", difference=format_difference)
    style = asset(environment, "page.css", "series.css")
    against, axis = numbers.arm(comparison.against), charts.sweep_axis(numbers)
    return environment.get_template("comparison.html.j2").render(
        comparison=comparison,
        found=verdict(comparison, numbers),
        style=style,
        policy=policy([style]),
        against=against,
        seeds=any(line.spread for line in numbers.arms),
        scores=charts.score_chart(numbers, against),
        differences=charts.difference_chart(numbers),
        axis=axis,
        sweep_chart=charts.sweep_chart(numbers, axis, against) if axis else Markup(),
        series=list(charts.sweep_series(numbers, axis)) if axis else [],
        styles=charts.SERIES,
        tables=text_tables(comparison, numbers),
        settings=flat(comparison.config),
    )
