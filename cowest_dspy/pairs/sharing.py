"""Pairs as a dataset of the Hugging Face Hub: its card, its folder, its upload. Nothing is sent
unless one asks for it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

from cowest_dspy import __version__
from cowest_dspy.errors import PairsError, masked
from cowest_dspy.pairs import hub
from cowest_dspy.pairs.lengths import Lengths
from cowest_dspy.pairs.pair import Pair
from cowest_dspy.utils.jsonl import write_jsonl

DATA_FILE = "data/train.jsonl"
_HEAD = f"""---
pretty_name: CoWest preference pairs
tags:
- preference
- dpo
- cowest
configs:
- config_name: default
  data_files:
  - split: train
    path: {DATA_FILE}
---
"""
_MEASURED = """
# Preference pairs from weak-strong collaboration

A small, tunable weak model wrote several drafts for each example; a large, frozen strong model refined each of them into an
answer. What a draft did to the score of that answer, against the strong model alone, is its **influence**, in [-1, 1]. In each row,
the chosen draft has the larger influence and did not hurt, and the rejected one did worse. The method is CoWest
([arXiv 2504.15188](https://arxiv.org/abs/2504.15188)).
"""
_IMPORTED = """
# Preference pairs

They were imported from elsewhere: how they were made is not recorded here.
"""
_COLUMNS = """
## Columns

- `prompt`, `chosen`, `rejected`: messages (`role`, `content`), as `trl.DPOTrainer` takes them.
- `example_id`, `round`, `run`: where the pair comes from; `chosen_index`, `rejected_index`: the drafts' places in their example.
- `chosen_influence`, `rejected_influence`, in [-1, 1]: the score of the answer refined from the draft, less `alone_score`.
- `chosen_score`, `rejected_score`, `alone_score`, in [0, 1]: of the answers refined from the two drafts, and of the strong model
  without any draft.
- `weak_model`, `strong_model`: the models' ids; that of a tuned model contains a hash of its weights.

Numbers are null where nobody measured them.

## Licence

None is given here. It depends on the examples' source and on the licences of both models: add it before you publish.
"""


class Shareable(Protocol):
    """What a card tells of: :class:`~cowest_dspy.pairs.PreferencePairs`."""

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """The pairs."""
        ...

    @property
    def dropped(self) -> dict[str, int]:
        """What was dropped, by reason."""
        ...

    @property
    def rules(self) -> dict[str, Any]:
        """The gate's rules."""
        ...

    @property
    def lengths(self) -> Lengths | None:
        """Their lengths."""
        ...


def dataset_card(pairs: Shareable) -> str:
    """The README.md of a Hub dataset: what the pairs are, how many, what was dropped, influence,
    models, how they were made. It names no licence, which is for who publishes to choose; what
    looks like a secret is masked."""
    import dspy

    examples = {(pair.round, pair.example_id) for pair in pairs.pairs}
    rounds = sorted({pair.round for pair in pairs.pairs})
    numbers = [
        ("pairs", str(len(pairs.pairs))),
        ("examples", str(len(examples))),
        ("rounds", ", ".join(map(str, rounds))),
    ]
    lengths = pairs.lengths
    numbers += [("lengths", str(lengths))] if lengths else []
    measured = _measured(pairs.pairs)
    made = [(name, str(value)) for name, value in pairs.rules.items() if value is not None]
    made += [("cowest_dspy", __version__), ("dspy", dspy.__version__)]
    parts = [
        _HEAD,
        _MEASURED if measured else _IMPORTED,
        hub.table("In numbers", ("what", "how many"), numbers + _influence(measured)),
        hub.table(
            "Dropped by the gate",
            ("reason", "count"),
            [(reason, str(count)) for reason, count in pairs.dropped.items()],
        ),
        hub.table("Models", ("role", "model"), _models(pairs.pairs)),
        hub.table("How they were made", ("setting", "value"), made),
        _COLUMNS,
    ]
    return masked("".join(parts))


def write_folder(folder: Path, rows: Sequence[Mapping[str, Any]], card: str) -> Path:
    """The dataset as a folder that ``datasets.load_dataset`` reads and the Hub shows: README.md and
    the rows.

    Raises:
        PairsError: a row holds what looks like a secret, an API key for instance.
    """
    for number, row in enumerate(rows, start=1):
        text = json.dumps(row, ensure_ascii=False)
        if masked(text) != text:
            raise PairsError(
                f"Row {number} (example {row.get('example_id', '?')}) holds what looks like a "
                "secret, an API key for instance: "
                "nothing was uploaded. Look at the draft and its prompt, and leave the pair out."
            )
    write_jsonl(folder / DATA_FILE, rows)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


def upload(folder: Path, repo_id: str, *, private: bool, token: str | None = None) -> str:
    """Uploads a folder as a Hub dataset in one commit, made when it is not there; gives its
    address.

    Raises:
        PairsError: no permission, no connection, no such owner; or ``private`` is wanted of a
            dataset that is public.
    """
    return hub.upload(
        folder,
        repo_id,
        kind="dataset",
        message="Preference pairs",
        private=private,
        token=token,
        error=PairsError,
    )


def _measured(pairs: Sequence[Pair]) -> list[tuple[float, float]]:
    """The influences of chosen and rejected, of the pairs that have them."""
    return [
        (pair.chosen_influence, pair.rejected_influence)
        for pair in pairs
        if pair.chosen_influence is not None and pair.rejected_influence is not None
    ]


def _influence(measured: Sequence[tuple[float, float]]) -> list[tuple[str, str]]:
    if not measured:
        return [("influence", "not measured")]
    chosen, rejected = (fmean(values) for values in zip(*measured, strict=True))
    return [
        ("mean influence of chosen drafts", f"{chosen:+.3f}"),
        ("mean influence of rejected drafts", f"{rejected:+.3f}"),
        ("pairs with a measured influence", str(len(measured))),
    ]


def _models(pairs: Sequence[Pair]) -> list[tuple[str, str]]:
    weak, strong = (
        dict.fromkeys(pair.weak_model for pair in pairs),
        dict.fromkeys(pair.strong_model for pair in pairs),
    )
    return [
        *(("weak", f"`{name}`") for name in weak),
        *(("strong", f"`{name}`") for name in strong),
    ]
