"""Other ways to use one model or two, to compare a collaboration with; each a ``dspy.Module`` of ordinary predictors."""

from cowest_dspy.baselines.retrieval import Grounded, Retriever, grounded, rag

__all__ = ["Grounded", "Retriever", "grounded", "rag"]
