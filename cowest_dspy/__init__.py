"""cowest_dspy: weak-strong collaboration (CoWest, arXiv 2504.15188) as declarative DSPy pipelines.

A small, tunable model drafts, a large, frozen one refines. What a draft does to the strong model's
answer, against the strong model alone, is its influence; influence makes preference pairs, and
preference tuning makes drafts that help.

Names are imported when they are first used: importing this package loads no torch, transformers or
trl. What is not listed here lives in its room, such as ``cowest_dspy.program.rag``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cowest_dspy.errors import CowestError as CowestError
    from cowest_dspy.experiment import Experiment as Experiment
    from cowest_dspy.experiment.bundle import load_bundle as load_bundle
    from cowest_dspy.experiment.config import load_config as load_config
    from cowest_dspy.influence import Influence as Influence
    from cowest_dspy.influence import InfluenceReport as InfluenceReport
    from cowest_dspy.influence import Judge as Judge
    from cowest_dspy.influence import Sampling as Sampling
    from cowest_dspy.influence import Trace as Trace
    from cowest_dspy.influence import collect as collect
    from cowest_dspy.lms import build_lm as build_lm
    from cowest_dspy.optimizers import CoWest as CoWest
    from cowest_dspy.optimizers import Cycle as Cycle
    from cowest_dspy.pairs import PreferencePairs as PreferencePairs
    from cowest_dspy.pairs import preference_pairs as preference_pairs
    from cowest_dspy.program import Collaboration as Collaboration
    from cowest_dspy.program import LineAdapter as LineAdapter
    from cowest_dspy.store import Budget as Budget
    from cowest_dspy.store import Store as Store
    from cowest_dspy.tuning import DPO as DPO
    from cowest_dspy.tuning import KTO as KTO
    from cowest_dspy.tuning import SFT as SFT
    from cowest_dspy.tuning import tune as tune

__version__ = "0.1.0"

_ROOMS = {
    "errors": ["CowestError"],
    "experiment": ["Experiment"],
    "experiment.bundle": ["load_bundle"],
    "experiment.config": ["load_config"],
    "influence": ["Influence", "InfluenceReport", "Judge", "Sampling", "Trace", "collect"],
    "lms": ["build_lm"],
    "optimizers": ["CoWest", "Cycle"],
    "pairs": ["PreferencePairs", "preference_pairs"],
    "program": ["Collaboration", "LineAdapter"],
    "store": ["Budget", "Store"],
    "tuning": ["DPO", "KTO", "SFT", "tune"],
}
_HOMES = {name: room for room, names in _ROOMS.items() for name in names}
__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]

# Names that stood here once, and where they are now.
_MOVED = {
    "LabelledDrafts": "pairs.UnpairedPreferences",
    "StoredTraces": "influence.Traces",
    "TransformersEngine": "lms.LocalEngine",
    "labelled_drafts": "pairs.unpaired_preferences",
}
for _room, _names in {
    "errors": "BudgetError BundleError",
    "experiment.bundle": "verify_bundle write_bundle",
    "influence": "Criterion GoldLikelihood NoiseFloor Rubric Weighted noise_floor",
    "pairs": "Pair",
    "program": "Baseline Confident Grounded Retriever SelfConsistency SelfRefine chain_of_thought "
    "few_shot grounded rag super_icl",
    "report.corpus": "corpus_metric",
    "tuning": "tunable",
}.items():
    _MOVED.update({name: f"{_room}.{name}" for name in _names.split()})


def __getattr__(name: str) -> Any:
    """Import a name of the front from its room."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name in _MOVED:
        raise AttributeError(f"{__name__}.{name} is {__name__}.{_MOVED[name]} now.")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
