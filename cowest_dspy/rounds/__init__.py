"""Rounds: collect on policy, make pairs, tune, evaluate on held-out examples, and accept the tuned model or roll it back.

deciding.py   whether a tuned model is better, on the same examples
rounds.py     the rounds of a run, each of their steps done once
"""

from cowest_dspy.rounds.deciding import Decision, Gain, Scores, decide, gain
from cowest_dspy.rounds.rounds import Round, RoundHistory, Rounds, Task, rows_file, step_name, unpaired

__all__ = [
    "Decision", "Gain", "Round", "RoundHistory", "Rounds", "Scores", "Task", "decide", "gain", "rows_file", "step_name", "unpaired",
]  # fmt: skip
