"""The Hugging Face Hub: the card of a dataset of pairs, and the upload of a folder in one commit,
private unless it is said otherwise. Nothing is sent unless one asks for it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from cowest_dspy import __version__
from cowest_dspy.compat import hub_errors
from cowest_dspy.errors import CowestError, PairsError, masked
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

A small, tunable weak model wrote several drafts for each example; a large, frozen strong model
refined each of them into an answer. What a draft did to the score of that answer, against the
strong model alone, is its **influence**, in [-1, 1]. In each row, the chosen draft has the larger
influence and did not hurt, and the rejected one did worse. The method is CoWest
([arXiv 2504.15188](https://arxiv.org/abs/2504.15188)).
"""
_IMPORTED = """
# Preference pairs

They were imported from elsewhere: how they were made is not recorded here.
"""
_COLUMNS = """
## Columns

- `prompt`, `chosen`, `rejected`: messages (`role`, `content`), as `trl.DPOTrainer` takes them.
- `example_id`, `round`, `run`: where the pair comes from; `chosen_index`, `rejected_index`: the
  drafts' places in their example.
- `chosen_influence`, `rejected_influence`, in [-1, 1]: the score of the answer refined from the
  draft, less `alone_score`.
- `chosen_score`, `rejected_score`, `alone_score`, in [0, 1]: of the answers refined from the two
  drafts, and of the strong model without any draft.
- `weak_model`, `strong_model`: the models' ids; that of a tuned model contains a hash of its
  weights.

Numbers are null where nobody measured them.

## Licence

None is given here. It depends on the examples' source and on the licences of both models: add it
before you publish.
"""


def dataset_card(pairs: Any) -> str:
    """The README.md of a Hub dataset of PreferencePairs: what the pairs are, how many, what was
    dropped, influence, models, how they were made. It names no licence, which is for who publishes
    to choose; what looks like a secret is masked."""
    import dspy

    measured = [
        (pair.chosen_influence, pair.rejected_influence)
        for pair in pairs
        if pair.chosen_influence is not None and pair.rejected_influence is not None
    ]
    numbers: list[tuple[str, Any]] = [
        ("pairs", len(pairs)),
        ("examples", len({(pair.round, pair.example_id) for pair in pairs})),
        ("rounds", ", ".join(map(str, sorted({pair.round for pair in pairs})))),
        *([("lengths", pairs.lengths)] if pairs else []),
    ]
    if measured:
        chosen, rejected = (fmean(values) for values in zip(*measured, strict=True))
        numbers += [
            ("mean influence of chosen drafts", f"{chosen:+.3f}"),
            ("mean influence of rejected drafts", f"{rejected:+.3f}"),
            ("pairs with a measured influence", len(measured)),
        ]
    else:
        numbers.append(("influence", "not measured"))
    models = [
        (role, f"`{name}`")
        for role in ("weak", "strong")
        for name in dict.fromkeys(getattr(pair, f"{role}_model") for pair in pairs)
    ]
    made = [(name, value) for name, value in pairs.rules.items() if value is not None]
    made += [("cowest_dspy", __version__), ("dspy", dspy.__version__)]
    parts = [
        _HEAD,
        _MEASURED if measured else _IMPORTED,
        table("In numbers", ("what", "how many"), numbers),
        table("Dropped by the filters", ("reason", "count"), list(pairs.dropped.items())),
        table("Models", ("role", "model"), models),
        table("How they were made", ("setting", "value"), made),
        _COLUMNS,
    ]
    return masked("".join(parts))


def write_dataset(folder: Path, pairs: Any) -> Path:
    """Write PreferencePairs as a folder that ``datasets.load_dataset`` reads and the Hub shows:
    README.md and the rows.

    Raises:
        PairsError: a row holds what looks like a secret, an API key for instance.
    """
    rows = pairs.rows()
    for number, row in enumerate(rows, start=1):
        text = json.dumps(row, ensure_ascii=False)
        if masked(text) != text:
            raise PairsError(
                f"Row {number} (example {row['example_id']}) holds what looks like a secret, an "
                "API key for instance: nothing was uploaded. Look at the draft and its prompt, and "
                "leave the pair out."
            )
    write_jsonl(folder / DATA_FILE, rows)
    (folder / "README.md").write_text(dataset_card(pairs), encoding="utf-8")
    return folder


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A section of a card with a Markdown table; nothing without rows."""
    if not rows:
        return ""
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
        *(f"| {' | '.join(row)} |" for row in cells),
    ]
    return f"\n## {title}\n\n" + "\n".join(lines) + "\n"


def upload(
    folder: Path,
    repo_id: str,
    *,
    kind: Literal["dataset", "model"],
    message: str,
    private: bool,
    token: str | None,
    error: type[CowestError],
) -> str:
    """Upload a folder as a Hub dataset or model, made when it is not there, and give its address.
    Failures are raised as ``error``: no permission, no connection, no such owner; or ``private`` is
    wanted of what is public."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    api = HfApi(token=token)
    try:
        made = api.create_repo(repo_id, repo_type=kind, private=private, exist_ok=True)
        info = api.dataset_info if kind == "dataset" else api.model_info
        if private and info(made.repo_id).private is not True:
            raise error(
                f"The {kind} {made.repo_id} exists and is public: nothing was uploaded. Give "
                "another name, make it private on the Hub, or say that it may be public (--public, "
                "private=False)."
            )
        api.upload_folder(
            repo_id=made.repo_id, repo_type=kind, folder_path=folder, commit_message=message
        )
    except (*hub_errors(), HFValidationError) as found:
        raise error(
            f"The Hub did not take {repo_id}: {masked(' '.join(str(found).split()))[:300]}. Log in "
            "with `hf auth login`, or set HF_TOKEN to a token that may write."
        ) from found
    return str(made)
