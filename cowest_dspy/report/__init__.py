"""Results of runs and comparisons: numbers with intervals and paired tests, in a terminal, in a
notebook, as JSON and as one HTML page.

facts.py        what report.json is made of: RunReport and its parts
numbers.py      statistics of a run; significance.py: paired tests
figures.py      every number of a page, and the JSON Schema of report.json
verdict.py      numbers in words
compared.py     what comparison.json is made of; compare.py: its numbers
view.py         sections of text tables, for a terminal, a notebook and Markdown; page.py: for a
                browser
run_view.py     what is shown of a run; run_page.py: its page and its files
compare_view.py of a comparison; runs_view.py: of several runs; router_view.py: of a router
charts.py       specifications for Vega-Lite; drawing.py: as SVG
runs.py         the state of run folders
"""

from cowest_dspy.report.compare import compute_numbers
from cowest_dspy.report.compare_view import print_comparison, read_comparison, write_comparison
from cowest_dspy.report.compared import ComparedArm, Comparison, SweepPoint
from cowest_dspy.report.facts import Arm, PairsSummary, RunReport, Stage, training_curve
from cowest_dspy.report.figures import figures, report_schema
from cowest_dspy.report.numbers import arm_table, influence_by_round, influence_counts
from cowest_dspy.report.page import WrittenPage
from cowest_dspy.report.run_page import (
    print_change,
    read_report,
    render_html,
    report_files,
    write_report,
)
from cowest_dspy.report.run_view import print_report
from cowest_dspy.report.runs_view import (
    print_side_by_side,
    short_names,
    side_by_side,
    write_side_by_side,
)
from cowest_dspy.report.significance import compare_scores
from cowest_dspy.report.verdict import comparison_verdict, describe_rounds, verdict

__all__ = [
    "Arm",
    "ComparedArm",
    "Comparison",
    "PairsSummary",
    "RunReport",
    "Stage",
    "SweepPoint",
    "WrittenPage",
    "arm_table",
    "compare_scores",
    "comparison_verdict",
    "compute_numbers",
    "describe_rounds",
    "figures",
    "influence_by_round",
    "influence_counts",
    "print_change",
    "print_comparison",
    "print_report",
    "print_side_by_side",
    "read_comparison",
    "read_report",
    "render_html",
    "report_files",
    "report_schema",
    "short_names",
    "side_by_side",
    "training_curve",
    "verdict",
    "write_comparison",
    "write_report",
    "write_side_by_side",
]
