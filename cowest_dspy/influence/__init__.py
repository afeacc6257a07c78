"""What a draft is worth: its influence on the strong model's answer, by a metric, a judge or a
likelihood."""

from __future__ import annotations

from cowest_dspy.influence.collection import collect, collect_again
from cowest_dspy.influence.judge import PAPER, Criterion, GoldLikelihood, Judge, Rubric, Weighted
from cowest_dspy.influence.metric import Influence
from cowest_dspy.influence.noise import noise_floor
from cowest_dspy.influence.report import InfluenceReport, NoiseFloor
from cowest_dspy.influence.statistics import Agreement, agreement
from cowest_dspy.influence.trace import Sampling, Trace, Traces

__all__ = [
    "PAPER",
    "Agreement",
    "Criterion",
    "GoldLikelihood",
    "Influence",
    "InfluenceReport",
    "Judge",
    "NoiseFloor",
    "Rubric",
    "Sampling",
    "Trace",
    "Traces",
    "Weighted",
    "agreement",
    "collect",
    "collect_again",
    "noise_floor",
]
