"""A model in this process: an engine that batches requests from any number of threads."""

from cowest_dspy.lms.local.engine import LocalEngine

__all__ = ["LocalEngine"]
