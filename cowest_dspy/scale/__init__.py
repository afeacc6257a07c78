"""Models that answer on a Ray cluster, for collections, evaluations and comparisons that are
otherwise those of one machine.

The calls travel, not the examples: an answer must be committed to the run's store before it is
used, and only this process writes the store. So it makes the prompts, keeps the answers, counts
budget and rate limits, and scores; workers only answer.
"""

from cowest_dspy.scale.checking import look_at_cluster
from cowest_dspy.scale.cluster import Cluster
from cowest_dspy.scale.connection import check_installed
from cowest_dspy.scale.engine import ClusterEngine

__all__ = ["Cluster", "ClusterEngine", "check_installed", "look_at_cluster"]
