"""cowest_dspy: weak-strong collaboration (CoWest, arXiv 2504.15188) as declarative DSPy pipelines.

A small, tunable model drafts, a large, frozen one refines. What a draft does to the strong model's
answer, against the strong model alone, is its influence; influence makes preference pairs, and
preference tuning makes drafts that help.

Importing this package loads no torch, transformers or trl: they come when a model is loaded or
tuned.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Baseline": "program.baselines",
    "Budget": "store.budget",
    "BudgetError": "errors",
    "BundleError": "errors",
    "CoWest": "optimizers.cowest",
    "Collaboration": "program.collaboration",
    "CowestError": "errors",
    "Criterion": "influence.judge",
    "Confident": "program.baselines",
    "Cycle": "optimizers.cycle",
    "DPO": "tuning",
    "Experiment": "experiment",
    "GoldLikelihood": "influence.likelihood",
    "Grounded": "program.baselines",
    "Influence": "influence.metric",
    "InfluenceReport": "influence.report",
    "Judge": "influence.judge",
    "KTO": "tuning",
    "LabelledDrafts": "pairs",
    "LineAdapter": "program.adapters",
    "LocalEngine": "lms",
    "NoiseFloor": "influence.report",
    "Pair": "pairs",
    "PreferencePairs": "pairs",
    "Retriever": "program.baselines",
    "Rubric": "influence.judge",
    "SFT": "tuning",
    "Sampling": "influence.trace",
    "SelfConsistency": "program.baselines",
    "SelfRefine": "program.baselines",
    "Store": "store.store",
    "StoredTraces": "influence.stored_traces",
    "Trace": "influence.trace",
    "Weighted": "influence.weighted",
    "build_lm": "lms",
    "chain_of_thought": "program.baselines",
    "load_bundle": "experiment.bundle",
    "collect": "influence.collection",
    "corpus_metric": "report.corpus",
    "few_shot": "program.baselines",
    "grounded": "program.baselines",
    "labelled_drafts": "pairs",
    "load_config": "experiment.config",
    "noise_floor": "influence.noise",
    "preference_pairs": "pairs",
    "rag": "program.baselines",
    "super_icl": "program.baselines",
    "tunable": "tuning",
    "tune": "tuning",
    "verify_bundle": "experiment.bundle",
    "write_bundle": "experiment.bundle",
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
    "LocalEngine",
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

_RENAMED = {"TransformersEngine": "LocalEngine"}

if TYPE_CHECKING:
    from cowest_dspy.errors import BudgetError as BudgetError
    from cowest_dspy.errors import BundleError as BundleError
    from cowest_dspy.errors import CowestError as CowestError
    from cowest_dspy.experiment import Experiment as Experiment
    from cowest_dspy.experiment.bundle import load_bundle as load_bundle
    from cowest_dspy.experiment.bundle import verify_bundle as verify_bundle
    from cowest_dspy.experiment.bundle import write_bundle as write_bundle
    from cowest_dspy.experiment.config import load_config as load_config
    from cowest_dspy.influence.collection import collect as collect
    from cowest_dspy.influence.judge import Criterion as Criterion
    from cowest_dspy.influence.judge import Judge as Judge
    from cowest_dspy.influence.judge import Rubric as Rubric
    from cowest_dspy.influence.likelihood import GoldLikelihood as GoldLikelihood
    from cowest_dspy.influence.metric import Influence as Influence
    from cowest_dspy.influence.noise import noise_floor as noise_floor
    from cowest_dspy.influence.report import InfluenceReport as InfluenceReport
    from cowest_dspy.influence.report import NoiseFloor as NoiseFloor
    from cowest_dspy.influence.stored_traces import StoredTraces as StoredTraces
    from cowest_dspy.influence.trace import Sampling as Sampling
    from cowest_dspy.influence.trace import Trace as Trace
    from cowest_dspy.influence.weighted import Weighted as Weighted
    from cowest_dspy.lms import LocalEngine as LocalEngine
    from cowest_dspy.lms import build_lm as build_lm
    from cowest_dspy.optimizers.cowest import CoWest as CoWest
    from cowest_dspy.optimizers.cycle import Cycle as Cycle
    from cowest_dspy.pairs import LabelledDrafts as LabelledDrafts
    from cowest_dspy.pairs import Pair as Pair
    from cowest_dspy.pairs import PreferencePairs as PreferencePairs
    from cowest_dspy.pairs import labelled_drafts as labelled_drafts
    from cowest_dspy.pairs import preference_pairs as preference_pairs
    from cowest_dspy.program.adapters import LineAdapter as LineAdapter
    from cowest_dspy.program.baselines import Baseline as Baseline
    from cowest_dspy.program.baselines import Confident as Confident
    from cowest_dspy.program.baselines import Grounded as Grounded
    from cowest_dspy.program.baselines import Retriever as Retriever
    from cowest_dspy.program.baselines import SelfConsistency as SelfConsistency
    from cowest_dspy.program.baselines import SelfRefine as SelfRefine
    from cowest_dspy.program.baselines import chain_of_thought as chain_of_thought
    from cowest_dspy.program.baselines import few_shot as few_shot
    from cowest_dspy.program.baselines import grounded as grounded
    from cowest_dspy.program.baselines import rag as rag
    from cowest_dspy.program.baselines import super_icl as super_icl
    from cowest_dspy.program.collaboration import Collaboration as Collaboration
    from cowest_dspy.report.corpus import corpus_metric as corpus_metric
    from cowest_dspy.store.budget import Budget as Budget
    from cowest_dspy.store.store import Store as Store
    from cowest_dspy.tuning import DPO as DPO
    from cowest_dspy.tuning import KTO as KTO
    from cowest_dspy.tuning import SFT as SFT
    from cowest_dspy.tuning import tunable as tunable
    from cowest_dspy.tuning import tune as tune


def __getattr__(name: str) -> Any:
    """Names are looked up when they are first used, so that one part does not load the others."""
    if name in _RENAMED:
        raise AttributeError(f"cowest_dspy.{name} is called {_RENAMED[name]} now.")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
