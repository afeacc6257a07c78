"""The base of every table of a TOML: a frozen pydantic model that refuses keys it does not know;
the types of its paths; and the keys that had another name once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo

from cowest_dspy.utils.masking import remember_secret
from cowest_dspy.utils.reading import expand_user

MOVED: Mapping[str, Mapping[str, str]] = {
    "data": {
        "fold": "it in [data.arguments]",
        "passages": "it in [data.arguments]",
    },
    "collect": {
        "max_failed": "max_errors",
        "engine": "a [ray] table, which alone spreads a collection over a cluster; leave it out, "
        "or give an empty one in a later file, to stay on this machine",
    },
    "training": {
        "epochs": "num_train_epochs",
        "batch_size": "per_device_train_batch_size times gradient_accumulation_steps: the rows of "
        "one optimiser step",
        "micro_batch_size": "per_device_train_batch_size, and gradient_accumulation_steps beside "
        "it",
        "warmup": "warmup_steps; a number below 1 is a part of all steps",
        "warmup_ratio": "warmup_steps; a number below 1 is a part of all steps",
        "lr_scheduler": "lr_scheduler_type",
        "precision": "bf16 = true or false",
        "evaluate_every": "eval_steps",
        "patience": "early_stopping_patience",
        "keep_best": "load_best_model_at_end",
        "checkpoint_steps": "save_steps",
        "peft_config": "lora, whose keys are those of peft.LoraConfig",
        "lora_r": "r in lora",
        "lora_rank": "r in lora",
        "lora_alpha": "lora_alpha in lora",
        "lora_dropout": "lora_dropout in lora",
        "lora_target_modules": "target_modules in lora",
    },
    "lora": {
        "rank": "r",
        "alpha": "lora_alpha",
        "dropout": "lora_dropout",
        "lora_r": "r",
        "lora_target_modules": "target_modules",
    },
}
"""Old keys and those of other tools, by the table in which they are looked for, and what to write.
"training" is [dpo], [kto], and the settings of [sft]."""


class TomlTable(BaseModel):
    """A table of a TOML: frozen, and closed to keys that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def _folder(info: ValidationInfo) -> Path | None:
    """The folder of the TOML file that is being read; None where a value comes from elsewhere."""
    return (info.context or {}).get("folder")


def split_reference(value: str) -> tuple[str, str, str]:
    """``"recipe.py:name"`` as ``("recipe.py", ":", "name")``; what names nothing in a file, as it
    is with two empty strings."""
    return value.rpartition(":") if value.rpartition(":")[2].isidentifier() else (value, "", "")


def resolve_reference(value: str, info: ValidationInfo) -> str:
    """The value of a :data:`Reference`."""
    path, colon, name = split_reference(value)
    folder = _folder(info)
    if folder is None or not path.endswith((".py", ".jsonl")):
        return value
    return str((folder / expand_user(path)).resolve()) + colon + name


def _resolve_folder(value: str, info: ValidationInfo) -> str:
    folder = _folder(info)
    if folder is None:
        return value
    path = folder / expand_user(value)
    written = value.startswith((".", "~", "/"))
    return str(path.resolve()) if written or path.is_dir() or path.suffix == ".gguf" else value


def _resolve_file(value: str, info: ValidationInfo) -> str:
    folder = _folder(info)
    return value if folder is None else str((folder / expand_user(value)).resolve())


def _resolve_argument(value: str, info: ValidationInfo) -> str:
    folder = _folder(info)
    return value if folder is None else value.replace("{here}", str(folder.resolve()))


def _resolve_uri(value: str, info: ValidationInfo) -> str:
    before, sqlite, path = value.partition("sqlite:///")
    if not sqlite:
        return _resolve_folder(value, info)
    return value if before or path.startswith("/") else sqlite + _resolve_file(path, info)


Reference = Annotated[str, AfterValidator(resolve_reference)]
""" "recipe.py:name" or "rows.jsonl", relative to the TOML file in which it stands; an installed
"package.module:name" or "hub:..." stays as it is."""
Folder = Annotated[str, AfterValidator(_resolve_folder)]
"""A folder or GGUF file, relative to the TOML file, when it is one or is written like one; a Hub id
or a name stays as it is."""
File = Annotated[str, AfterValidator(_resolve_file)]
"""A file, relative to the TOML file."""
Argument = Annotated[str, AfterValidator(_resolve_argument)]
"""A part of a command, in which "{here}" is the folder of the TOML file."""
Uri = Annotated[str, AfterValidator(_resolve_uri)]
"""An address; a file of SQLite or a folder relative to the TOML file."""


def name_of_a_variable(value: str | None) -> str | None:
    """The value of an ``api_key_env``; an error where it cannot be a variable's name. The key that
    it holds is masked from now on, also by commands that need no key and only show what a run has
    written."""
    if (value is not None and not value.replace("_", "").isalnum()) or (
        value and value.startswith(("sk-", "hf_"))
    ):
        raise ValueError(
            "give the NAME of an environment variable, for instance OPENAI_API_KEY, never a key "
            "itself"
        )
    remember_secret(os.environ.get(value or ""))
    return value
