"""Files written whole: a reader sees an old file or a new one, never half of one.

    write_whole({run / "report.json": document, run / "report.html": page})

A file is readable for whom the umask lets read. What a killed process had begun to write is taken away by the next that writes
there.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path


def write_whole(texts: Mapping[Path, str]) -> None:
    """Write all texts (UTF-8) beside their targets and rename only then: an error while writing leaves all the old files."""
    staged = dict[Path, Path]()
    try:
        for path, text in texts.items():
            discard_of_ended(path.parent, re.compile(rf"\.{re.escape(path.name)}\.(\d+)\.\w+\.part"))
            part = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
            # "x": a file of another's, or a link, in its place is not written to. Its mode is that of any new file.
            with part.open("x", encoding="utf-8", newline="") as file:
                staged[part] = path
                file.write(text)
        for part, path in staged.items():
            part.replace(path)
    except BaseException:
        for part in staged:
            part.unlink(missing_ok=True)
        raise


def discard_of_ended(folder: Path, name: re.Pattern[str]) -> None:
    """Delete what ended processes have left in ``folder``: all that ``name`` matches, its first group a process's number."""
    import psutil

    for path in folder.iterdir():
        found = name.fullmatch(path.name)
        if found and not psutil.pid_exists(int(found[1])):
            discard(path)


def discard(path: Path) -> None:
    """Delete a file, or a folder with all that is in it; one that is not there is none to delete."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
