"""What a run shows: numbers with intervals and paired tests, in a terminal, as report.json and as
one HTML file.

model.py     the facts: RunReport and its parts, and their round trip through JSON
numbers.py   the statistics, each with its source
verdict.py   the numbers in words
masking.py   nothing secret is written
hiding.py    inputs that are not shown unasked
figures.py   every number that a page shows: "numbers" in report.json
schema.py    the JSON Schema of report.json
terminal.py  Rich tables
drawing.py   from a Vega-Lite specification to inline SVG
charts.py    the specifications: rows, shares, histograms, lines
sections.py  which charts a report has
alike.py     whether drafts depend on their inputs
differing.py two drafts, word by word
page.py      what all pages share: environment, policy, files
browse.py    answers and traces to search and read
html.py      report.json and report.html, written together
cells.py     a report in a notebook
"""

from cowest_dspy.influence.arms import Answer
from cowest_dspy.optimizers.rounds import Outcome
from cowest_dspy.report import cells as cells
from cowest_dspy.report.figures import Figures, figures
from cowest_dspy.report.html import WrittenReport, read_report, render_html, write_report
from cowest_dspy.report.model import (
    AgreementRow,
    Arm,
    Curve,
    CurvePoint,
    InfluenceRow,
    Noise,
    PairRow,
    PairsSummary,
    RoundRow,
    RunReport,
    Stage,
    StepRow,
    TraceRow,
)
from cowest_dspy.report.numbers import (
    arm_table,
    influence_by_round,
    influence_counts,
    paired_exact_test,
    wilson_interval,
)
from cowest_dspy.report.schema import report_schema
from cowest_dspy.report.terminal import print_report
from cowest_dspy.report.verdict import Verdict, outcomes_text, verdict

__all__ = [
    "AgreementRow",
    "Answer",
    "Arm",
    "Curve",
    "CurvePoint",
    "Figures",
    "InfluenceRow",
    "Noise",
    "Outcome",
    "PairRow",
    "PairsSummary",
    "RoundRow",
    "RunReport",
    "Stage",
    "StepRow",
    "TraceRow",
    "Verdict",
    "WrittenReport",
    "arm_table",
    "figures",
    "influence_by_round",
    "influence_counts",
    "outcomes_text",
    "paired_exact_test",
    "print_report",
    "read_report",
    "render_html",
    "report_schema",
    "verdict",
    "wilson_interval",
    "write_report",
]
