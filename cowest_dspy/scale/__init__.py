"""Collections in shards on a Ray cluster: each task collects some of the examples into a store of
its own, and the run's store takes them over.

cluster.py      Cluster: from examples to shards, tasks and merged traces; whether a cluster will do
shard.py        one shard: its store, what a task does, merging
coordinator.py  the actor with the budget, rate limits and progress of all shards
config.py       [ray]
"""

from cowest_dspy.scale.cluster import Cluster, check_cluster
from cowest_dspy.scale.config import RayRules
from cowest_dspy.scale.shard import merge_shards

__all__ = ["Cluster", "RayRules", "check_cluster", "merge_shards"]
