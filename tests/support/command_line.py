"""The command line as a user sees it: in this process, which is fast, or in one of its own, where
the process itself is tested."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from unittest import mock

WIDTH = 200


def cowest(*arguments: str, fails: bool = False) -> str:
    """What `cowest` prints, run in this process as its console script runs it; its exit code must
    be 0, or not, as ``fails`` says.

    Gives standard output, or standard error where it is to fail.
    """
    return _checked(*run_here(*arguments), fails)


def run_here(*arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `cowest` in this process."""
    from cowest_dspy.cli import main
    from cowest_dspy.cli.console import console

    out, err = io.StringIO(), io.StringIO()
    width = mock.patch.object(type(console), "width", new=WIDTH)
    argv = mock.patch.object(sys, "argv", ["cowest", *arguments])
    environment = mock.patch.dict(
        os.environ, {"COLUMNS": str(WIDTH), "NO_COLOR": "1", "TERMINAL_WIDTH": str(WIDTH)}
    )
    code: object = 0
    with redirect_stdout(out), redirect_stderr(err), width, argv, environment:
        try:
            main.main()
        except SystemExit as end:
            code = end.code
    return (code if isinstance(code, int) else 1 if code else 0), out.getvalue(), err.getvalue()


def cowest_process(*arguments: str, fails: bool = False) -> str:
    """The same in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "cowest_dspy.cli.main", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": str(WIDTH), "NO_COLOR": "1"},
        check=False,
    )
    return _checked(done.returncode, done.stdout, done.stderr, fails)


def _checked(code: int, out: str, err: str, fails: bool) -> str:
    assert (code != 0) == fails, out + err
    assert "Traceback" not in err, err
    return err if fails else out
