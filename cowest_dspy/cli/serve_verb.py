"""The verb `cowest serve`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cowest_dspy.cli.console import console
from cowest_dspy.cli.verbs import Run, Seed, VisibleFormatter, quiet_dspy, running
from cowest_dspy.errors import BundleError, ConfigError, ModelError
from cowest_dspy.utils.reading import read_toml

if TYPE_CHECKING:
    from cowest_dspy.experiment.config import Config
    from cowest_dspy.optimizers.router import Router
    from cowest_dspy.program.collaboration import Collaboration
    from cowest_dspy.serve.config import ServeRules

MANIFEST = "cowest.json"
OWN = ("host", "port", "api_key_env", "log_text", "sample")
"""What [serve] of a bundle does not decide: who reaches this machine, with which key, and what is
kept of what they ask."""


def serve(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="BUNDLE_OR_TOML",
            help="A bundle's folder and TOML files with its models; or a task's TOML files, the "
            "backend last.",
            show_default=False,
        ),
    ],
    run: Run = None,
    seed: Seed = None,
    host: Annotated[
        str | None,
        typer.Option(
            "--host", help="The address. Default: [serve] host, 127.0.0.1.", show_default=False
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            "--port",
            min=0,
            max=65535,
            help="Default: [serve] port, 8000. 0: any that is free.",
            show_default=False,
        ),
    ] = None,
    trust_recipe: Annotated[
        bool,
        typer.Option(
            "--trust-recipe", help="Execute the bundle's own Python file. Look at it first."
        ),
    ] = False,
    use_router: Annotated[
        bool,
        typer.Option(
            "--router/--no-router",
            help="Use the router of the bundle or the run, where it has one (`cowest route`).",
        ),
    ] = True,
) -> None:
    """Serves a collaboration as one OpenAI-compatible model until it is stopped: chat completions
    (streamed, too), health, metrics.

    A task's TOML files are served with the best weak model that the run has, as `cowest ask` asks
    it. Any address but this machine's own needs an API key, in the environment variable
    `COWEST_API_KEY` or the one that `[serve]` names. Ctrl-C or SIGTERM finishes what is under way;
    once more stops at once.

    Example: `cowest serve handbook-bundle programs/backends/in_process.toml --trust-recipe`
    """
    from cowest_dspy.serve.server import bound, check_installed, key_of, service_of
    from cowest_dspy.serve.server import run as serve_until_stopped

    check_installed()
    quiet_dspy()
    bundled = (files[0] / MANIFEST).is_file()
    if bundled and run is not None:
        raise BundleError("--run is of a task's TOML files: a bundle brings its own weak model.")
    if files[0].is_dir() and not bundled:
        raise BundleError(
            f"{files[0]} is no bundle: there is no {MANIFEST} in it. Give a bundle's folder, or "
            "TOML files."
        )
    config = _config(files, bundled, seed)
    rules = _rules(config, host, port, own=files[1:] if bundled else files)
    key = key_of(rules)
    with bound(rules.host, rules.port) as listener:
        program = (
            _of_bundle(files[0], config, trust_recipe) if bundled else _of_run(files, run, seed)
        )
        folder = files[0] if bundled else run or Path("runs") / config.name
        router = _router(folder) if use_router else None
        from cowest_dspy.serve.app import make_app

        with service_of(
            program, rules, rules.name or config.name, inputs=config.data.inputs, router=router
        ) as service:
            _wake(program)
            _log_to_stderr()
            serve_until_stopped(
                make_app(service, key=key),
                listener,
                rules.limits.grace,
                lambda text: _say(text, service.name, key),
            )
    console.print("stopped: nothing is under way any more")


def _config(files: list[Path], bundled: bool, seed: int | None) -> Config:
    from cowest_dspy.experiment.config import load_config

    if not bundled:
        return load_config(files, seed=seed)
    config = load_config([files[0] / "config.toml", *files[1:]], seed=seed)
    missing = sorted({"weak", "strong"} - _tables(files[1:]))
    if missing:
        tables = " and ".join(f"[{name}]" for name in missing)
        raise BundleError(
            "A bundle does not decide which models are asked, with which key, and which programs "
            f"are started: name {tables} in a "
            "TOML of your own after the bundle, such as programs/backends/in_process.toml."
        )
    return config


def _tables(files: Sequence[Path]) -> set[str]:
    """The names of the tables in TOML files."""
    return {name for file in files for name in read_toml(file, ConfigError)}


def _rules(
    config: Config, host: str | None, port: int | None, *, own: Sequence[Path]
) -> ServeRules:
    """How it is served. ``own`` are the TOML files that the user has named, of which a bundle's is
    none."""
    from cowest_dspy.serve.config import ServeRules

    rules = config.serve
    if "serve" not in _tables(own):
        default = ServeRules()  # pyright: ignore[reportCallIssue]
        rules = rules.model_copy(update={name: getattr(default, name) for name in OWN})
    changed = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    return rules.model_copy(update=changed)


def _of_run(files: list[Path], run: Path | None, seed: int | None) -> Collaboration:
    """The program with the best weak model of the run, whose folder is free again while it is
    served."""
    with running(files, run, seed, verb="serve") as experiment:
        return experiment.best


def _router(folder: Path) -> Router | None:
    """The router of a bundle or a run, where there is one; it is said."""
    from cowest_dspy.optimizers.router import OLD_FILE, ROUTER_FILE, Router

    if not any((folder / name).is_file() for name in (ROUTER_FILE, OLD_FILE)):
        return None
    router = Router.load(folder)
    console.print(
        f"router: {folder / ROUTER_FILE} says where the strong model is asked; --no-router asks it always",
        markup=False,
        soft_wrap=True,
    )
    return router


def _of_bundle(folder: Path, config: Config, trust_recipe: bool) -> Collaboration:
    from cowest_dspy.experiment.bundle import load_bundle, open_bundle, recipe_of
    from cowest_dspy.lms import build_lm

    if not trust_recipe:
        recipe = recipe_of(open_bundle(folder))
        raise BundleError(
            f"{recipe} builds the program, and is Python code: look at it, then give "
            "--trust-recipe to execute it."
        )
    return load_bundle(
        folder, weak=build_lm(config.weak), strong=build_lm(config.strong), trust_recipe=True
    )


def _wake(program: Collaboration) -> None:
    """Loads models of this machine, and starts servers of ours, before the first request comes, by
    one token."""
    from cowest_dspy.lms import LocalEngine, ServerEngine
    from cowest_dspy.store.record import EXPECTED_FAILURES, failure, unrecorded

    drafting = [program.weak] if program.draft.predictors() else []
    for lm in map(unrecorded, [*drafting, program.strong]):
        if isinstance(getattr(lm, "engine", None), LocalEngine | ServerEngine):
            try:
                lm.copy(max_tokens=1)("Hello")
            except EXPECTED_FAILURES as error:
                raise ModelError(
                    f"{lm.model} does not answer, so it is not served: {failure(error)}"
                ) from error


def _log_to_stderr() -> None:
    """One line for each request, without its text, unless [serve] log_text says otherwise."""
    logger, handler = logging.getLogger("cowest_dspy.serve"), logging.StreamHandler()
    handler.setFormatter(VisibleFormatter("%(asctime)s %(message)s"))
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)


def _say(text: str, name: str, key: str | None) -> None:
    if text.startswith("http"):
        asked = "with the API key" if key else "without a key, from this machine only"
        text = f"serving {name} at {text} ({asked}); Ctrl-C stops it"
    console.print(text, markup=False, highlight=False, soft_wrap=True)
