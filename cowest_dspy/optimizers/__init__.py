"""DSPy optimisers: CoWest (rounds of preference tuning), Cycle (prompts and weights in turn), and a
router."""

from __future__ import annotations

from cowest_dspy.optimizers.cowest import CoWest, Rounds
from cowest_dspy.optimizers.cycle import Cycle
from cowest_dspy.optimizers.rounds import Round, RoundHistory

__all__ = [
    "CoWest",
    "Cycle",
    "Round",
    "RoundHistory",
    "Rounds",
]
