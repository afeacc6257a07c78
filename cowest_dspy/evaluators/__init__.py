"""What gives an answer its score besides a metric: a judge, the likelihood of the gold answer, and declared weights of several."""

from cowest_dspy.evaluators.agreement import Agreement, agreement
from cowest_dspy.evaluators.judge import PAPER, Criterion, Judge, Rubric
from cowest_dspy.evaluators.likelihood import GoldLikelihood
from cowest_dspy.evaluators.weighted import Weighted

__all__ = ["PAPER", "Agreement", "Criterion", "GoldLikelihood", "Judge", "Rubric", "Weighted", "agreement"]
