"""side_by_side.html and .json, written together: one page that asks the network for nothing, runs
no script, and shows no input and no answer. Jinja2 escapes every text; the content security policy
allows only the style that the page carries, by its hash."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from cowest_dspy.errors import ReportError
from cowest_dspy.report.page import asset, page_environment, policy
from cowest_dspy.report.side_by_side.model import KIND, ArmCell, SideBySide
from cowest_dspy.report.side_by_side.words import facts, score
from cowest_dspy.utils.files import write_whole
from cowest_dspy.utils.notebook import tag
from cowest_dspy.utils.reading import read_json

NAME = "side_by_side"


@dataclass(frozen=True)
class Written:
    """Where the two files are."""

    json: Path
    html: Path


def write_side_by_side(view: SideBySide, out: Path) -> Written:
    """Writes the page and its JSON, whole or not at all: ``out`` is a folder, or the page's name,
    ending in .html.

    Raises:
        ReportError: one of the two files is there and is no side-by-side view: a run's report is
            never overwritten.
    """
    page = out if out.suffix == ".html" else out / f"{NAME}.html"
    written = Written(page.with_suffix(".json"), page)
    _refuse_to_overwrite(written)
    page.parent.mkdir(parents=True, exist_ok=True)
    document = json.dumps(view.to_json(), ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    write_whole({written.json: document, written.html: render_side_by_side(view)})
    return written


def _refuse_to_overwrite(written: Written) -> None:
    if not written.json.exists() and not written.html.exists():
        return
    try:
        document: Any = read_json(written.json, ReportError)
    except ReportError:
        document = None
    if not isinstance(document, dict) or document.get("kind") != KIND:
        raise ReportError(
            f"{written.html} or {written.json.name} beside it is there already, and is no "
            "side-by-side page. Give another name "
            "with --out, for instance --out runs/side_by_side.html."
        )


def render_side_by_side(view: SideBySide) -> str:
    """The page."""
    environment = page_environment("cowest_dspy.report.side_by_side")
    style = asset(environment, "side_by_side.css")
    arms = [
        (title, [(score(cell := run.arm(name)), bar(cell)) for run in view.runs])
        for name, title in view.arms.items()
    ]
    return environment.get_template("side_by_side.html.j2").render(
        view=view,
        style=style,
        policy=policy([style]),
        arms=arms,
        facts=facts(view),
        findings=[
            (sentence, test.finding)
            for sentence, test in zip(view.sentences, view.tests, strict=True)
        ],
    )


def bar(arm: ArmCell | None) -> Markup:
    """A score as a bar over 0 to 100 %, with its interval as a line; nothing where there is
    none."""
    if arm is None or arm.score is None:
        return Markup("")
    parts = [tag("rect", x="0", y="3", height="10", width=f"{100 * arm.score:.2f}%", class_="fill")]
    if arm.interval is not None:
        low, high = (f"{100 * end:.2f}%" for end in (arm.interval.low, arm.interval.high))
        parts.append(tag("line", x1=low, x2=high, y1="8", y2="8", class_="whisker"))
    return tag(
        "svg",
        *parts,
        class_="bar",
        height="16",
        role="img",
        aria_label=f"{arm.title}: {score(arm)}",
    )
