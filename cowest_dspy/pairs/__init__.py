"""The gate: traces -> preference pairs, or drafts that helped and drafts that hurt. Two drafts of
one example, ranked by influence.

    pairs = preference_pairs(traces, margin=0.5)      best against worst; or strategy="paper", "all"
    pairs.dropped                                     {"drafts that failed (timeout)": 3, "examples:
        the best draft hurt": 5, ...}
    pairs.to_dataset()                                what trl.DPOTrainer takes, with lineage beside
        it
    labelled_drafts(traces).to_dataset()              what trl.KTOTrainer takes

A pair is made when its chosen draft did not hurt, its rejected draft did worse by at least the
margin, and their texts differ by more than a few words. Everything that is dropped is counted with
its reason.
"""

from cowest_dspy.pairs.labels import LabelledDraft, LabelledDrafts, labelled_drafts
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
    "LabelledDraft",
    "LabelledDrafts",
    "Lengths",
    "Pair",
    "PreferencePairs",
    "advice",
    "at_least",
    "check_enough",
    "dataset_card",
    "labelled_drafts",
    "nothing_to_train_on",
    "preference_pairs",
]
