"""The notebook of the docs: it is stored whole, with nothing of a machine in it; and it runs again
(slow: real models)."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "dspy.ipynb"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """docs/execute_notebook.py as a module."""
    spec = importlib.util.spec_from_file_location(
        "execute_notebook", ROOT / "docs" / "execute_notebook.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def checked(notebook: Any) -> None:
    """What a reader has to find in the outputs, whatever the numbers are."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count == place for place, cell in enumerate(cells, start=1)), (
        "executed once, from top to bottom"
    )
    outputs = [output for cell in cells for output in cell.outputs]
    kinds = {output.output_type for output in outputs}
    assert kinds <= {"stream", "execute_result"}, "no cell failed, and nothing is shown twice"
    plain = "\n".join(output.get("text") or output.data.get("text/plain", "") for output in outputs)
    views = "\n".join(output.data.get("text/html", "") for output in outputs if "data" in output)
    assert "12 archive, 14 train, 14 dev, 24 test" in plain
    for word in (
        "the large model alone: ",
        "round 1 ",
        "Collaboration(local/SmolLM2",
        "Traces(56 traces",
        "PreferencePairs(",
        "dspy.Evaluate: ",
        "Comparison('Mountain huts'",
    ):
        assert word in plain
    for word in (
        "strong alone",
        "collaboration, before tuning",
        "collaboration, after tuning",
        "95 %",
        "p (Holm)",
        "rejected",
    ):
        assert word in views
    assert re.search(
        r"Of 24 test questions tuning mended \d+ and broke \d+\. CPU time: \d+ s", plain
    )
    assert "<script" not in views


def test_it_is_stored_with_the_outputs_of_one_run_and_small() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    checked(notebook)
    assert NOTEBOOK.stat().st_size < 200_000


@pytest.mark.slow
def test_no_path_of_a_machine_is_in_it(script: ModuleType) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert script.places_in(notebook) == []
    assert script.cleaned(notebook) == notebook, "no error stream, no metadata of a machine"
    cell: Any = nbformat.v4.new_code_cell(
        "x", outputs=[nbformat.v4.new_output("stream", text="saved in /home/me/runs/x")]
    )
    notebook.cells.append(cell)
    assert script.places_in(notebook) == ["/home/me/runs/x"]


def test_its_links_lead_somewhere() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    assert (
        len(links) >= 3 and [link for link in links if not (NOTEBOOK.parent / link).exists()] == []
    )


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_it_runs_again_from_nothing(script: ModuleType, real_models: Path) -> None:
    made = script.executed(real_models)
    checked(made)
    assert script.places_in(made) == []
