"""load_bundle: a program that answers as the one that was bundled; and its weak model merged, or
its adapter for llama.cpp."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, cast

import dspy

from cowest_dspy.errors import BundleError, ModelError
from cowest_dspy.experiment.bundle.manifest import ADAPTER, Manifest, OpenBundle, open_bundle
from cowest_dspy.lms import lora_gguf
from cowest_dspy.lms.local import lora, weights
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.store.record import unrecorded
from cowest_dspy.tuning import engine_of
from cowest_dspy.utils.files import workplace
from cowest_dspy.utils.importing import call, execute
from cowest_dspy.utils.reading import file_errors, read_json_text, read_toml_text
from cowest_dspy.utils.safe_text import printable

SAID = frozenset({"traces", "train", "demos", "signature", "lm"})
"""What DSPy's dump_state says of a predictor."""


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
                f"How the program is built stands in {recipe_of(bundle)}, which is Python code: "
                "look at it, then give "
                "trust_recipe=True to execute it, or program=, a Collaboration that you made alike."
            )
        program = _built(bundle)
    state, built = _prompts(bundle), program.deepcopy()
    try:
        built.load_state(state)
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise BundleError(
            f"The program is built otherwise than the bundled one: {type(error).__name__}: {error}"
        ) from error
    return built.bind(weak=_with_adapter(weak, bundle), strong=strong)


def recipe_of(bundle: OpenBundle) -> Path:
    """The one file of a bundle that ``trust_recipe`` executes.

    Raises:
        BundleError: the manifest names none of its files.
    """
    return bundle.folder / bundle.manifest.recipe


def merged(path: str | Path, base: str | Path, output: str | Path) -> Path:
    """The weak model with the bundle's adapter merged into its weights, as a folder that
    transformers loads; in the base's dtype.

    Raises:
        BundleError: no bundle or a changed one, no adapter in it, another base, or an output that
            exists.
    """
    from transformers import AutoConfig

    bundle, target = open_bundle(path), Path(output)
    source = _base(bundle.manifest, base)
    if target.exists():
        raise BundleError(f"{target} exists: it is not overwritten.")
    wanted = AutoConfig.from_pretrained(source).dtype
    adapter = _adapter(bundle, source)
    with workplace(target) as work, weights.loading():
        model: Any = lora.attach(weights.load_model(source, "float32"), adapter).merge_and_unload()
        if wanted is not None:
            model = model.to(wanted)
        model.save_pretrained(work / "model", safe_serialization=True)
        weights.load_tokenizer(source).save_pretrained(work / "model")
        os.replace(work / "model", target)
    return target


def as_gguf(path: str | Path, base: str | Path, output: str | Path) -> Path:
    """The bundle's adapter as a GGUF file for llama.cpp (``--lora``).

    Raises:
        BundleError: no bundle or a changed one, no adapter in it, another base, or an output that
            exists.
        ModelError: an adapter or an architecture that llama.cpp does not take.
    """
    bundle, target = open_bundle(path), Path(output)
    source = _base(bundle.manifest, base)
    if target.exists():
        raise BundleError(f"{target} exists: it is not overwritten.")
    made = lora_gguf.convert(_adapter(bundle, source), source)
    with workplace(target) as work:
        os.replace(shutil.copyfile(made, work / target.name), target)
    return target


def _built(bundle: OpenBundle) -> Collaboration:
    """What the bundle's recipe makes, from its text as it was hashed."""
    execute(recipe_of(bundle), bundle.read(bundle.manifest.recipe))
    file = bundle.folder / "config.toml"
    with file_errors(BundleError, file):
        draft = read_toml_text(bundle.read(file.name).decode("utf-8"), str(file), BundleError).get(
            "draft"
        )
    made: Any = call(str(bundle.folder / bundle.manifest.program), given={"draft": draft})
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
        other = sorted(set(predictor) - SAID) if isinstance(predictor, dict) else [str(predictor)]
        if other or predictor.get("lm") is not None:
            raise BundleError(
                f"program.json says of {name} more than prompts and demos "
                f"({', '.join(other) or 'an LM'}): not loaded."
            )
    return cast("dict[str, Any]", state)


def _base(manifest: Manifest, base: str | Path) -> Path:
    if manifest.adapter is None:
        raise BundleError("The bundle has no adapter: its weak model was not tuned.")
    return _same_base(manifest, str(base))


def _same_base(manifest: Manifest, base: str) -> Path:
    source = weights.locate(base)
    found = weights.folder_hash(source)
    if found != manifest.base_hash:
        raise BundleError(
            f"The bundle belongs to {printable(manifest.base)} with the content hash "
            f"{printable(manifest.base_hash)}; "
            f"{source.name} has {found}."
        )
    return source


def _adapter(bundle: OpenBundle, base: Path) -> Path:
    """The folder of the bundle's adapter, if it still holds the one of the manifest, and that fits
    the base."""
    folder = bundle.folder / ADAPTER
    _same_adapter(bundle, lora.identify(folder, base))
    return folder


def _same_adapter(bundle: OpenBundle, found: str) -> None:
    if found != bundle.manifest.adapter:
        raise BundleError(
            f"{bundle.folder / ADAPTER} was changed while the bundle was read: load it again."
        )


def _with_adapter(weak: dspy.LM, bundle: OpenBundle) -> dspy.LM:
    plain = unrecorded(weak)
    engine = engine_of(plain)
    _same_base(bundle.manifest, engine.base_folder)
    if engine.adapter_folder(plain.model) is not None:
        raise ModelError(
            f"{plain.model} has an adapter already: give the base model, the bundle brings its own."
        )
    if bundle.manifest.adapter is None:
        return plain
    model = engine.load_adapter(bundle.folder / ADAPTER)
    _same_adapter(bundle, model.rpartition("+")[2])
    return plain.copy(model=model)
