"""collect(): n drafts per example, each refined, each measured against the strong model alone.

trace.py        Trace: one draft and all that is needed to audit it; Sampling: how drafts are sampled
pool.py         work done in threads and given in order, so many items ahead and no more
rollout.py      one example: its drafts, their refinements, the strong model alone, the scores; each step starts when it can
enough.py       when an example needs no more drafts
kept.py         the traces of a collection: a list, or a sequence that is read from the run's store
noise.py        the noise floor: the strong model alone, asked again
collecting.py   collect(): every example, within its limits; stops when too many fail; collect_again(): what failed
"""

from cowest_dspy.pool import Progress, in_order
from cowest_dspy.traces.collecting import collect, collect_again, with_failed_calls
from cowest_dspy.traces.kept import HeldTraces, StoredTraces, Traces, influence_report
from cowest_dspy.traces.noise import noise_floor, noise_in
from cowest_dspy.traces.trace import Sampling, Trace

__all__ = [
    "HeldTraces",
    "Progress",
    "Sampling",
    "StoredTraces",
    "Trace",
    "Traces",
    "collect",
    "collect_again",
    "in_order",
    "influence_report",
    "noise_floor",
    "noise_in",
    "with_failed_calls",
]
