"""The run folder: every paid call once, what it cost, its limits, and how far the work is."""

from __future__ import annotations

from cowest_dspy.store.budget import Budget
from cowest_dspy.store.store import Store

__all__ = [
    "Budget",
    "Store",
]
