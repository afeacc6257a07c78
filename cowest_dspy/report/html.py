"""report.json and report.html, written together: the page shows nothing that does not follow from the JSON beside it.

The page is one file that asks the network for nothing: its content security policy allows only the style and the script
that it carries, by their hashes. Jinja2 escapes every text: a draft with ``<script>`` in it is shown, and not run.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cowest_dspy.errors import ReportError
from cowest_dspy.lms.prices import added
from cowest_dspy.report import charts
from cowest_dspy.report.browse import MAX_ROWS, answer_list, change, clipped, evenly, labelled, outcome, trace_list
from cowest_dspy.report.hiding import hidden
from cowest_dspy.report.masking import mask_settings, mask_text
from cowest_dspy.report.model import Curve, RunReport
from cowest_dspy.report.numbers import arm_table, compare, influence_by_round, influence_counts
from cowest_dspy.report.verdict import (
    bare_p,
    format_interval,
    format_p,
    format_points,
    format_share,
    format_usd,
    influence_notes,
    verdict,
)

MAX_PAIRS = 30
MAX_CHANGES = 4


@dataclasses.dataclass(frozen=True)
class WrittenReport:
    """Where the two files are."""

    json: Path
    html: Path


def write_report(report: RunReport, folder: str | os.PathLike[str]) -> WrittenReport:
    """Writes report.json and report.html into the folder, whole or not at all. Secrets are masked in both.

    The JSON holds the report and, under "numbers", what follows from it. The HTML is drawn from the JSON as read back.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    facts = mask_text(report.to_json())
    facts["config"] = mask_settings(facts["config"])
    shown = RunReport.from_json(facts)
    document = json.dumps({**facts, "numbers": figures(shown)}, ensure_ascii=False, indent=1, allow_nan=False)
    written = WrittenReport(target / "report.json", target / "report.html")
    write_whole({written.json: document + "\n", written.html: render_html(shown)})
    return written


def read_report(path: str | os.PathLike[str]) -> RunReport:
    """The report in a run folder, or in a report.json.

    Raises:
        ReportError: there is none, or it is not one that this version reads.
    """
    return RunReport.from_json(read_document(path, "report", "cowest report RUN"))


def read_document(path: str | os.PathLike[str], kind: str, command: str) -> dict[str, Any]:
    """The JSON object in the file, or in KIND.json of the folder, that ``command`` writes.

    Raises:
        ReportError: there is none.
    """
    file = Path(path) / f"{kind}.json" if Path(path).is_dir() else Path(path)
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f'No {kind} at {file}. Write one with "{command}".') from error
    except ValueError as error:
        raise ReportError(f'{file} is not JSON ({error}). Write it again with "{command}".') from error
    if not isinstance(document, dict):
        raise ReportError(f"{file} holds a {type(document).__name__}, a {kind}.json holds an object.")
    return document


def figures(report: RunReport) -> dict[str, Any]:
    """Every number that the page draws, as plain JSON."""
    rounds = influence_by_round(report.influence)
    return {
        "verdict": dataclasses.asdict(verdict(report)),
        "arms": [dataclasses.asdict(line) for line in arm_table(report)],
        "tuning": _maybe_dict(compare(report, report.before, report.after)),
        "influence": {str(number): dataclasses.asdict(counts) for number, counts in rounds.items()},
    }


def render_html(report: RunReport, *, max_rows: int = MAX_ROWS) -> str:
    """The page. At most ``max_rows`` answers and as many traces go into it, and it says when there are more. Inputs that the
    report's configuration hides ([report] hide) are not in it."""
    report = hidden(report)
    environment = Environment(
        loader=PackageLoader("cowest_dspy.report"),
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
    }
    environment.filters |= {"labelled": labelled, "clipped": clipped, "gib": _gibibytes, "count": _count}
    lines = arm_table(report)
    style, script = _asset(environment, "report.css"), _asset(environment, "report.js")
    return environment.get_template("report.html.j2").render(
        report=report,
        found=verdict(report),
        style=style,
        script=script,
        policy=_policy(style, script),
        arms=[(line, charts.interval_bar(line)) for line in lines],
        reference=report.arm(report.reference),
        tuning=_tuning(report),
        influence=_influence(report),
        pair_rows=evenly(report.pairs.rows, MAX_PAIRS) if report.pairs else [],
        left_out=max((line.test.left_out for line in lines if line.test), default=0),
        totals={field: _total(report, field) for field in ("calls", "cached_calls", "tokens_in", "tokens_out")},
        usd=reduce(added, (stage.usd for stage in report.stages), 0.0),
        peak=max((stage.peak_memory_bytes for stage in report.stages if stage.peak_memory_bytes), default=None),
        curves=[(curve.stage, drawn) for curve in report.curves if (drawn := _curve_charts(curve))],
        browsers={"answers": answer_list(report, max_rows), "traces": trace_list(report, max_rows)},
        settings=flat(report.config),
    )


def _tuning(report: RunReport) -> dict[str, Any] | None:
    """What changed between the arms before and after tuning, with some examples of each kind."""
    before, after = report.arm(report.before), report.arm(report.after)
    test = compare(report, report.before, report.after)
    if before is None or after is None or test is None:
        return None
    earlier = {answer.example_id: answer for answer in before.answers}
    both = [(earlier[answer.example_id], answer) for answer in after.answers if answer.example_id in earlier]
    fixed = [(old, new) for old, new in both if change(old, new) > 0]
    broken = [(old, new) for old, new in both if change(old, new) < 0]
    return {
        "before": before,
        "after": after,
        "test": test,
        "right": sum(old.score == new.score == 1 for old, new in both),
        "kinds": [(word, evenly(changes, MAX_CHANGES), len(changes)) for word, changes in (("Fixed", fixed), ("Broken", broken))],
        "outcome": outcome,
    }


def _influence(report: RunReport) -> dict[str, Any]:
    """Counts and bars per round, a histogram where influence is graded, and what right and wrong drafts did."""
    values = [row.influence for row in report.influence if row.influence is not None]
    graded = len({round(value, 6) for value in values}) > 3
    by_draft = []
    for label, low, high in (("right drafts", 0.5, 1.1), ("wrong drafts", -0.1, 0.5)):
        rows = [row for row in report.influence if row.draft_score is not None and low <= row.draft_score < high]
        if rows:
            by_draft.append((label, counts := influence_counts(rows), charts.share_bar(counts)))
    rounds = influence_by_round(report.influence)
    return {
        "rounds": [(f"round {number}", counts, charts.share_bar(counts)) for number, counts in rounds.items()],
        "by_draft": by_draft,
        "notes": influence_notes(report) if rounds else [],
        "histogram": charts.histogram(values, "How often each influence occurs") if graded else Markup(),
    }


def _curve_charts(curve: Curve) -> list[Markup]:
    names = (
        ("loss", "loss"),
        ("reward_margin", "reward margin"),
        ("reward_accuracy", "reward accuracy"),
        ("kl", "log-ratio to the reference"),
    )

    def points(field: str) -> list[charts.Point]:
        return [(point.step, value) for point in curve.points if (value := getattr(point, field)) is not None]

    drawn = [charts.line_chart(points(field), "step", label, held_out=points(f"eval_{field}")) for field, label in names]
    return [chart for chart in drawn if chart]


def flat(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as dotted names and their values as JSON."""
    rows = []
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            rows += flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    return rows


def _asset(environment: Environment, name: str) -> Markup:
    assert environment.loader is not None
    return Markup(environment.loader.get_source(environment, name)[0].replace("\r\n", "\n"))


def _policy(style: str, script: str) -> str:
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _total(report: RunReport, field: str) -> int | None:
    """The sum over the stages that measured it; None when none did."""
    known = [value for stage in report.stages if (value := getattr(stage, field)) is not None]
    return sum(known) if known else None


def _maybe_dict(value: Any) -> dict[str, Any] | None:
    return None if value is None else dataclasses.asdict(value)


def _gibibytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**30:.2f} GiB"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,}"


def write_whole(texts: Mapping[Path, str]) -> None:
    """Writes all texts beside their targets and renames only then: a reader sees an old file or a new one, never half of one,
    and an error while writing leaves all the old ones."""
    staged = list[tuple[str, Path]]()
    try:
        for path, text in texts.items():
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            staged.append((name, path))
            with os.fdopen(handle, "wb") as file:
                file.write(text.encode("utf-8"))
            os.chmod(name, 0o644)
        for name, path in staged:
            os.replace(name, path)
    except BaseException:
        for name, _ in staged:
            Path(name).unlink(missing_ok=True)
        raise
