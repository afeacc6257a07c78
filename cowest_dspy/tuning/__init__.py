"""Tuning of the weak model: settings, trainings with TRL and PEFT, and DSPy's provider around them.

other_names.py   what options of TRL and PEFT are called here
settings.py   SFT, DPO, KTO, Lora: what may be said, checked at once
rows.py       what training rows look like
schedule.py   the order of rows
watching.py   progress, peak memory, divergence
adapters.py   adapters in a model and on disk
shared_prompt.py   the prompt of a pair computed once
kept.py       tensors and facts in a file, whole or not at all
checkpoints.py  a killed training goes on
reference.py  the reference's log-probabilities, computed once
trainers.py   TRL's trainers
training.py   train_sft, train_dpo, train_kto -> Tuned
cluster.py    which processes train together: a number, or a file of Accelerate's
launching.py  the same by several processes: launch -> Tuned; launched.py is what each of them runs
speed.py      how fast one layer of a model is trained here
estimating.py memory and time of a training, before it starts
joining.py    what the machines after the first do
provider.py   TRLProvider, tunable, tune
"""

from cowest_dspy.tuning.cluster import Machines, machines
from cowest_dspy.tuning.config import DPO, KTO, KTO_LOSS_TYPES, LOSS_TYPES, SFT, Lora
from cowest_dspy.tuning.estimating import Estimate, Lengths, estimate, foreseen
from cowest_dspy.tuning.joining import join
from cowest_dspy.tuning.launching import check_processes, launch
from cowest_dspy.tuning.provider import (
    JobStatus,
    TRLProvider,
    TRLTrainingJob,
    TunableEngine,
    TunedLM,
    TuningCancelled,
    data_format,
    engine_of,
    tunable,
    tune,
)
from cowest_dspy.tuning.training import Tuned, train_dpo, train_kto, train_sft
from cowest_dspy.tuning.watching import OnStep, PeakMemory

__all__ = [
    "DPO",
    "KTO",
    "KTO_LOSS_TYPES",
    "LOSS_TYPES",
    "SFT",
    "Estimate",
    "JobStatus",
    "Lengths",
    "Lora",
    "Machines",
    "OnStep",
    "PeakMemory",
    "TRLProvider",
    "TRLTrainingJob",
    "TunableEngine",
    "Tuned",
    "TunedLM",
    "TuningCancelled",
    "check_processes",
    "data_format",
    "engine_of",
    "estimate",
    "foreseen",
    "join",
    "launch",
    "machines",
    "train_dpo",
    "train_kto",
    "train_sft",
    "tunable",
    "tune",
]
