"""[tracking]: a run in MLflow, trackio and W&B while it goes on; a tracker that is down or slow
never stops or loses it.

facts.py      what a tracker is told: parameters, numbers and curves of a run and of its parts
reading.py    these, from what the run's store holds
files.py      what is uploaded, with secrets masked and hidden inputs hidden
ledger.py     which runs of a tracker a run has, and what they were told
to_mlflow.py  to MLflow: one run, with a nested one for each round and training
to_others.py  to trackio and W&B, by the few calls that they have in common
sender.py     a process of its own that talks to a tracker, so that nobody waits for it
child.py      that process, as seen from here
tracking.py   Tracking: what an experiment does with all of it
checking.py   whether the packages and the servers are there
"""

from cowest_dspy.experiment.tracking.checking import Found, check_installed, look_at
from cowest_dspy.experiment.tracking.facts import Facts, Part, Row
from cowest_dspy.experiment.tracking.reading import Reading
from cowest_dspy.experiment.tracking.tracking import Tracking

__all__ = ["Facts", "Found", "Part", "Reading", "Row", "Tracking", "check_installed", "look_at"]
