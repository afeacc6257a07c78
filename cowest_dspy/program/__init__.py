"""Collaboration: a weak model drafts and a strong one refines; baselines that answer otherwise;
prompt adapters."""

from __future__ import annotations

from cowest_dspy.program.adapters import LineAdapter
from cowest_dspy.program.baselines import (
    Baseline,
    Grounded,
    Retriever,
    SelfRefine,
    chain_of_thought,
    few_shot,
    grounded,
    rag,
)
from cowest_dspy.program.collaboration import Collaboration, DraftFormat
from cowest_dspy.program.voting import Confident, SelfConsistency, super_icl

__all__ = [
    "Baseline",
    "Collaboration",
    "Confident",
    "DraftFormat",
    "Grounded",
    "LineAdapter",
    "Retriever",
    "SelfConsistency",
    "SelfRefine",
    "chain_of_thought",
    "few_shot",
    "grounded",
    "rag",
    "super_icl",
]
