"""How far a run is, for people and programs that look on: counted by the process that works on it,
kept in its folder.

snapshot.py  the state of a run at one moment, and its round trip through JSON
pace.py      calls per second, and the time that is left
journal.py   keeps the state, and writes it about once a second into progress.json
under_way.py  the calls that are being made
alive.py     whether the process that wrote it is still there
"""

from cowest_dspy.store.budget import Limit
from cowest_dspy.store.progress.alive import alive
from cowest_dspy.store.progress.journal import Here, Journal
from cowest_dspy.store.progress.snapshot import (
    FILE,
    Best,
    Snapshot,
    StageDone,
    StageNow,
    read_snapshot,
)

__all__ = [
    "FILE",
    "Best",
    "Here",
    "Journal",
    "Limit",
    "Snapshot",
    "StageDone",
    "StageNow",
    "alive",
    "read_snapshot",
]
