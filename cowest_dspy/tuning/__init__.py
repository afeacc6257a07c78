"""Tuning of the weak model: SFT, DPO and KTO by TRL and PEFT, and DSPy's provider around them.

config.py          the tables [sft], [dpo], [kto]: SFT, DPO, KTO, Lora, in TRL's and PEFT's names
data.py            what training rows look like, which are held out, their order
trainers.py        TRL's trainers: made, watched, and given the reference
train.py           train_adapter -> Tuned; checkpoints, the adapter on disk
shared_prompt.py   the prompt of a pair computed once
launch.py          the same by several processes, started by ``accelerate launch``
provider.py        TRLProvider, tunable, tune
"""

from cowest_dspy.tuning.config import DPO, KTO, KTO_LOSS_TYPES, LOSS_TYPES, SFT, Lora
from cowest_dspy.tuning.launch import Processes, check_processes, launch, plan_processes
from cowest_dspy.tuning.provider import (
    JobStatus,
    TRLProvider,
    TRLTrainingJob,
    TunableEngine,
    TunedLM,
    TuningCancelled,
    engine_of,
    tunable,
    tune,
)
from cowest_dspy.tuning.train import OnStep, PeakMemory, Tuned, train_adapter

__all__ = [
    "DPO",
    "KTO",
    "KTO_LOSS_TYPES",
    "LOSS_TYPES",
    "SFT",
    "JobStatus",
    "Lora",
    "OnStep",
    "PeakMemory",
    "Processes",
    "TRLProvider",
    "TRLTrainingJob",
    "TunableEngine",
    "Tuned",
    "TunedLM",
    "TuningCancelled",
    "check_processes",
    "engine_of",
    "launch",
    "plan_processes",
    "train_adapter",
    "tunable",
    "tune",
]
