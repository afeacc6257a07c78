"""The reference's log-probabilities of pairs: computed once before the first step, and kept for the
next training.

They depend on the weights that training starts from and on the tokens of the pairs, not on beta,
the loss or the learning rate. So a resumed training, and others on the same pairs, read them from
the file of the first.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cowest_dspy.tuning.kept import keep, kept


def add(trainer: Any, lengths: Sequence[int], folder: Path | None) -> None:
    """Adds the reference's log-probabilities to the trainer's pairs, so that no pass has to compute
    them.

    ``lengths``: tokens of each pair's longer side. ``folder``: where they are kept, one file per
        set of pairs; it belongs to one start, that is, one base and one adapter. None: nowhere. A
        file that is damaged is computed and written anew.

    TRL can do so itself (``precompute_ref_log_probs``), but it hashes all weights first and leaves
    a file in the user's cache.
    """
    data = trainer.train_dataset
    path = folder / f"{_name(trainer)}.safetensors" if folder else None
    found = kept(path) if path else None
    values = found[0]["logps"] if found else None
    if values is None or tuple(values.shape) != (len(data), 2):
        values = _computed(trainer, lengths)
        if path and bool(values.isfinite().all()):
            keep(path, {"logps": values}, {"rows": len(data), "columns": ["chosen", "rejected"]})
    data = data.add_column("ref_chosen_logps", values[:, 0].tolist())
    trainer.train_dataset = data.add_column("ref_rejected_logps", values[:, 1].tolist())
    trainer.precompute_ref_logps = True


def _computed(trainer: Any, lengths: Sequence[int]) -> Any:
    """A float64 tensor [pairs, 2]: the summed log-probability of chosen and of rejected. Rows of
    like length go together."""
    import torch

    data, size = trainer.train_dataset, trainer.args.per_device_train_batch_size
    by_length = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    values = torch.empty((len(data), 2), dtype=torch.float64)
    trainer.model.eval()
    for start in range(0, len(by_length), size):
        indices = by_length[start : start + size]
        batch = trainer._prepare_inputs(trainer.data_collator([data[index] for index in indices]))
        chosen, rejected = trainer.compute_ref_log_probs(trainer.model, batch)
        values[indices] = torch.stack([chosen, rejected], dim=1).double().cpu()
    return values


def _name(trainer: Any) -> str:
    """12 hexadecimal digits of everything but the weights that decides the values, down to how they
    are rounded."""
    data, args = trainer.train_dataset, trainer.args
    digest = hashlib.sha256()
    versions = [
        importlib.metadata.version(library) for library in ("torch", "transformers", "trl", "peft")
    ]
    how = [
        *versions,
        args.per_device_train_batch_size,
        args.bf16,
        str(trainer.model.dtype),
        str(trainer.accelerator.device),
    ]
    digest.update(json.dumps(how).encode())
    for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
        digest.update(json.dumps([column, *data[column]]).encode())
    return digest.hexdigest()[:12]
