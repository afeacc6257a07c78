"""An experiment: a configuration and a run folder, one method per stage, each of them resumable."""

from cowest_dspy.experiment.desk import Silent, Watch
from cowest_dspy.experiment.experiment import Experiment

__all__ = ["Experiment", "Silent", "Watch"]
