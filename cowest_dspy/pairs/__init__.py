"""The gate: traces -> preference pairs, or drafts that helped and drafts that hurt. Two drafts of
one example, ranked by influence.

    pairs = preference_pairs(traces, margin=0.5)      best against worst; or strategy="paper", "all"
    pairs.dropped                                     {"drafts that failed (timeout)": 3, "examples:
        the best draft hurt": 5, ...}
    pairs.to_dataset()                                what trl.DPOTrainer takes, with lineage beside
        it
    unpaired_preferences(traces).to_dataset()              what trl.KTOTrainer takes

A pair is made when its chosen draft did not hurt, its rejected draft did worse by at least the
margin, and their texts differ by more than a few words. Everything that is dropped is counted with
its reason.
"""

from cowest_dspy.pairs.labels import UnpairedPreference, UnpairedPreferences, unpaired_preferences
from cowest_dspy.pairs.lengths import Lengths
from cowest_dspy.pairs.model import (
    PreferencePairs,
    advice,
    at_least,
    check_enough,
    nothing_to_train_on,
)
from cowest_dspy.pairs.pair import Pair
from cowest_dspy.pairs.select import preference_pairs
from cowest_dspy.pairs.sharing import dataset_card

__all__ = [
    "Lengths",
    "Pair",
    "PreferencePairs",
    "UnpairedPreference",
    "UnpairedPreferences",
    "advice",
    "at_least",
    "check_enough",
    "dataset_card",
    "nothing_to_train_on",
    "preference_pairs",
    "unpaired_preferences",
]
