"""Arms that answered the same examples, side by side: what `cowest compare` measured, tested and written out. Asks no model.

model.py     the facts: Comparison and its parts, and their round trip through JSON
numbers.py   the statistics, each with its source
verdict.py   the numbers in words
"""

from cowest_dspy.comparison.model import ComparedArm, Comparison, SweepPoint
from cowest_dspy.comparison.numbers import Numbers, Paired, bootstrap_test, holm, numbers_of, paired_test
from cowest_dspy.comparison.verdict import verdict

__all__ = [
    "ComparedArm",
    "Comparison",
    "Numbers",
    "Paired",
    "SweepPoint",
    "bootstrap_test",
    "holm",
    "numbers_of",
    "paired_test",
    "verdict",
]
