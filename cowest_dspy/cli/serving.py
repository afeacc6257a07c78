"""The verbs `cowest serve` and `cowest route`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cowest_dspy.cli.console import console
from cowest_dspy.cli.verbs import (
    Log,
    LogAs,
    Run,
    Seed,
    Set,
    VisibleFormatter,
    argument,
    option,
    quiet_dspy,
    read_config,
    running,
)
from cowest_dspy.errors import BundleError, ConfigError, ModelError, RouterError
from cowest_dspy.utils.extras import check_extra
from cowest_dspy.utils.reading import read_toml

if TYPE_CHECKING:
    from cowest_dspy.experiment.config import Config
    from cowest_dspy.experiment.experiment import Experiment
    from cowest_dspy.optimizers.router import Router
    from cowest_dspy.program.collaboration import Collaboration
    from cowest_dspy.serve.config import ServeRules

MANIFEST = "cowest.json"
OWN = ("host", "port", "api_key_env", "log_text")
"""Keys of [serve] that a bundle does not decide: who reaches this machine, with which key, and what
is logged of what they ask."""


Host = Annotated[
    str | None, option("--host", help="The address. Default: [serve] host, 127.0.0.1.")
]
Port = Annotated[
    int | None,
    option("--port", min=0, max=65535, help="Default: [serve] port, 8000. 0: any that is free."),
]


TrustRecipe = Annotated[
    bool,
    typer.Option("--trust-recipe", help="Execute the bundle's own Python file. Look at it first."),
]
UseRouter = Annotated[
    bool,
    typer.Option(
        "--router/--no-router",
        help="Use the router of the bundle or the run, where it has one (`cowest route`).",
    ),
]
Samples = Annotated[
    int | None,
    option(
        "--samples",
        min=0,
        help="Further drafts of each input, to see how far they agree. Default: up to 3.",
    ),
]
Likelihood = Annotated[
    bool | None,
    option(
        "--likelihood/--no-likelihood",
        help="Look at how likely the weak model finds its draft. Default: if it can be had.",
    ),
]


def serve(
    files: Annotated[
        list[Path],
        argument(
            metavar="BUNDLE_OR_TOML",
            help="A bundle's folder and TOML files with its models; or a task's TOML files, the "
            "backend last.",
        ),
    ],
    run: Run = None,
    seed: Seed = None,
    changes: Set = None,
    host: Host = None,
    port: Port = None,
    trust_recipe: TrustRecipe = False,
    use_router: UseRouter = True,
) -> None:
    """Serves a collaboration as one OpenAI-compatible model until it is stopped: chat completions
    (streamed, too), health, metrics.

    A task's TOML files are served with the best weak model that the run has, as `cowest ask` asks
    it. Any address but this machine's own needs an API key, in the environment variable
    `COWEST_API_KEY` or the one that `[serve]` names. Ctrl-C or SIGTERM finishes what is under way;
    once more stops at once.

    Example: `cowest serve handbook-bundle programs/backends/in_process.toml --trust-recipe`
    """
    check_extra("serve", "Serving")
    quiet_dspy()
    bundled = _is_bundle(files[0], run)
    config = _config(files, bundled, seed, changes)
    rules = _rules(config, host, port, own=_serve_keys(files[1:] if bundled else files, changes))

    def load() -> tuple[Collaboration, Router | None]:
        folder = files[0] if bundled else run or Path("runs") / config.name
        program = (
            _of_bundle(files[0], config, trust_recipe)
            if bundled
            else _of_run(files, run, seed, changes)
        )
        return program, _router(folder) if use_router else None

    _serve(config, rules, load)
    console.print("stopped: nothing is under way any more")


def _serve(
    config: Config, rules: ServeRules, load: Callable[[], tuple[Collaboration, Router | None]]
) -> None:
    """Serve what ``load`` gives until a signal comes. The port is taken before models are
    loaded."""
    from cowest_dspy.serve.app import make_app
    from cowest_dspy.serve.config import api_key
    from cowest_dspy.serve.server import bind, make_service
    from cowest_dspy.serve.server import run as serve_until_stopped

    key = api_key(rules)
    with bind(rules.host, rules.port) as listener:
        program, router = load()
        service = make_service(
            program, rules, rules.name or config.name, inputs=config.data.inputs, router=router
        )
        _load_models(program)
        _log_to_stderr()
        serve_until_stopped(
            make_app(service, key=key),
            listener,
            lambda text: _print_address(text, service.name, key),
        )


def _is_bundle(first: Path, run: Path | None) -> bool:
    bundled = (first / MANIFEST).is_file()
    if bundled and run is not None:
        raise BundleError("--run is of a task's TOML files: a bundle brings its own weak model.")
    if first.is_dir() and not bundled:
        raise BundleError(
            f"{first} is no bundle: there is no {MANIFEST} in it. Give a bundle's folder, or TOML "
            "files."
        )
    return bundled


def _config(
    files: list[Path], bundled: bool, seed: int | None, changes: list[str] | None
) -> Config:
    if not bundled:
        return read_config(files, seed, changes)
    config = read_config([files[0] / "config.toml", *files[1:]], seed, changes)
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


def _serve_keys(own: Sequence[Path], changes: list[str] | None) -> set[str]:
    """The keys of :data:`OWN` that the user's own files, of which a bundle's is none, and --set
    decide."""
    from cowest_dspy.experiment.config import parse_override

    given = {parse_override(change)[0] for change in changes or ()}
    whole = "serve" in _tables(own) | given
    return {name for name in OWN if whole or f"serve.{name}" in given}


def _rules(config: Config, host: str | None, port: int | None, *, own: set[str]) -> ServeRules:
    """The rules of [serve]; ``own`` are its keys that the user has decided."""
    from cowest_dspy.serve.config import ServeRules

    default = ServeRules()  # pyright: ignore[reportCallIssue]
    others = {name: getattr(default, name) for name in OWN if name not in own}
    rules = config.serve.model_copy(update=others)
    changed = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    return rules.model_copy(update=changed)


def _of_run(
    files: list[Path], run: Path | None, seed: int | None, changes: list[str] | None
) -> Collaboration:
    """The program with the best weak model of the run, whose folder is free again while it is
    served."""
    with running(files, run, seed, changes, verb="serve") as experiment:
        return experiment.best


def _router(folder: Path) -> Router | None:
    """The router of a bundle or a run, where there is one; it is said."""
    from cowest_dspy.optimizers.router import OLD_FILE, ROUTER_FILE, Router

    if not any((folder / name).is_file() for name in (ROUTER_FILE, OLD_FILE)):
        return None
    router = Router.load(folder)
    console.print_line(
        f"router: {folder / ROUTER_FILE} says where the strong model is asked; --no-router asks it "
        "always"
    )
    return router


def _of_bundle(folder: Path, config: Config, trust_recipe: bool) -> Collaboration:
    from cowest_dspy.experiment.bundle import load_bundle, open_bundle
    from cowest_dspy.lms import build_lm

    if not trust_recipe:
        raise BundleError(
            f"{open_bundle(folder).recipe} builds the program, and is Python code: look at it, "
            "then give --trust-recipe to execute it."
        )
    return load_bundle(
        folder, weak=build_lm(config.weak), strong=build_lm(config.strong), trust_recipe=True
    )


def _load_models(program: Collaboration) -> None:
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


def _print_address(text: str, name: str, key: str | None) -> None:
    if text.startswith("http"):
        asked = "with the API key" if key else "without a key, from this machine only"
        text = f"serving {name} at {text} ({asked}); Ctrl-C stops it"
    console.print_line(text)


def route(
    run: Annotated[Path, argument(help="A run's folder, with traces.")],
    within: Annotated[
        float,
        typer.Option(
            "--within",
            min=0,
            max=1,
            help="Mean score that it may lose on the dev split: 0.01 is one point.",
        ),
    ] = 0.01,
    samples: Samples = None,
    likelihood: Likelihood = None,
    log: LogAs = Log.auto,
) -> None:
    """Learns from a run where a draft pays: when to take it as the answer, when to ask the strong
    model alone, when to have it refined.

    Fitted on the run's traces, the trade between score and cost chosen on the dev split (answered
    with and without drafts), shown on the test split beside going always one way and at random. It
    is written to the run as router.json, plain numbers, which `cowest bundle` takes along and
    `cowest serve` uses; the curve as router.html. The run has one more arm then, "routed".

    Example: `cowest route runs/handbook`
    """
    settings = run / "config.toml"
    if not settings.is_file():
        from cowest_dspy.report.runs import suggest_run

        raise RouterError(
            f"{run} is no run's folder: there is no config.toml in it.{suggest_run(run)} "
            "`cowest cycle` makes one."
        )
    with running([settings], run, None, None, verb="route", log=log) as experiment:
        _fit(experiment, within, samples, likelihood)


def _fit(
    experiment: Experiment, within: float, samples: int | None, likelihood: bool | None
) -> None:
    """Fit the run's router, and print its curve and where it is."""
    from cowest_dspy.experiment.routing import fit_run_router
    from cowest_dspy.report.router_view import print_curve

    made = fit_run_router(experiment, within=within, samples=samples, likelihood=likelihood)
    file, point = experiment.run / "router.json", made.curve.point("router")
    score, cost = (point.score, point.cost) if point else (None, None)
    experiment.store.journal.result(router=str(file), score=score, cost=cost)
    print_curve(made.curve, console)
    console.print_line(f"\nrouter: {file}, its curve: {made.written.html}")
    if not made.router.pays:
        console.print("It does not pay, so it is not used: every draft is refined.")
    experiment.report()
