"""A bundle: what a run ended with, in one folder that can be moved, checked, loaded and published.

    write_bundle(experiment, "handbook-bundle")
    verify_bundle("handbook-bundle")                  # (): every file is as the manifest says
    load_bundle("handbook-bundle", weak=weak, strong=strong, trust_recipe=True)

    program.json    prompts and demos (no LM)         adapter_config.json, adapter_model.safetensors
    recipe/         the task's Python files                          the weak model's LoRA adapter
    pairs.jsonl     the preference pairs              config.toml    the configuration, no secrets
    README.md       the model card                    metrics.json   arms, influence, rounds
    router.json     where a draft pays                cowest.json    the manifest: versions, models,
                                                                     a hash of every file

The adapter stands in the folder itself, so that PEFT, transformers and vLLM take a bundle, here or
on the Hub, for what it is to them: an adapter.

:func:`open_bundle` is the only way to what the files say: each is read once, and is what its hash
covers.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import dspy
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from cowest_dspy.errors import BundleError, ModelError, describe_faults, masked
from cowest_dspy.experiment.bundle_card import format_card
from cowest_dspy.experiment.config import Config
from cowest_dspy.experiment.config_text import effective_toml
from cowest_dspy.experiment.summary import load_pairs, package_versions
from cowest_dspy.experiment.tables import recipe_arguments
from cowest_dspy.lms import lora_gguf
from cowest_dspy.lms.local import lora, weights
from cowest_dspy.optimizers.router import ROUTER_FILE
from cowest_dspy.pairs import PreferencePairs
from cowest_dspy.pairs.hub import upload
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.report import RunReport
from cowest_dspy.report.figures import figures
from cowest_dspy.store.record import unrecorded
from cowest_dspy.tuning import engine_of
from cowest_dspy.tuning.train import ADAPTER_FILES
from cowest_dspy.utils.files import file_sha256, replace_folder, workplace
from cowest_dspy.utils.importing import call, execute
from cowest_dspy.utils.reading import file_errors, parse_json, read_json_text, read_toml_text
from cowest_dspy.utils.safe_text import printable
from cowest_dspy.utils.table import split_reference

if TYPE_CHECKING:
    from cowest_dspy.experiment.experiment import Experiment

FILE, FORMAT = "cowest.json", 2
RECIPE = "recipe"
# What a bundle of this format can hold. A recipe stands in the folder itself, so that nothing
# beside it can be imported for it.
_HELD = re.compile(
    r"README\.md|config\.toml|router\.json|gate\.json|metrics\.json|pairs\.jsonl|program\.json"
    rf"|{'|'.join(map(re.escape, ADAPTER_FILES))}|{RECIPE}/[^/\\]+\.py"
)
# What the Hub's client puts beside a bundle that it downloads: never read.
_BESIDE = re.compile(r"\.gitattributes|\.cache/huggingface/.*")
_TRIES = 3
PREDICTOR_KEYS = frozenset({"traces", "train", "demos", "signature", "lm"})
"""What DSPy's ``dump_state`` has of a predictor."""


class Manifest(BaseModel):
    """What cowest.json says.

    ``base`` is the weak model without an adapter by its Hub id, or its folder's name, and content
    hash; ``adapter`` the content
    hash of the adapter, None where nothing was tuned; ``program`` and ``metric`` references into
    the bundle; ``files`` the SHA-256 of every other file by its path.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: int
    name: str
    seed: int
    created: str
    base: str
    base_hash: str
    adapter: str | None
    weak: str
    strong: str
    program: str
    metric: str
    versions: dict[str, str]
    files: dict[str, str]

    @field_validator("files")
    @classmethod
    def _are_a_bundles(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not _HELD.fullmatch(name) or not name.isprintable():
                raise ValueError(f"{printable(name)} is a file that no bundle holds")
        return value

    @property
    def recipe(self) -> str:
        """The file of the bundle that ``program`` names.

        Raises:
            BundleError: it names something else, which nobody has bundled.
        """
        file = split_reference(self.program)[0]
        if file not in self.files or not file.startswith(f"{RECIPE}/"):
            raise BundleError(
                f"The program, {printable(self.program)}, is no file of the bundle's {RECIPE} "
                "folder; nothing else is executed: "
                "give program=, a Collaboration that you made alike."
            )
        return file


@dataclass(frozen=True)
class OpenBundle:
    """A bundle that was verified, and the only way to what its files say: each is read once, and is
    what the manifest says."""

    folder: Path
    manifest: Manifest

    @property
    def recipe(self) -> Path:
        """The one file that ``trust_recipe`` executes.

        Raises:
            BundleError: the manifest names none of the bundle's files.
        """
        return self.folder / self.manifest.recipe

    def read(self, name: str) -> bytes:
        """The content of a file of the manifest.

        Raises:
            BundleError: the manifest has no such file, or it is another one by now.
        """
        try:
            content = (self.folder / name).read_bytes() if name in self.manifest.files else b""
        except OSError as error:
            raise BundleError(
                f"{self.folder}: {name} cannot be read any more: {error.strerror}. Load the "
                "bundle again."
            ) from error
        if hashlib.sha256(content).hexdigest() != self.manifest.files.get(name):
            raise BundleError(
                f"{self.folder}: {name} was changed while the bundle was read: load it again."
            )
        return content


def open_bundle(path: str | Path) -> OpenBundle:
    """The bundle in a folder, every file of which is as its manifest says.

    Raises:
        BundleError: no bundle, or one that was changed.
    """
    folder = Path(path).resolve()
    wrong: tuple[str, ...] = ()
    for _ in range(_TRIES):
        manifest = read_manifest(path)
        wrong = _faults_in(folder, manifest)
        if not wrong:
            return OpenBundle(folder, manifest)
        if read_manifest(path) == manifest:  # Otherwise another one was put in its place meanwhile.
            break
    raise BundleError(f"{path} is not what was bundled: {'; '.join(wrong[:5])}.")


def files_in(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of a folder by its path with "/" in it (of what is no file, an
    empty text); but for the manifest, and what the Hub's client puts beside a bundle when it is
    downloaded."""
    there = [path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir()]
    names = {path.relative_to(folder).as_posix(): path for path in there}
    return {
        name: _hash(path)
        for name, path in names.items()
        if name != FILE and not _BESIDE.fullmatch(name)
    }


def read_manifest(bundle: str | Path) -> Manifest:
    """What the cowest.json of a bundle says; its files are not looked at.

    Raises:
        BundleError: no bundle, one of another format, or a manifest that was damaged.
    """
    path = Path(bundle) / FILE
    try:
        values: Any = parse_json(path.read_bytes())
    except OSError:
        raise _no_bundle(bundle) from None
    except ValueError as error:
        raise BundleError(f"{path} is damaged: {printable(str(error))}.") from None
    given = values.get("format") if isinstance(values, dict) else None
    if isinstance(given, int) and given != FORMAT:
        mend = "update it" if given > FORMAT else "write the bundle again, by `cowest bundle RUN`"
        raise BundleError(
            f"{bundle} has format {given}, and this cowest_dspy knows {FORMAT}: {mend}."
        )
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        raise BundleError(
            f"{path} is damaged: {printable(describe_faults(error, 'manifest'))}."
        ) from None


def _no_bundle(folder: str | Path) -> BundleError:
    return BundleError(
        f"{folder} is no bundle: there is no {FILE} in it. `cowest bundle RUN` writes one."
    )


def verify_bundle(bundle: str | Path) -> tuple[str, ...]:
    """What is wrong with a bundle, a line for each file that was changed, is missing or does not
    belong there; nothing: it is whole. Reads only, executes nothing, and needs no network.

    Raises:
        BundleError: no bundle, or a manifest that cannot be read.
    """
    return _faults_in(Path(bundle), read_manifest(bundle))


def _faults_in(folder: Path, manifest: Manifest) -> tuple[str, ...]:
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() and not _BESIDE.fullmatch(name):
            return (f"{printable(name)}: is a link, which a bundle does not have",)
    there, wanted = files_in(folder), manifest.files
    wrong = [f"{printable(name)}: is missing" for name in wanted if name not in there]
    for name, found in there.items():
        if name not in wanted:
            wrong.append(f"{printable(name)}: does not belong to the bundle")
        elif found != wanted[name]:
            wrong.append(f"{printable(name)}: was changed")
    if manifest.adapter is None or wrong:
        return tuple(wrong)
    try:
        found = weights.adapter_hash(folder)
    except ModelError as error:
        return (f"the adapter: {error}",)
    if found == manifest.adapter:
        return ()
    says = printable(manifest.adapter)
    return (f"the adapter: has the content hash {found}, and the manifest says {says}",)


def _hash(path: Path) -> str:
    """The SHA-256 of a file; of a pipe, a socket or a link, which nobody reads, an empty text."""
    try:
        return file_sha256(path) if path.is_file() and not path.is_symlink() else ""
    except OSError as error:
        raise BundleError(f"{printable(str(path))} cannot be read: {error.strerror}.") from error


# Writing


def write_bundle(experiment: Experiment, folder: str | Path, *, licence: str | None = None) -> Path:
    """Writes what a finished run ended with into ``folder``, whole or not at all; a bundle that is
    there is replaced.

    ``licence`` is for the model card, an identifier of the Hub's such as "apache-2.0"; by default
    the base model's, where its own card names one. What processes have left that were killed while
    they wrote to the same place goes.

    Raises:
        BundleError: the run is not finished; the folder holds something else; a pair or a demo
            holds what looks like a secret.
    """
    target = Path(folder).resolve()
    if target.is_file():
        raise BundleError(f"{folder} is a file: it is not overwritten. Give a folder.")
    if target.exists() and any(target.iterdir()) and not (target / FILE).is_file():
        raise _no_bundle(target)
    if experiment.store.record("arm", "collaboration") is None:
        raise BundleError(
            f"{experiment.run} is not finished: run `cowest cycle` on it first, which goes on "
            "where it stood."
        )
    with workplace(target) as work:
        _fill(work / "bundle", experiment, licence)
        replace_folder(work / "bundle", target)
    return Path(folder)


def push_bundle(
    bundle: str | Path, repo_id: str, *, private: bool = True, token: str | None = None
) -> str:
    """Uploads a bundle as the Hub model ``repo_id``; gives its address. It is private unless
    ``private=False``.

    Raises:
        BundleError: no bundle, or one that was changed or holds more; the Hub refuses or cannot be
            reached; or ``private`` is wanted of a model that is public.
    """
    manifest = open_bundle(bundle).manifest
    return upload(
        Path(bundle),
        repo_id,
        kind="model",
        message=manifest.name,
        private=private,
        token=token,
        error=BundleError,
    )


def _fill(folder: Path, experiment: Experiment, licence: str | None) -> None:
    folder.mkdir()
    config, program, report = experiment.config, experiment.final, experiment.report()
    engine = engine_of(experiment.weak)
    base, adapter = (
        weights.locate(engine.base_folder),
        engine.adapter_folder(unrecorded(program.weak).model),
    )
    moved = _relocated(config, folder / RECIPE)
    _write(folder / "config.toml", effective_toml(moved))
    _write(folder / "program.json", _json(program.dump_state()))
    _write(folder / "metrics.json", _json(_metrics(report)))
    if (experiment.run / ROUTER_FILE).is_file():
        _write(folder / ROUTER_FILE, (experiment.run / ROUTER_FILE).read_text(encoding="utf-8"))
    pairs = (load_pairs(experiment.store) or PreferencePairs(())).save(folder / "pairs.jsonl")
    _write(pairs, pairs.read_text(encoding="utf-8"))
    if adapter is not None:
        # Where the base lies on this machine is nobody's business elsewhere.
        named = {"base_model_name_or_path": weights.base_name(base)}
        _write(folder / weights.ADAPTER_CONFIG, _json(weights.adapter_config(adapter) | named))
        shutil.copyfile(adapter / weights.ADAPTER_WEIGHTS, folder / weights.ADAPTER_WEIGHTS)
    manifest = Manifest(
        format=FORMAT,
        name=config.name,
        seed=config.seed,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        base=weights.base_name(base),
        base_hash=weights.folder_hash(base),
        adapter=weights.adapter_hash(folder) if adapter is not None else None,
        weak=program.weak.model,
        strong=masked(program.strong.model),
        program=moved.program,
        metric=moved.metric,
        versions=package_versions(),
        files={},
    )
    _write(folder / "README.md", format_card(manifest.model_dump(), report, config, base, licence))
    manifest = manifest.model_copy(update={"files": files_in(folder)})
    (folder / FILE).write_text(_json(manifest.model_dump()), encoding="utf-8")


def _metrics(report: RunReport) -> dict[str, Any]:
    """Every number of the report, and what rounds and steps brought."""
    facts = report.to_json()
    pairs = facts["pairs"] or {}
    return {
        **figures(report).to_json(),
        "rounds": facts["rounds"],
        "steps": facts["steps"],
        "noise": facts["noise"],
        "agreement": facts["agreement"],
        "pairs": {key: pairs[key] for key in ("kept", "examples", "dropped") if key in pairs},
    }


def _relocated(config: Config, recipe: Path) -> Config:
    """The configuration with its recipes copied into the bundle and named there, and every other
    path by its last part."""
    copied: dict[str, str] = {}

    def relocate(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: relocate(item) for key, item in cast("dict[str, Any]", value).items()}
        if isinstance(value, list):
            return [relocate(item) for item in cast("list[Any]", value)]
        if not isinstance(value, str):
            return value
        path, colon, name = split_reference(value)
        if not Path(path).is_absolute():
            return value
        if not path.endswith(".py"):
            return Path(path).name + colon + name
        if path not in copied:
            recipe.mkdir(exist_ok=True)
            # Some file systems do not tell capitals from small letters, and a manifest has only
            # names that can be read.
            taken = {name.casefold() for name in copied.values()}
            own = "".join(
                char if char.isprintable() and char != "\\" else "_" for char in Path(path).name
            )
            own = own if own.casefold() not in taken else f"{len(taken)}_{own}"
            _write(recipe / own, Path(path).read_text(encoding="utf-8"))
            copied[path] = own
        return f"{RECIPE}/{copied[path]}{colon}{name}"

    return Config.model_validate(relocate(config.model_dump(mode="json")))


def _json(value: Any) -> str:
    try:
        text = (
            json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True, allow_nan=False) + "\n"
        )
        text.encode()  # Half of a surrogate pair, which a model may have answered, is an error.
        return text
    except ValueError as error:
        raise BundleError(
            f"A demo or a number of the run cannot be written as JSON, so no bundle was: {error}."
        ) from error


def _write(path: Path, text: str) -> None:
    if masked(text) != text:
        raise BundleError(
            f"{path.name} would hold what looks like a secret, an API key for instance: no bundle "
            "was written."
        )
    path.write_text(text, encoding="utf-8")


# Loading


def load_bundle(
    path: str | Path,
    *,
    weak: dspy.LM,
    strong: dspy.LM,
    program: Collaboration | None = None,
    trust_recipe: bool = False,
) -> Collaboration:
    """The bundled program on these models, with its prompts, demos and adapter.

    Args:
        weak: the base model that the adapter belongs to, by content; its engine must take adapters.
        strong: any model; answers are the bundled ones only with the same.
        program: a Collaboration of the same structure, made by you.
        trust_recipe: execute the bundle's own Python file, which makes one. Look at it first: what
            is executed is the text that the manifest has the hash of, and nothing else of the
            bundle.

    Raises:
        BundleError: no bundle, one that was changed, another base, or neither ``program`` nor
            ``trust_recipe``.
        TuningError: a weak model that takes no adapters.
    """
    bundle = open_bundle(path)
    if program is None:
        if not trust_recipe:
            raise BundleError(
                f"How the program is built stands in {bundle.recipe}, which is Python code: "
                "look at it, then give "
                "trust_recipe=True to execute it, or program=, a Collaboration that you made alike."
            )
        program = _build_program(bundle)
    state, built = _prompts(bundle), program.deepcopy()
    try:
        built.load_state(state)
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise BundleError(
            f"The program is built otherwise than the bundled one: {type(error).__name__}: {error}"
        ) from error
    return built.bind(weak=_with_adapter(weak, bundle), strong=strong)


def merge_adapter(path: str | Path, base: str | Path, output: str | Path) -> Path:
    """Write the weak model with the bundle's adapter merged into its weights, as a folder that
    transformers loads; in the base's dtype.

    Raises:
        BundleError: no bundle or a changed one, no adapter in it, another base, or an output that
            exists.
    """
    from transformers import AutoConfig

    source, adapter, target = _adapter_for(path, base, output)
    wanted = AutoConfig.from_pretrained(source).dtype
    with workplace(target) as work, weights.loading():
        model: Any = lora.attach(weights.load_model(source, "float32"), adapter).merge_and_unload()
        if wanted is not None:
            model = model.to(wanted)
        model.save_pretrained(work / "model", safe_serialization=True)
        weights.load_tokenizer(source).save_pretrained(work / "model")
        os.replace(work / "model", target)
    return target


def convert_to_gguf(path: str | Path, base: str | Path, output: str | Path) -> Path:
    """Write the bundle's adapter as a GGUF file for llama.cpp (``--lora``).

    Raises:
        BundleError: no bundle or a changed one, no adapter in it, another base, or an output that
            exists.
        ModelError: an adapter or an architecture that llama.cpp does not take.
    """
    source, adapter, target = _adapter_for(path, base, output)
    made = lora_gguf.convert(adapter, source)
    with workplace(target) as work:
        os.replace(shutil.copyfile(made, work / target.name), target)
    return target


def _adapter_for(path: str | Path, base: str | Path, output: str | Path) -> tuple[Path, Path, Path]:
    """The base's folder, the bundle's adapter, which fits it and is the one of the manifest, and
    where to write, which is free."""
    bundle, target = open_bundle(path), Path(output)
    if bundle.manifest.adapter is None:
        raise BundleError("The bundle has no adapter: its weak model was not tuned.")
    source = _check_base(bundle.manifest, str(base))
    if target.exists():
        raise BundleError(f"{target} exists: it is not overwritten.")
    _check_adapter(bundle, lora.identify(bundle.folder, source))
    return source, bundle.folder, target


def _build_program(bundle: OpenBundle) -> Collaboration:
    """What the bundle's recipe makes, from its text as it was hashed."""
    execute(bundle.recipe, bundle.read(bundle.manifest.recipe))
    file = bundle.folder / "config.toml"
    with file_errors(BundleError, file):
        text = bundle.read(file.name).decode("utf-8")
        settings = read_toml_text(text, str(file), BundleError)
    made: Any = call(
        str(bundle.folder / bundle.manifest.program),
        given={"draft": settings.get("draft")},
        offered=recipe_arguments(settings.get("data", {})),
    )
    if not isinstance(made, Collaboration):
        raise BundleError(f"{bundle.manifest.program} of the bundle gave no Collaboration.")
    return made


def _prompts(bundle: OpenBundle) -> dict[str, Any]:
    """The state of the program, if it says nothing but prompts and demos: DSPy would set whatever
    else stands there.

    Raises:
        BundleError: it says more.
    """
    file = bundle.folder / "program.json"
    state: Any = read_json_text(bundle.read(file.name), str(file), BundleError)
    if not isinstance(state, dict):
        raise BundleError(f"{file} holds a {type(state).__name__}, and an object is expected.")
    for name, predictor in cast("dict[str, Any]", state).items():
        other = (
            sorted(set(predictor) - PREDICTOR_KEYS)
            if isinstance(predictor, dict)
            else [str(predictor)]
        )
        if other or predictor.get("lm") is not None:
            raise BundleError(
                f"program.json says of {name} more than prompts and demos "
                f"({', '.join(other) or 'an LM'}): not loaded."
            )
    return cast("dict[str, Any]", state)


def _check_base(manifest: Manifest, base: str) -> Path:
    source = weights.locate(base)
    found = weights.folder_hash(source)
    if found != manifest.base_hash:
        raise BundleError(
            f"The bundle belongs to {printable(manifest.base)} with the content hash "
            f"{printable(manifest.base_hash)}; "
            f"{source.name} has {found}."
        )
    return source


def _check_adapter(bundle: OpenBundle, found: str) -> None:
    if found != bundle.manifest.adapter:
        raise BundleError(
            f"{bundle.folder}: the adapter was changed while the bundle was read: load it again."
        )


def _with_adapter(weak: dspy.LM, bundle: OpenBundle) -> dspy.LM:
    plain = unrecorded(weak)
    engine = engine_of(plain)
    _check_base(bundle.manifest, engine.base_folder)
    if engine.adapter_folder(plain.model) is not None:
        raise ModelError(
            f"{plain.model} has an adapter already: give the base model, the bundle brings its own."
        )
    if bundle.manifest.adapter is None:
        return plain
    model = engine.load_adapter(bundle.folder)
    _check_adapter(bundle, model.rpartition("+")[2])
    return plain.copy(model=model)
