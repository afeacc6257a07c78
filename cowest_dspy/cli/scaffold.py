"""The files of a new domain, which run at once on scripted models: ``new_domain("tools")``.

Rows, recipe, metric, TOML, two backends and a test, from templates/, which are
package data. ``$name`` in them is the domain's name, ``$stem`` the same as a Python identifier.
"""

from __future__ import annotations

import importlib.machinery
import keyword
import re
import sys
import sysconfig
from importlib import resources
from pathlib import Path
from string import Template

from cowest_dspy.errors import CowestError

FILES: dict[str, tuple[str, str]] = {
    "rows.csv.txt": (
        "{stem}.csv",
        "question, answer, background, split: put your own rows here first",
    ),
    "recipe.py.txt": ("{stem}.py", "reads the rows; what the weak model learns; the program"),
    "metric.py.txt": ("{stem}_metric.py", "when an answer is right"),
    "task.toml.txt": ("{stem}.toml", "names all of it, and says how the weak model is tuned"),
    "scripted.toml.txt": (
        "{stem}_scripted.toml",
        "a backend of two rules, to try everything in seconds",
    ),
    "scripted.py.txt": ("{stem}_scripted.py", "the two rules"),
    "models.toml.txt": (
        "{stem}_models.toml",
        "a backend of real models, from a Hub or behind an API",
    ),
    "test.py.txt": ("test_{stem}.py", "a test of the whole, for pytest"),
}
"""Template -> the file that is made of it, and what that is, in the order in which a user would
read them."""
LONGEST_NAME = 40
_NAME = re.compile(r"[a-z][a-z0-9_-]*")


def check_name(name: str) -> str:
    """The stem of the files of a domain: its name with ``_`` for ``-``.
    ``check_name("tool-loans")`` is ``"tool_loans"``.

    Raises:
        CowestError: other characters than a-z, 0-9, _ and -, a first one that is no letter, more
            than 40; or a word of Python or the name of an installed module, which a file of that
            name would hide from the tests beside it.
    """
    if not _NAME.fullmatch(name) or len(name) > LONGEST_NAME:
        raise CowestError(
            f'"{name}" cannot be the name of a domain: it begins with a letter and has a-z, 0-9, '
            f"_ and - only, {LONGEST_NAME} "
            "characters at most, such as tool-loans."
        )
    stem = name.replace("-", "_")
    if keyword.iskeyword(stem) or keyword.issoftkeyword(stem):
        raise CowestError(
            f'"{name}" is a word of Python, so it cannot be the name of a file to import: take '
            "another name."
        )
    if _is_a_module(stem):
        raise CowestError(
            f'"{name}" is an installed Python module, which {stem}.py would hide from others: '
            "take another name."
        )
    return stem


def new_domain(name: str, folder: str | Path | None = None) -> tuple[Path, ...]:
    """Writes the files of a new domain into ``folder``, and gives their paths in the order of
    :data:`FILES`.

    The folder is made when it is not there; by default it is one of the domain's name, in the
    working directory. The same name gives the same bytes.

    Raises:
        CowestError: the name cannot be one (:func:`check_name`), a file is there already, or the
            folder cannot be written. Then nothing is written.
    """
    stem = check_name(name)
    into = Path(folder if folder is not None else stem).expanduser()
    texts = {
        into / file.format(stem=stem): _fill(template, name, stem)
        for template, (file, _) in FILES.items()
    }
    there = [path.name for path in texts if path.exists() or path.is_symlink()]
    if there:
        raise CowestError(
            f"In {into} there is {', '.join(there)} already. Nothing was written: take another "
            "name or --folder."
        )
    written: list[Path] = []
    try:
        into.mkdir(parents=True, exist_ok=True)
        for path, text in texts.items():
            # "x": what somebody else has written since is not overwritten either.
            with path.open("x", encoding="utf-8", newline="\n") as file:
                written.append(path)
                file.write(text)
    except OSError as error:
        for path in written:
            path.unlink(missing_ok=True)
        raise CowestError(
            f"{into} cannot be written: {error.strerror}: {error.filename}. Nothing was written."
        ) from error
    return tuple(written)


def _fill(template: str, name: str, stem: str) -> str:
    folder = resources.files("cowest_dspy.cli") / "templates"
    text = (folder / template).read_text(encoding="utf-8")
    return Template(text).substitute(name=name, stem=stem)


def _is_a_module(stem: str) -> bool:
    """Whether Python or an installed package has a module of this name; what lies in the working
    directory does not count."""
    if stem in sys.stdlib_module_names or stem == "cowest_dspy":
        return True
    installed = list({sysconfig.get_path(name) for name in ("purelib", "platlib")})
    return importlib.machinery.PathFinder.find_spec(stem, installed) is not None
