"""cowest.json: what a bundle is made of; and whether that is what lies there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from cowest_dspy.errors import BundleError, faults
from cowest_dspy.lms.gguf import sha256

FILE, FORMAT = "cowest.json", 1
ADAPTER = "adapter"
_BESIDE = re.compile(rf"\.gitattributes|\.cache/.*|{ADAPTER}/cowest-[0-9a-f]+\.gguf")


class Manifest(BaseModel):
    """What cowest.json says.

    ``base`` is the weak model without an adapter by name and content hash; ``adapter`` the content hash of the adapter, None where
    nothing was tuned; ``program`` and ``metric`` references into the bundle; ``files`` the SHA-256 of every other file by its path.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: int
    name: str
    seed: int
    created: str
    base: str
    base_hash: str
    adapter: str | None
    weak: str
    strong: str
    program: str
    metric: str
    versions: dict[str, str]
    files: dict[str, str]


def files_in(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of a folder by its path with "/" in it; but for the manifest, and what the Hub's client and
    llama.cpp's converter put beside a bundle when it is downloaded and used."""
    names = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file() or path.is_symlink()}
    return {name: sha256(path) for name, path in names.items() if name != FILE and not _BESIDE.fullmatch(name)}


def read_manifest(bundle: str | Path) -> Manifest:
    """What the cowest.json of a bundle says; its files are not looked at.

    Raises:
        BundleError: no bundle, one of a newer format, or a manifest that was damaged.
    """
    path = Path(bundle) / FILE
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise BundleError(f"{bundle} is no bundle: there is no {FILE} in it. `cowest bundle RUN` writes one.") from None
    except ValueError as error:
        raise BundleError(f"{path} is damaged: {error}.") from None
    if isinstance(values, dict) and isinstance(values.get("format"), int) and values["format"] > FORMAT:
        raise BundleError(f"{bundle} has format {values['format']}, and this cowest_dspy knows {FORMAT}: update it.")
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        raise BundleError(f"{path} is damaged: {faults(error, 'manifest')}.") from None


def verify_bundle(bundle: str | Path) -> tuple[str, ...]:
    """What is wrong with a bundle, a line for each file that was changed, is missing or does not belong there; nothing: it is
    whole. Reads only, executes nothing, and needs no network.

    Raises:
        BundleError: no bundle, or a manifest that cannot be read.
    """
    folder, manifest = Path(bundle), read_manifest(bundle)
    for path in folder.rglob("*"):
        if path.is_symlink() and not _BESIDE.fullmatch(path.relative_to(folder).as_posix()):
            return (f"{path.relative_to(folder).as_posix()}: is a link, which a bundle does not have",)
    there = files_in(folder)
    wrong = [f"{name}: is missing" for name in manifest.files if name not in there]
    wrong += [f"{name}: was changed" for name, found in there.items() if manifest.files.get(name, found) != found]
    wrong += [f"{name}: does not belong to the bundle" for name in there if name not in manifest.files]
    if manifest.adapter is not None and not wrong:
        from cowest_dspy.lms.weights import adapter_hash

        found = adapter_hash(folder / ADAPTER)
        if found != manifest.adapter:
            wrong.append(f"{ADAPTER}: has the content hash {found}, and the manifest says {manifest.adapter}")
    return tuple(wrong)
