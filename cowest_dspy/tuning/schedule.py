"""In which order rows are trained on: shuffled passes one after the other, cut into batches of
equal size.

Every optimiser step has exactly ``batch_size`` rows: the batch at the end of a pass is filled from
the next one. Inside a batch rows are sorted by length, so that a micro-batch pads little; a batch's
gradient does not depend on its order. So how many rows go through the model at once changes speed
and memory, not the result.
"""

from __future__ import annotations

import random
from collections.abc import Sequence


def order(lengths: Sequence[int], steps: int, batch_size: int, seed: int) -> list[int]:
    """Indices of rows, ``steps * batch_size`` of them, in the order of training.

    ``lengths`` are the rows' tokens. Within a batch the longest come first; rows of one length stay
    in the data's order.

    >>> order([5, 9, 7], steps=2, batch_size=2, seed=0)
    [1, 0, 2, 0]
    """
    chance = random.Random(seed)
    stream: list[int] = []
    while len(stream) < steps * batch_size:
        stream += chance.sample(range(len(lengths)), len(lengths))
    ordered: list[int] = []
    for start in range(0, steps * batch_size, batch_size):
        ordered += sorted(
            stream[start : start + batch_size], key=lambda index: (-lengths[index], index)
        )
    return ordered
