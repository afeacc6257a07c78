"""The LMs of a configuration's roles: they answer on this machine, or on the cluster of [ray]."""

from __future__ import annotations

import dspy

from cowest_dspy.experiment.config import Config
from cowest_dspy.lms import build_lm
from cowest_dspy.scale import Cluster


class Models:
    """Makes LMs for the roles of configurations; parts of one run share its cluster.

    Args:
        config: whose [collect] engine says where models answer.

    Raises:
        ConfigError: on a cluster, and Ray is not installed.
    """

    def __init__(self, config: Config) -> None:
        self.cluster = Cluster(config.cluster) if config.cluster else None

    def lm(self, config: Config, role: str) -> dspy.LM:
        """The LM of a role that ``config`` has a table for."""
        settings = getattr(config, role)
        if self.cluster is None or config.cluster is None:
            return build_lm(settings)
        return self.cluster.lm(settings, getattr(config.cluster, role))

    def close(self) -> None:
        """Ends the workers on the cluster, if there are any."""
        if self.cluster is not None:
            self.cluster.close()
