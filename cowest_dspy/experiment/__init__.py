"""An experiment: a configuration and a run folder, one method per stage, each of them resumable."""

from cowest_dspy.experiment.experiment import Experiment
from cowest_dspy.stages import Silent, Watch

__all__ = ["Experiment", "Silent", "Watch"]
