"""An experiment: a configuration and a run folder, one method per stage, each of them resumable;
and the comparison of its arms."""

from cowest_dspy.experiment.comparing import Compared
from cowest_dspy.experiment.experiment import Experiment
from cowest_dspy.optimizers.run import NoProgress

__all__ = ["Compared", "Experiment", "NoProgress"]
