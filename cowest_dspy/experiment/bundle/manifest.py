"""cowest.json: what a bundle is made of; whether that is what lies there; and the only way to its
files."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from cowest_dspy.errors import BundleError, ModelError, describe_faults
from cowest_dspy.experiment.config import split_reference
from cowest_dspy.tuning.train import ADAPTER_FILES
from cowest_dspy.utils.files import file_sha256
from cowest_dspy.utils.reading import parse_json
from cowest_dspy.utils.safe_text import printable

FILE, FORMAT = "cowest.json", 1
ADAPTER, RECIPE = "adapter", "recipe"
# What a bundle of this format can hold. A recipe stands in the folder itself, so that nothing
# beside it can be imported for it.
_HELD = re.compile(
    r"README\.md|config\.toml|router\.json|gate\.json|metrics\.json|pairs\.jsonl|program\.json"
    rf"|{ADAPTER}/({'|'.join(map(re.escape, ADAPTER_FILES))})|{RECIPE}/[^/\\]+\.py"
)
# What the Hub's client puts beside a bundle that it downloads: never read.
_BESIDE = re.compile(r"\.gitattributes|\.cache/huggingface/.*")
_TRIES = 3


class Manifest(BaseModel):
    """What cowest.json says.

    ``base`` is the weak model without an adapter by name and content hash; ``adapter`` the content
    hash of the adapter, None where nothing was tuned; ``program`` and ``metric`` references into
    the bundle; ``files`` the SHA-256 of every other file by its path.
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

    @field_validator("files")
    @classmethod
    def _are_a_bundles(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not _HELD.fullmatch(name) or not name.isprintable():
                raise ValueError(f"{printable(name)} is a file that no bundle holds")
        return value

    @property
    def recipe(self) -> str:
        """The file of the bundle that ``program`` names.

        Raises:
            BundleError: it names something else, which nobody has bundled.
        """
        file = split_reference(self.program)[0]
        if file not in self.files or not file.startswith(f"{RECIPE}/"):
            raise BundleError(
                f"The program, {printable(self.program)}, is no file of the bundle's {RECIPE} "
                "folder; nothing else is executed: "
                "give program=, a Collaboration that you made alike."
            )
        return file


@dataclass(frozen=True)
class OpenBundle:
    """A bundle that was verified, and the only way to what its files say: each is read once, and is
    what the manifest says."""

    folder: Path
    manifest: Manifest

    def read(self, name: str) -> bytes:
        """The content of a file of the manifest.

        Raises:
            BundleError: the manifest has no such file, or it is another one by now.
        """
        try:
            content = (self.folder / name).read_bytes() if name in self.manifest.files else b""
        except OSError as error:
            raise BundleError(
                f"{self.folder}: {name} cannot be read any more: {error.strerror}. Load the "
                "bundle again."
            ) from error
        if hashlib.sha256(content).hexdigest() != self.manifest.files.get(name):
            raise BundleError(
                f"{self.folder}: {name} was changed while the bundle was read: load it again."
            )
        return content


def open_bundle(path: str | Path) -> OpenBundle:
    """The bundle in a folder, every file of which is as its manifest says.

    Raises:
        BundleError: no bundle, or one that was changed.
    """
    folder = Path(path).resolve()
    wrong: tuple[str, ...] = ()
    for _ in range(_TRIES):
        manifest = read_manifest(path)
        wrong = _faults_in(folder, manifest)
        if not wrong:
            return OpenBundle(folder, manifest)
        if read_manifest(path) == manifest:  # Otherwise another one was put in its place meanwhile.
            break
    raise BundleError(f"{path} is not what was bundled: {'; '.join(wrong[:5])}.")


def files_in(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of a folder by its path with "/" in it (of what is no file, an
    empty text); but for the manifest, and what the Hub's client puts beside a bundle when it is
    downloaded."""
    there = [path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir()]
    names = {path.relative_to(folder).as_posix(): path for path in there}
    return {
        name: _hash(path)
        for name, path in names.items()
        if name != FILE and not _BESIDE.fullmatch(name)
    }


def read_manifest(bundle: str | Path) -> Manifest:
    """What the cowest.json of a bundle says; its files are not looked at.

    Raises:
        BundleError: no bundle, one of a newer format, or a manifest that was damaged.
    """
    path = Path(bundle) / FILE
    try:
        values: Any = parse_json(path.read_bytes())
    except OSError:
        raise BundleError(
            f"{bundle} is no bundle: there is no {FILE} in it. `cowest bundle RUN` writes one."
        ) from None
    except ValueError as error:
        raise BundleError(f"{path} is damaged: {printable(str(error))}.") from None
    if (
        isinstance(values, dict)
        and isinstance(values.get("format"), int)
        and values["format"] > FORMAT
    ):
        raise BundleError(
            f"{bundle} has format {values['format']}, and this cowest_dspy knows {FORMAT}: update "
            "it."
        )
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        raise BundleError(
            f"{path} is damaged: {printable(describe_faults(error, 'manifest'))}."
        ) from None


def verify_bundle(bundle: str | Path) -> tuple[str, ...]:
    """What is wrong with a bundle, a line for each file that was changed, is missing or does not
    belong there; nothing: it is whole. Reads only, executes nothing, and needs no network.

    Raises:
        BundleError: no bundle, or a manifest that cannot be read.
    """
    return _faults_in(Path(bundle), read_manifest(bundle))


def _faults_in(folder: Path, manifest: Manifest) -> tuple[str, ...]:
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() and not _BESIDE.fullmatch(name):
            return (f"{printable(name)}: is a link, which a bundle does not have",)
    there = files_in(folder)
    wrong = [*_unlike(there, manifest.files)]
    if manifest.adapter is not None and not wrong:
        from cowest_dspy.lms.local.weights import adapter_hash

        try:
            found = adapter_hash(folder / ADAPTER)
        except ModelError as error:
            return (f"{ADAPTER}: {error}",)
        if found != manifest.adapter:
            wrong.append(
                f"{ADAPTER}: has the content hash {found}, and the manifest says "
                f"{printable(manifest.adapter)}"
            )
    return tuple(wrong)


def _unlike(there: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    wrong = [f"{printable(name)}: is missing" for name in wanted if name not in there]
    wrong += [
        f"{printable(name)}: was changed"
        for name, found in there.items()
        if wanted.get(name, found) != found
    ]
    return wrong + [
        f"{printable(name)}: does not belong to the bundle" for name in there if name not in wanted
    ]


def _hash(path: Path) -> str:
    """The SHA-256 of a file; of a pipe, a socket or a link, which nobody reads, an empty text."""
    try:
        return file_sha256(path) if path.is_file() and not path.is_symlink() else ""
    except OSError as error:
        raise BundleError(f"{printable(str(path))} cannot be read: {error.strerror}.") from error
