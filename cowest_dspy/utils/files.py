"""Files written whole: a reader sees an old file or a new one, never half of one.

    write_whole({run / "report.json": document, run / "report.html": page})

    with workplace(folder) as work:        # a folder beside it, gone afterwards
        replace_folder(work / "made", folder)

A file is readable for whom the umask lets read. What a killed process had begun to write is taken
away by the next that writes there.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def write_whole(texts: Mapping[Path, str]) -> None:
    """Write all texts (UTF-8) beside their targets and rename only then: an error while writing
    leaves all the old files.

    A device or a pipe, such as /dev/stdout, is written to: a file must never take its place.
    """
    staged = dict[Path, Path]()
    try:
        for path, text in texts.items():
            if path.exists() and not path.is_file():
                with path.open("w", encoding="utf-8", newline="") as file:
                    file.write(text)
                continue
            discard_of_ended(
                path.parent, re.compile(rf"\.{re.escape(path.name)}\.(\d+)\.\w+\.part")
            )
            part = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
            # "x": a file of another's, or a link, in its place is not written to. Its mode is that
            # of any new file.
            with part.open("x", encoding="utf-8", newline="") as file:
                staged[part] = path
                file.write(text)
        for part, path in staged.items():
            part.replace(path)
    except BaseException:
        for part in staged:
            part.unlink(missing_ok=True)
        raise


@contextmanager
def workplace(target: Path) -> Iterator[Path]:
    """A new folder beside ``target`` for all that is written before it is moved there; gone when
    the context ends.

    Those that killed processes have left for the same target go, too.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    discard_of_ended(target.parent, re.compile(rf"\.{re.escape(target.name)}\.(\d+)\.\w+\.tmp"))
    folder = Path(
        tempfile.mkdtemp(prefix=f".{target.name}.{os.getpid()}.", suffix=".tmp", dir=target.parent)
    )
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def replace_folder(made: Path, target: Path) -> None:
    """Put the folder ``made`` in the place of ``target``, if there is one, which is then beside or
    in the place of ``made``.

    Where the system can exchange two folders (Linux, on usual file systems), there is one at every
    moment for whoever reads, and after a kill; elsewhere there is none between two renames.
    """
    if target.exists():
        with suppress(AttributeError, OSError):
            names = os.fsencode(made), os.fsencode(target)
            if (
                ctypes.CDLL(None).renameat2(
                    _AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE
                )
                == 0
            ):
                return
        os.replace(target, made.with_name("replaced"))
    os.replace(made, target)


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def discard_of_ended(folder: Path, name: re.Pattern[str]) -> None:
    """Delete what ended processes have left in ``folder``: all that ``name`` matches, its first
    group a process's number."""
    import psutil

    for path in folder.iterdir():
        found = name.fullmatch(path.name)
        if found and not psutil.pid_exists(int(found[1])):
            discard(path)


def discard(path: Path) -> None:
    """Delete a file, or a folder with all that is in it; one that is not there is none to
    delete."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
