"""load_bundle: a program that answers as the one that was bundled; and its weak model merged, or its adapter for llama.cpp."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import dspy

from cowest_dspy.bundle.manifest import ADAPTER, Manifest, read_manifest, verify_bundle
from cowest_dspy.errors import BundleError, ModelError
from cowest_dspy.lms import weights
from cowest_dspy.lms.recording import unrecorded
from cowest_dspy.program import Collaboration
from cowest_dspy.recipes import call
from cowest_dspy.tuning import engine_of

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
        trust_recipe: execute the bundle's own Python file, which makes one. Look at it first.

    Raises:
        BundleError: no bundle, one that was changed, another base, or neither ``program`` nor ``trust_recipe``.
        TuningError: a weak model that takes no adapters.
    """
    folder, manifest = Path(path), _whole(path)
    if program is None:
        if not trust_recipe:
            raise BundleError(
                f"How the program is built stands in {manifest.program} of the bundle, which is Python code: give "
                "trust_recipe=True to execute it, or program=, a Collaboration that you made alike."
            )
        draft = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8")).get("draft")
        made: Any = call(str(folder.resolve() / manifest.program), given={"draft": draft})
        program = made if isinstance(made, Collaboration) else None
    if program is None:
        raise BundleError(f"{manifest.program} of the bundle gave no Collaboration.")
    built = program.deepcopy()
    try:
        built.load_state(_prompts(json.loads((folder / "program.json").read_text(encoding="utf-8"))))
    except (KeyError, ValueError, AttributeError) as error:
        raise BundleError(f"The program is built otherwise than the bundled one: {type(error).__name__}: {error}") from error
    return built.bind(weak=_with_adapter(weak, folder, manifest), strong=strong)


def merged(path: str | Path, base: str | Path, output: str | Path) -> Path:
    """The weak model with the bundle's adapter merged into its weights, as a folder that transformers loads; in the base's dtype.

    Raises:
        BundleError: no bundle or a changed one, no adapter in it, another base, or an output that exists.
    """
    from peft import PeftModel
    from transformers import AutoConfig

    folder, manifest, target = Path(path), _whole(path), Path(output)
    source = _base(manifest, base)
    if target.exists():
        raise BundleError(f"{target} exists: it is not overwritten.")
    wanted = AutoConfig.from_pretrained(source).dtype
    staged = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(staged, ignore_errors=True)
    with weights.loading():
        model: Any = PeftModel.from_pretrained(weights.load_model(source, "float32"), folder / ADAPTER).merge_and_unload()
        if wanted is not None:
            model = model.to(wanted)
        model.save_pretrained(staged, safe_serialization=True)
        weights.load_tokenizer(source).save_pretrained(staged)
    staged.rename(target)
    return target


def as_gguf(path: str | Path, base: str | Path, output: str | Path) -> Path:
    """The bundle's adapter as a GGUF file for llama.cpp (``--lora``).

    Raises:
        BundleError: no bundle or a changed one, no adapter in it, another base, or an output that exists.
        ModelError: an adapter or an architecture that llama.cpp does not take.
    """
    import tempfile

    from cowest_dspy.lms import lora_gguf

    folder, manifest, target = Path(path), _whole(path), Path(output)
    source = _base(manifest, base)
    if target.exists():
        raise BundleError(f"{target} exists: it is not overwritten.")
    with tempfile.TemporaryDirectory() as work:
        # Beside a copy: the file would otherwise lie in the bundle, to which it does not belong.
        copy = shutil.copytree(folder / ADAPTER, Path(work) / ADAPTER)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(lora_gguf.convert(copy, source), target)
    return target


def _prompts(state: dict[str, Any]) -> dict[str, Any]:
    """The state of a program, if it says nothing but prompts and demos: DSPy would set whatever else stands there.

    Raises:
        BundleError: it says more.
    """
    for name, predictor in state.items():
        other = sorted(set(predictor) - SAID) if isinstance(predictor, dict) else [str(predictor)]
        if other or predictor.get("lm") is not None:
            raise BundleError(
                f"program.json says of {name} more than prompts and demos ({', '.join(other) or 'an LM'}): not loaded."
            )
    return state


def _whole(path: str | Path) -> Manifest:
    wrong = verify_bundle(path)
    if wrong:
        raise BundleError(f"{path} is not what was bundled: {'; '.join(wrong[:5])}.")
    return read_manifest(path)


def _base(manifest: Manifest, base: str | Path) -> Path:
    if manifest.adapter is None:
        raise BundleError("The bundle has no adapter: its weak model was not tuned.")
    return _same_base(manifest, str(base))


def _same_base(manifest: Manifest, base: str) -> Path:
    source = weights.locate(base)
    found = weights.folder_hash(source)
    if found != manifest.base_hash:
        raise BundleError(
            f"The bundle belongs to {manifest.base} with the content hash {manifest.base_hash}; {source.name} has {found}."
        )
    return source


def _with_adapter(weak: dspy.LM, folder: Path, manifest: Manifest) -> dspy.LM:
    plain = unrecorded(weak)
    engine = engine_of(plain)
    _same_base(manifest, engine.base_folder)
    if engine.adapter_folder(plain.model) is not None:
        raise ModelError(f"{plain.model} has an adapter already: give the base model, the bundle brings its own.")
    return plain.copy(model=engine.load_adapter(folder / ADAPTER)) if manifest.adapter else plain
