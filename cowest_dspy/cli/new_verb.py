"""The verb `cowest new`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from cowest_dspy.cli.live import console


def new(
    name: Annotated[
        str,
        typer.Argument(
            help="The domain's name: a-z, 0-9, _ and -, such as tool-loans.", show_default=False
        ),
    ],
    folder: Annotated[
        Path | None,
        typer.Option(
            "--folder",
            help="Where to write. Default: a new folder of that name.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Writes the files of a new domain, which run at once on scripted models: rows, recipe, metric,
    TOML, backends, a test.

    Put your own rows into its CSV first, then follow the comments. No file is overwritten, and no
    model is asked.

    Example: `cowest new tool-loans`
    """
    from cowest_dspy.cli.scaffold import FILES, new_domain

    written = new_domain(name, folder)
    width = max(len(str(path)) for path in written)
    _say(
        *(
            f"{path!s:<{width}}  {about}"
            for path, (_, about) in zip(written, FILES.values(), strict=True)
        )
    )
    files = {key: shlex.quote(str(path)) for key, path in zip(FILES, written, strict=True)}
    rules = f"{files['task.toml.txt']} {files['scripted.toml.txt']}"
    _say("", "Next, at once, on two rules in the place of models:")
    _say(f"  pytest {files['test.py.txt']}", f"  cowest collect {rules}", f"  cowest pairs {rules}")
    _say(
        f"  cowest evaluate {rules} --arm strong --arm collaboration_sft --arm oracle",
        f"  cowest compare {rules}",
    )
    _say("", "Then with your own rows, and with real models:")
    _say(f"  cowest doctor {files['task.toml.txt']} {files['models.toml.txt']}")
    _say(f"  cowest cycle {files['task.toml.txt']} {files['models.toml.txt']}")


def _say(*lines: str) -> None:
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
