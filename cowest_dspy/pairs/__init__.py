"""Traces -> preferences: pairs of two drafts of one example, ranked by influence, or single drafts
that helped and drafts that hurt.

    pairs = preference_pairs(traces, margin=0.5)      best against worst; or strategy="paper", "all"
    pairs.dropped                                     {"drafts that failed (timeout)": 3, ...}
    pairs.to_dataset()                                what trl.DPOTrainer takes
    unpaired_preferences(traces).to_dataset()         what trl.KTOTrainer takes

A pair is made when its chosen draft did not hurt, its rejected draft did worse by at least the
margin, and their texts differ by more than a few words. Everything that is dropped is counted with
its reason.
"""

from cowest_dspy.pairs.dataset import (
    Pair,
    PreferencePairs,
    UnpairedPreference,
    UnpairedPreferences,
)
from cowest_dspy.pairs.select import PairFilters, preference_pairs, unpaired_preferences
from cowest_dspy.pairs.texts import Lengths

__all__ = [
    "Lengths",
    "Pair",
    "PairFilters",
    "PreferencePairs",
    "UnpairedPreference",
    "UnpairedPreferences",
    "preference_pairs",
    "unpaired_preferences",
]
