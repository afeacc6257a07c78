"""Several runs side by side: `cowest report RUN RUN ...`. Asks no model and changes no run.

model.py     the facts: SideBySide and its parts, as JSON
numbers.py   what each run has, what differs, which runs can be compared and the tests between them
terminal.py  Rich tables
words.py     the numbers as rows of text
html.py      one page, and the JSON beside it
"""

from cowest_dspy.report.side_by_side.html import Written, render_side_by_side, write_side_by_side
from cowest_dspy.report.side_by_side.model import ArmCell, RunColumn, RunTest, SideBySide
from cowest_dspy.report.side_by_side.numbers import side_by_side
from cowest_dspy.report.side_by_side.terminal import print_side_by_side

__all__ = [
    "ArmCell",
    "RunColumn",
    "RunTest",
    "SideBySide",
    "Written",
    "print_side_by_side",
    "render_side_by_side",
    "side_by_side",
    "write_side_by_side",
]
