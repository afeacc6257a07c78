"""Other ways to use one model or two, to compare a collaboration with; each a ``dspy.Module`` of
ordinary predictors.

Of one model: :func:`chain_of_thought`, :func:`few_shot`, :class:`SelfRefine`,
:class:`SelfConsistency`. Of passages: :class:`Retriever` and :func:`rag`. Of two models:
:class:`Grounded` and :func:`grounded`, :class:`Confident` and :func:`super_icl`.
"""

from cowest_dspy.program.baselines.plugins import Confident, super_icl
from cowest_dspy.program.baselines.refining import SelfRefine
from cowest_dspy.program.baselines.retrieval import Grounded, Retriever, grounded, rag
from cowest_dspy.program.baselines.tasks import Baseline, chain_of_thought, few_shot
from cowest_dspy.program.baselines.voting import SelfConsistency

__all__ = [
    "Baseline",
    "Confident",
    "Grounded",
    "Retriever",
    "SelfConsistency",
    "SelfRefine",
    "chain_of_thought",
    "few_shot",
    "grounded",
    "rag",
    "super_icl",
]
