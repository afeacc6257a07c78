"""Arms that answered the same examples, side by side: what `cowest compare` measured, tested and
written out. Asks no model.

model.py         the facts: Comparison and its parts, and their round trip through JSON
significance.py  paired tests over seeds, and the correction for many
numbers.py       everything that follows from the facts
verdict.py       the numbers in words
tables.py        the numbers as tables of text, and as CSV
terminal.py      Rich tables
markdown.py      for a page of results
latex.py         for a paper
charts.py        points, differences and sweeps
html.py          the page, and all files together
cells.py         a comparison in a notebook
"""

from cowest_dspy.report.comparison import cells as cells
from cowest_dspy.report.comparison.html import (
    WrittenComparison,
    read_comparison,
    render_comparison,
    write_comparison,
)
from cowest_dspy.report.comparison.latex import to_latex
from cowest_dspy.report.comparison.markdown import to_markdown
from cowest_dspy.report.comparison.model import ComparedArm, Comparison, SweepPoint
from cowest_dspy.report.comparison.numbers import Numbers, numbers_of
from cowest_dspy.report.comparison.significance import Paired, bootstrap_test, holm, paired_test
from cowest_dspy.report.comparison.tables import to_csv
from cowest_dspy.report.comparison.terminal import print_comparison
from cowest_dspy.report.comparison.verdict import verdict

__all__ = [
    "ComparedArm",
    "Comparison",
    "Numbers",
    "Paired",
    "SweepPoint",
    "WrittenComparison",
    "bootstrap_test",
    "holm",
    "numbers_of",
    "paired_test",
    "print_comparison",
    "read_comparison",
    "render_comparison",
    "to_csv",
    "to_latex",
    "to_markdown",
    "verdict",
    "write_comparison",
]
