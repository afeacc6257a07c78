"""Runs docs/dspy.ipynb from nothing and stores it with what its cells gave: ``make
notebook``.

Nothing of this machine stays in it: no path, no progress bar, no time stamp of a cell. A cell that
fails ends the script, and the stored notebook stays what it was. With ``--check`` nothing is
stored.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

DOCS = Path(__file__).resolve().parent
NOTEBOOK = DOCS / "dspy.ipynb"
MODELS = ("SmolLM2-135M-Instruct", "Qwen2.5-Coder-1.5B-Instruct")
SECONDS = 3600
"""A cell may take so long; on one free core the slowest takes about three minutes."""
PLACES = re.compile(
    r"(?:/(?:home|root|work|tmp|Users|usr|opt|var|mnt|private)/|[A-Za-z]:\\)[\w./\\+-]*"
)


def executed(models: Path, notebook: Path = NOTEBOOK) -> Any:
    """The notebook after all its cells have run, in a new folder beside which ``models`` is found.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    made = nbformat.read(notebook, as_version=4)
    for cell in made.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    with tempfile.TemporaryDirectory(prefix="cowest-notebook-") as folder:
        work = Path(folder, "docs")
        work.mkdir()
        Path(folder, "models").symlink_to(models.resolve())
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(DOCS.parent), os.environ.get("PYTHONPATH", "")]),
        }
        environment["DSPY_CACHEDIR"] = str(Path(folder, "cache"))
        client = NotebookClient(
            made,
            timeout=SECONDS,
            kernel_name="python3",
            resources={"metadata": {"path": str(work)}},
            record_timing=False,
        )
        client.execute(env=environment)
    return cleaned(made)


def cleaned(notebook: Any) -> Any:
    """Without what the error stream said (progress bars, warnings of libraries) and without
    metadata of this machine."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
            cell.metadata = {}
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def places_in(notebook: Any) -> list[str]:
    """Paths of a machine in the notebook's outputs; there should be none."""
    texts = [str(output) for cell in notebook.cells for output in cell.get("outputs", ())]
    return [found for text in texts for found in PLACES.findall(text)]


def main() -> None:
    """Executes, checks, stores."""
    models = DOCS.parent / "models"
    missing = [name for name in MODELS if not (models / name).is_dir()]
    if missing:
        sys.exit(f"models/ lacks {' and '.join(missing)}: make models")
    made = executed(models)
    if found := places_in(made):
        sys.exit(f"Paths of this machine are in the outputs: {found[:3]}")
    if "--check" not in sys.argv[1:]:
        nbformat.write(made, NOTEBOOK)
        print(f"notebook: {NOTEBOOK.relative_to(DOCS.parent)}")


if __name__ == "__main__":
    main()
