"""The page on serving: a bundle of a tuned run is served by its command, and asked by its code and
by curl."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from live_task import started
from pages import ROOT, blocks, prepare, run_command, with_a_tiny_model

PAGE = "docs/howto/serve.md"
ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's folder, with the bundle of the page on bundles in it."""
    made = with_a_tiny_model(prepare(ROOT / PAGE, tmp_path_factory.mktemp("served")), tiny_model)
    first = next(block for block in blocks(ROOT / "docs/howto/bundle.md") if block.note == "tuned")
    for command in first.commands:
        run_command(command, made)
    return made


@pytest.mark.slow
def test_a_bundle_is_served_and_asked_as_the_page_says(folder: Path) -> None:
    serve, curl, _ = [block for block in blocks(ROOT / PAGE) if block.reason]
    code = next(block for block in blocks(ROOT / PAGE) if block.note == "alone")
    (command,) = serve.commands
    with started(folder, *shlex.split(command)[1:], "--port", "0") as process:
        assert process.stdout is not None
        line = next(line for line in process.stdout if "http://" in line)
        address = re.findall(r"http://[\d.:]+", line)[0]
        assert re.sub(r":\d+/", ":8000/", line).strip() in (ROOT / PAGE).read_text(encoding="utf-8")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code.text.replace(ADDRESS, address), PAGE, "exec"), {})
        answered = [
            subprocess.run(
                shlex.split(one.replace(ADDRESS, address)),
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for one in curl.commands
        ]
        process.terminate()
        out, error = process.communicate(timeout=60)
        assert process.returncode == 0, out + error
    content, route, *_ = printed.getvalue().split()
    assert (
        json.loads(answered[0])["choices"][0]["message"]["content"]
        == content
        in ("yes", "no", "unknown")
    )
    assert route in ("collaborate", "strong") and printed.getvalue().split()[-1] == content
    assert (
        json.loads(answered[1])["status"] == "ok"
        and 'cowest_requests_total{status="200"}' in answered[2]
    )


@pytest.mark.slow
def test_a_bundles_code_is_not_executed_unasked(folder: Path) -> None:
    with started(folder, "serve", "ferries-bundle", "models.toml", "--port", "0") as process:
        out, error = process.communicate(timeout=120)
    assert process.returncode == 1 and "--trust-recipe" in error and "recipe/ferries.py" in error, (
        out
    )
