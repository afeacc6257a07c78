"""The verbs `cowest bundle` and `cowest verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cowest_dspy.cli.live import console
from cowest_dspy.cli.verbs import quiet_dspy
from cowest_dspy.errors import BundleError, ConfigError
from cowest_dspy.utils.safe_text import printable


def bundle(
    run: Annotated[Path, typer.Argument(help="A finished run's folder.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The bundle's folder. Default: bundle in the run's."),
    ] = None,
    merge: Annotated[
        Path | None,
        typer.Option(
            "--merge", help="Also write base and adapter as one model here.", show_default=False
        ),
    ] = None,
    gguf: Annotated[
        Path | None,
        typer.Option(
            "--gguf", help="Also write the adapter for llama.cpp as this file.", show_default=False
        ),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(
            "--push", help="Upload it as this Hub model, OWNER/NAME; private.", show_default=False
        ),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="With --push: everybody may read it.")
    ] = False,
) -> None:
    """Writes what a finished run ended with into one folder: prompts, adapter, configuration,
    pairs, numbers, model card, hashes.

    It holds no secret, no pickle and no path of this machine. Nothing is asked, and nothing is
    uploaded without `--push`.

    Example: `cowest bundle runs/handbook --out handbook-bundle --merge handbook-model`
    """
    from cowest_dspy.experiment import Experiment
    from cowest_dspy.experiment.bundle import as_gguf, merged, push_bundle, write_bundle
    from cowest_dspy.experiment.config import load_config
    from cowest_dspy.tuning import engine_of

    if public and not push:
        raise BundleError(
            "--public says how --push uploads: give the model's name too, --push OWNER/NAME."
        )
    quiet_dspy()
    if not (run / "config.toml").is_file():
        raise BundleError(
            f"{run} is no run's folder: there is no config.toml in it. `cowest cycle` makes one."
        )
    try:
        config = load_config([run / "config.toml"])
    except ConfigError as error:
        raise BundleError(f"The run's configuration cannot be read: {error}") from error
    with Experiment(config, run) as experiment:
        made = write_bundle(experiment, out or run / "bundle")
        base = engine_of(experiment.weak).base_folder
    console.print(f"bundle: {made}", markup=False, soft_wrap=True)
    if merge is not None:
        console.print(f"merged model: {merged(made, base, merge)}", markup=False, soft_wrap=True)
    if gguf is not None:
        console.print(
            f"adapter for llama.cpp: {as_gguf(made, base, gguf)}", markup=False, soft_wrap=True
        )
    if push:
        console.print(
            f"uploaded: {push_bundle(made, push, private=not public)}", markup=False, soft_wrap=True
        )


def verify(
    path: Annotated[
        Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder.", show_default=False)
    ],
) -> None:
    """Checks a bundle against its manifest, offline: every file's hash, and the adapter's. Executes
    nothing. Exit code 0: whole.

    Example: `cowest verify handbook-bundle`
    """
    from cowest_dspy.experiment.bundle import read_manifest, verify_bundle

    wrong, manifest = verify_bundle(path), read_manifest(path)
    for line in wrong:
        console.print(line, markup=False, soft_wrap=True)
    if wrong:
        raise typer.Exit(1)
    adapter = manifest.adapter or "none"
    about = printable(
        f"{manifest.name}, seed {manifest.seed}, base {manifest.base}@{manifest.base_hash}, "
        f"adapter {adapter}"
    )
    console.print(
        f"{path} is whole: {len(manifest.files)} files; {about}", markup=False, soft_wrap=True
    )
