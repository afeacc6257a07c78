"""Several runs side by side, `cowest report RUN RUN`: a column for each run, what differs between
them, and a paired test of every two of them. Asks no model and changes no run.

What is compared is compared on the same examples: same id, same inputs, same expected answer, same
metric.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path, PurePath
from typing import Any

from rich.console import Console

from cowest_dspy.errors import ReportError
from cowest_dspy.report.charts import Chart, bars
from cowest_dspy.report.facts import Arm, RunReport, valid_json
from cowest_dspy.report.figures import Figures, figures
from cowest_dspy.report.numbers import ArmNumbers
from cowest_dspy.report.page import WrittenPage, flatten_settings, render_page
from cowest_dspy.report.run_view import score_row
from cowest_dspy.report.significance import PairedTest, compare_scores, correct_tests, finding
from cowest_dspy.report.verdict import (
    chance_clause,
    format_correction,
    format_count,
    format_difference,
    format_interval,
    format_p,
    format_points,
    format_share,
    format_usd,
    smallest_difference,
)
from cowest_dspy.report.view import Section, Table, Verdict, View, format_date, print_view
from cowest_dspy.utils.masking import mask_document
from cowest_dspy.utils.reading import read_json

SCHEMA_VERSION, KIND, NAME = 3, "side by side", "side_by_side"
ROLES = ("weak", "strong", "judge")
LACKING = "-"
_FOUND = {1: "is better than", -1: "is WORSE than", 0: "cannot be told from"}


@dataclass(frozen=True)
class RunColumn:
    """One run: its ``numbers`` are those of its report; ``examples`` counts its test examples."""

    name: str
    title: str
    created: str
    seed: int
    warnings: tuple[str, ...]
    examples: int
    rounds: tuple[str, ...]
    pairs: int | None
    models: dict[str, str]
    numbers: Figures

    def arm(self, name: str) -> ArmNumbers | None:
        """The arm of that name, or None when the run has not evaluated it."""
        return next((arm for arm in self.numbers.arms if arm.name == name), None)


@dataclass(frozen=True)
class RunTest:
    """The run ``second`` against the run ``first``, on the arm that both are about and on the
    ``shared`` test examples.

    ``test`` goes from first to second: a difference above 0 says that the second is better.
    ``holm`` is its p, corrected over all tests of the view; ``finding`` 1 (better), -1 (worse) or 0
    (not distinguishable). Where they cannot be compared all three are None, and ``why`` says why.
    """

    first: str
    second: str
    arm: str
    shared: int = 0
    test: PairedTest | None = None
    holm: float | None = None
    finding: int | None = None
    why: str = ""


@dataclass(frozen=True)
class SideBySide:
    """Runs in the order given. ``settings`` maps each key in which their configurations differ to
    its value in each run, in that order, as text; ``versions`` likewise. ``sentences`` describe the
    tests."""

    runs: tuple[RunColumn, ...]
    tests: tuple[RunTest, ...]
    settings: dict[str, tuple[str, ...]]
    versions: dict[str, tuple[str, ...]]
    sentences: tuple[str, ...]

    @property
    def arms(self) -> dict[str, str]:
        """Names and titles of all arms, in order of appearance; a title that two arms have gets the
        arm's name into it."""
        titles: dict[str, str] = {}
        for run in self.runs:
            for arm in run.numbers.arms:
                titles.setdefault(arm.name, arm.title)
        every = list(titles.values())
        return {
            name: title if every.count(title) == 1 else f"{title} ({name})"
            for name, title in titles.items()
        }

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, with ``schema_version`` and ``kind``."""
        facts = valid_json(json.loads(json.dumps(dataclasses.asdict(self))))
        return {"schema_version": SCHEMA_VERSION, "kind": KIND, **facts}


def side_by_side(reports: Mapping[str, RunReport]) -> SideBySide:
    """Several runs, by name and in order. Every two of them are tested on the arm that both are
    about (``reference``), where they have test examples and a metric in common; p are corrected
    over all these tests (Holm). Secrets are masked."""
    masked = {
        name: RunReport.from_json(mask_document(report.to_json()))
        for name, report in reports.items()
    }
    tests = [_test(masked, *two) for two in combinations(masked, 2)]
    corrected = correct_tests([one.test for one in tests])
    tests = [
        dataclasses.replace(one, holm=p, finding=finding(one.test, p))
        for one, p in zip(tests, corrected, strict=True)
    ]
    count = sum(p is not None for p in corrected)
    return SideBySide(
        runs=tuple(_column(name, report) for name, report in masked.items()),
        tests=tuple(tests),
        settings=_find_differences(
            [dict(flatten_settings(report.config)) for report in masked.values()]
        ),
        versions=_find_differences([report.versions for report in masked.values()]),
        sentences=tuple(
            _sentence(test, count, smallest_difference(masked[test.first].config)) for test in tests
        ),
    )


def print_side_by_side(view: SideBySide, console: Console | None = None) -> None:
    """Prints the tests in words, each run's verdict and warnings, and the tables."""
    print_view(runs_view(view), console)


def render_side_by_side(view: SideBySide) -> str:
    """The page."""
    return render_page(runs_view(view))


def write_side_by_side(view: SideBySide, out: Path) -> WrittenPage:
    """Writes the page and its JSON, whole or not at all: ``out`` is a folder, or the page's name,
    ending in .html.

    Raises:
        ReportError: one of the two files is there and is no side-by-side view: a run's report is
            never overwritten.
    """
    page = out if out.suffix == ".html" else out / f"{NAME}.html"
    written = WrittenPage(page.with_suffix(".json"), page)
    if written.json.exists() or written.html.exists():
        try:
            document: Any = read_json(written.json, ReportError)
        except ReportError:
            document = None
        if not isinstance(document, dict) or document.get("kind") != KIND:
            raise ReportError(
                f"{written.html} or {written.json.name} beside it is there already, and is no "
                "side-by-side page. Give another name with --out, for instance --out "
                "runs/side_by_side.html."
            )
    written.write(view.to_json(), render_side_by_side(view))
    return written


def runs_view(view: SideBySide) -> View:
    """The sections of several runs side by side."""
    heads = tuple(run.name for run in view.runs)

    def table(title: str, first: str, rows: Mapping[str, Sequence[str]]) -> Table:
        cells = tuple((key, *row) for key, row in rows.items())
        return Table(title, (first, *heads), cells, texts=True)

    verdicts = tuple(
        (run.name, " ".join((*run.numbers.verdict.sentences, *map(_warning, run.warnings))))
        for run in view.runs
    )
    scores = {
        title: tuple(format_score(run.arm(name)) for run in view.runs)
        for name, title in view.arms.items()
    }
    differing = [("Configuration, where it differs", view.settings)] if view.settings else []
    differing += [("Versions that differ", view.versions)] if view.versions else []
    sections = (
        Section(
            "runs",
            "Runs",
            (
                Table("What each run shows", ("run", "verdict"), verdicts, texts=True),
                table("What each run did and cost", "", _facts(view)),
            ),
        ),
        Section(
            "scores",
            "Scores",
            (table("Scores on the test examples, with 95 % intervals", "arm", scores),)
            if scores
            else (),
            lead="Over what each arm answered, with a 95 % interval. Runs are tested against each "
            "other above, on the arm that they are about.",
            charts=lambda: [Chart(_score_chart(view))],
            missing="No arm has been evaluated yet.",
        ),
        Section(
            "settings",
            "Differences",
            tuple(table(title, "key", rows) for title, rows in differing),
            () if view.settings else ("The configurations do not differ.",),
        ),
    )
    found = [test.finding for test in view.tests]
    good = True if 1 in found and -1 not in found else False if -1 in found else None
    return View(
        title=f"{len(view.runs)} runs side by side",
        subtitle=", ".join(f"{run.name}: {run.title}" for run in view.runs),
        verdict=Verdict(view.sentences, good),
        sections=sections,
        source="the JSON file",
    )


def _warning(text: str) -> str:
    return f"Warning: {text}"


def format_score(arm: ArmNumbers | None) -> str:
    """``66.7 % [51.4, 79.2], n 40, 2 failed``, or a dash where the arm was not evaluated."""
    if arm is None:
        return LACKING
    span = f" [{format_interval(arm.interval).replace(' to ', ', ')}]" if arm.interval else ""
    failed = f", {arm.failed} failed" if arm.failed else ""
    return f"{format_share(arm.score)}{span}, n {arm.answered}{failed}"


def _score_chart(view: SideBySide) -> Any:
    """A bar for each arm of each run, those of one arm together."""
    rows = []
    for name, title in view.arms.items():
        for run in view.runs:
            if arm := run.arm(name):
                rows.append(score_row(dataclasses.replace(arm, title=f"{title}, {run.name}")))
    return bars(rows, "Score of each arm in each run")


def _facts(view: SideBySide) -> dict[str, tuple[str, ...]]:
    """A row for each kind of number, with a cell for each run."""
    rows: dict[str, Callable[[RunColumn], str]] = {
        "test examples": lambda run: f"{run.examples:,}",
        "seed": lambda run: str(run.seed),
        "what tuning did": _tuning,
        "pairs": lambda run: format_count(run.pairs),
        "rounds": lambda run: "\n".join(run.rounds) or LACKING,
        "calls": _calls,
        "tokens": lambda run: format_count(_tokens(run)),
        "USD": lambda run: format_usd(run.numbers.totals.usd),
        "seconds": lambda run: f"{run.numbers.totals.seconds:,.0f}",
    }
    for role in dict.fromkeys(role for run in view.runs for role in run.models):
        rows[f"{role} model"] = lambda run, role=role: run.models.get(role, LACKING)
    rows["report of"] = lambda run: format_date(run.created)
    return {name: tuple(map(cell, view.runs)) for name, cell in rows.items()}


def _calls(run: RunColumn) -> str:
    totals = run.numbers.totals
    stored = f" (and {totals.cached_calls:,} from the store)" if totals.cached_calls else ""
    return f"{totals.calls or 0:,}{stored}"


def _tokens(run: RunColumn) -> int:
    return (run.numbers.totals.tokens_in or 0) + (run.numbers.totals.tokens_out or 0)


def _tuning(run: RunColumn) -> str:
    test = run.numbers.tuning
    if test is None or test.difference is None:
        return LACKING
    return (
        f"{format_points(test)}, fixed {test.higher}, broke {test.lower} of {test.n}, "
        f"{format_p(test.p)}"
    )


def _column(name: str, report: RunReport) -> RunColumn:
    return RunColumn(
        name=name,
        title=report.title,
        created=report.created,
        seed=report.seed,
        warnings=report.warnings,
        examples=len(_examples(report)),
        rounds=tuple(
            f"{row.number}: {row.outcome}, gain {row.gain.span if row.gain else LACKING}, "
            f"{row.pairs:,} pairs"
            for row in report.rounds
        ),
        pairs=report.pairs.kept if report.pairs else None,
        models={role: _model(report.config[role]) for role in ROLES if report.config.get(role)},
        numbers=figures(report),
    )


def _model(settings: Any) -> str:
    """A model for people: its id, of a folder its name, with the precision where that is part of
    what it is."""
    if not isinstance(settings, Mapping):
        return str(settings)
    model = str(settings.get("model", "?"))
    local = PurePath(model).name if PurePath(model).is_absolute() else model
    return f"{local} ({settings['dtype']})" if settings.get("dtype", "auto") != "auto" else local


def _examples(report: RunReport) -> dict[str, str]:
    """Each test example by id, as its inputs and its expected answer."""
    found: dict[str, str] = {}
    for arm in report.arms:
        for answer in arm.answers:
            identity = json.dumps([answer.inputs, answer.gold], sort_keys=True, default=str)
            found.setdefault(answer.example_id, identity)
    return found


def _test(reports: Mapping[str, RunReport], first: str, second: str) -> RunTest:
    one, two = reports[first], reports[second]
    arms = [report.arm(report.reference) for report in (one, two)]
    title = next((arm.title for arm in arms if arm), one.reference)
    missing = [name for name, arm in zip((first, second), arms, strict=True) if arm is None]
    metrics = [_metric(report) for report in (one, two)]
    mine, theirs = _examples(one), _examples(two)
    shared = {key for key in mine.keys() & theirs.keys() if mine[key] == theirs[key]}
    why = ""
    if missing:
        why = f"{' and '.join(missing)} has not evaluated that arm yet"
    elif metrics[0] != metrics[1]:
        why = f"they are scored by different metrics, {metrics[0]} and {metrics[1]}"
    elif not shared:
        why = "they have no test example in common"
    if why:
        return RunTest(first, second, title, why=why)
    before, after = (_scores(arm, shared) for arm in arms if arm)
    test = compare_scores(after, before)
    if not test.n:
        return RunTest(first, second, title, why="no test example has an answer in both")
    return RunTest(first, second, title, len(shared), test)


def _metric(report: RunReport) -> str:
    """The metric's file and name, wherever the file is; "" where the report does not say."""
    return PurePath(str(report.config.get("metric", ""))).name


def _scores(arm: Arm, examples: set[str]) -> dict[str, float | None]:
    return {key: score for key, score in arm.scores().items() if key in examples}


def _sentence(found: RunTest, tests: int, smallest: float) -> str:
    if found.test is None or found.holm is None:
        return f"{found.first} and {found.second} are not comparable: {found.why}."
    left = found.test.left_out
    left_out = f", {left} left out because an answer failed" if left else ""
    return (
        f"{found.second} {_FOUND[found.finding or 0]} {found.first} ({found.arm}): "
        f"{format_difference(found.test)} points on the {found.test.n} test examples that they "
        f"share{left_out}, {format_p(found.holm)} ({format_correction(tests)})"
        f"{chance_clause(found.test, found.holm, smallest)}."
    )


def _find_differences(tables: Sequence[Mapping[str, str]]) -> dict[str, tuple[str, ...]]:
    """The keys whose values are not the same in all tables, in order of appearance."""
    keys = dict.fromkeys(key for table in tables for key in table)
    rows = {key: tuple(table.get(key, LACKING) for table in tables) for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def short_names(paths: Sequence[Path]) -> list[str]:
    """A short name for each path, all of them different: the last part of a path, and as many
    before it as are needed.

    >>> short_names([Path("runs/a/handbook"), Path("runs/b/handbook"), Path("runs/tools")])
    ['a/handbook', 'b/handbook', 'tools']

    Raises:
        ReportError: the same run twice.
    """
    parts = [
        (path.parent if path.name == "report.json" else path).resolve().parts for path in paths
    ]
    for place, one in enumerate(parts):
        if one in parts[:place]:
            raise ReportError(f"The run {paths[place]} is named twice: name each run once.")
    names = []
    for one in parts:
        size = 1
        while size < len(one) and any(
            other != one and other[-size:] == one[-size:] for other in parts
        ):
            size += 1
        names.append("/".join(part.strip("/") for part in one[-size:]))
    return names
