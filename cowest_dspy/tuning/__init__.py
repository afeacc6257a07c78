"""Tuning of the weak model: SFT, DPO and KTO by TRL and PEFT, and DSPy's provider around them.

config.py          the tables [sft], [dpo], [kto]: SFT, DPO, KTO, Lora, in TRL's and PEFT's names
data.py            what training rows look like, which are held out, their order
train.py           train_sft, train_dpo, train_kto -> Tuned
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
    data_format,
    engine_of,
    tunable,
    tune,
)
from cowest_dspy.tuning.train import OnStep, PeakMemory, Tuned, train_dpo, train_kto, train_sft

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
    "data_format",
    "engine_of",
    "launch",
    "plan_processes",
    "train_dpo",
    "train_kto",
    "train_sft",
    "tunable",
    "tune",
]
