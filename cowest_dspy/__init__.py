"""cowest_dspy: weak-strong collaboration (CoWest, arXiv 2504.15188) as declarative DSPy pipelines.

A small, tunable model drafts, a large, frozen one refines. What a draft does to the strong model's answer, against the strong
model alone, is its influence; influence makes preference pairs, and preference tuning makes drafts that help.

Importing this package loads no torch, transformers or trl: they come when a model is loaded or tuned.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Baseline": "baselines",
    "Budget": "budget",
    "BudgetError": "errors",
    "BundleError": "errors",
    "CoWest": "optimizer",
    "Collaboration": "program",
    "CowestError": "errors",
    "Criterion": "evaluators",
    "Confident": "baselines",
    "Cycle": "cycle",
    "DPO": "tuning",
    "Experiment": "experiment",
    "GoldLikelihood": "evaluators",
    "Grounded": "baselines",
    "Influence": "influence",
    "InfluenceReport": "influence_report",
    "Judge": "evaluators",
    "KTO": "tuning",
    "LabelledDrafts": "pairs",
    "LineAdapter": "adapters",
    "NoiseFloor": "influence_report",
    "Pair": "pairs",
    "PreferencePairs": "pairs",
    "Retriever": "baselines",
    "Rubric": "evaluators",
    "SFT": "tuning",
    "Sampling": "traces",
    "SelfConsistency": "baselines",
    "SelfRefine": "baselines",
    "Store": "store",
    "StoredTraces": "traces",
    "Trace": "traces",
    "TransformersEngine": "lms",
    "Weighted": "evaluators",
    "build_lm": "lms",
    "chain_of_thought": "baselines",
    "load_bundle": "bundle",
    "collect": "traces",
    "corpus_metric": "corpus",
    "few_shot": "baselines",
    "grounded": "baselines",
    "labelled_drafts": "pairs",
    "load_config": "config",
    "noise_floor": "traces",
    "preference_pairs": "pairs",
    "rag": "baselines",
    "super_icl": "baselines",
    "tunable": "tuning",
    "tune": "tuning",
    "verify_bundle": "bundle",
    "write_bundle": "bundle",
}
__all__ = [  # noqa: RUF022 - checked by a test against _HOMES
    "Baseline",
    "Budget",
    "BudgetError",
    "BundleError",
    "CoWest",
    "Collaboration",
    "CowestError",
    "Criterion",
    "Confident",
    "Cycle",
    "DPO",
    "Experiment",
    "GoldLikelihood",
    "Grounded",
    "Influence",
    "InfluenceReport",
    "Judge",
    "KTO",
    "LabelledDrafts",
    "LineAdapter",
    "NoiseFloor",
    "Pair",
    "PreferencePairs",
    "Retriever",
    "Rubric",
    "SFT",
    "Sampling",
    "SelfConsistency",
    "SelfRefine",
    "Store",
    "StoredTraces",
    "Trace",
    "TransformersEngine",
    "Weighted",
    "build_lm",
    "chain_of_thought",
    "load_bundle",
    "collect",
    "corpus_metric",
    "few_shot",
    "grounded",
    "labelled_drafts",
    "load_config",
    "noise_floor",
    "preference_pairs",
    "rag",
    "super_icl",
    "tunable",
    "tune",
    "verify_bundle",
    "write_bundle",
]

if TYPE_CHECKING:
    from cowest_dspy.adapters import LineAdapter as LineAdapter
    from cowest_dspy.baselines import Baseline as Baseline
    from cowest_dspy.baselines import Confident as Confident
    from cowest_dspy.baselines import Grounded as Grounded
    from cowest_dspy.baselines import Retriever as Retriever
    from cowest_dspy.baselines import SelfConsistency as SelfConsistency
    from cowest_dspy.baselines import SelfRefine as SelfRefine
    from cowest_dspy.baselines import chain_of_thought as chain_of_thought
    from cowest_dspy.baselines import few_shot as few_shot
    from cowest_dspy.baselines import grounded as grounded
    from cowest_dspy.baselines import rag as rag
    from cowest_dspy.baselines import super_icl as super_icl
    from cowest_dspy.budget import Budget as Budget
    from cowest_dspy.bundle import load_bundle as load_bundle
    from cowest_dspy.bundle import verify_bundle as verify_bundle
    from cowest_dspy.bundle import write_bundle as write_bundle
    from cowest_dspy.config import load_config as load_config
    from cowest_dspy.corpus import corpus_metric as corpus_metric
    from cowest_dspy.cycle import Cycle as Cycle
    from cowest_dspy.errors import BudgetError as BudgetError
    from cowest_dspy.errors import BundleError as BundleError
    from cowest_dspy.errors import CowestError as CowestError
    from cowest_dspy.evaluators import Criterion as Criterion
    from cowest_dspy.evaluators import GoldLikelihood as GoldLikelihood
    from cowest_dspy.evaluators import Judge as Judge
    from cowest_dspy.evaluators import Rubric as Rubric
    from cowest_dspy.evaluators import Weighted as Weighted
    from cowest_dspy.experiment import Experiment as Experiment
    from cowest_dspy.influence import Influence as Influence
    from cowest_dspy.influence_report import InfluenceReport as InfluenceReport
    from cowest_dspy.influence_report import NoiseFloor as NoiseFloor
    from cowest_dspy.lms import TransformersEngine as TransformersEngine
    from cowest_dspy.lms import build_lm as build_lm
    from cowest_dspy.optimizer import CoWest as CoWest
    from cowest_dspy.pairs import LabelledDrafts as LabelledDrafts
    from cowest_dspy.pairs import Pair as Pair
    from cowest_dspy.pairs import PreferencePairs as PreferencePairs
    from cowest_dspy.pairs import labelled_drafts as labelled_drafts
    from cowest_dspy.pairs import preference_pairs as preference_pairs
    from cowest_dspy.program import Collaboration as Collaboration
    from cowest_dspy.store import Store as Store
    from cowest_dspy.traces import Sampling as Sampling
    from cowest_dspy.traces import StoredTraces as StoredTraces
    from cowest_dspy.traces import Trace as Trace
    from cowest_dspy.traces import collect as collect
    from cowest_dspy.traces import noise_floor as noise_floor
    from cowest_dspy.tuning import DPO as DPO
    from cowest_dspy.tuning import KTO as KTO
    from cowest_dspy.tuning import SFT as SFT
    from cowest_dspy.tuning import tunable as tunable
    from cowest_dspy.tuning import tune as tune


def __getattr__(name: str) -> Any:
    """Names are looked up when they are first used, so that one part does not load the others."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
