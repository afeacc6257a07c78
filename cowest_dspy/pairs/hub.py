"""For the Hub: the upload of a folder, in one commit, private unless it is said otherwise; and
tables of the cards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from cowest_dspy.errors import CowestError, masked


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
    """Uploads a folder as a Hub dataset or model, made when it is not there; gives its address.
    Failures are raised as ``error``: no permission, no connection, no such owner; or ``private`` is
    wanted of what is public."""
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    api = HfApi(token=token)
    try:
        made = api.create_repo(repo_id, repo_type=kind, private=private, exist_ok=True)
        info = api.dataset_info if kind == "dataset" else api.model_info
        if private and info(made.repo_id).private is not True:
            raise error(
                f"The {kind} {made.repo_id} exists and is public: nothing was uploaded. Give "
                "another name, make it private on the "
                "Hub, or say that it may be public (--public, private=False)."
            )
        api.upload_folder(
            repo_id=made.repo_id, repo_type=kind, folder_path=folder, commit_message=message
        )
    except (httpx.HTTPError, OSError, HFValidationError) as found:
        raise error(
            f"The Hub did not take {repo_id}: {masked(' '.join(str(found).split()))[:300]}. Log "
            "in with `hf auth login`, or set "
            "HF_TOKEN to a token that may write."
        ) from found
    return str(made)
