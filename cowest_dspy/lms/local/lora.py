"""Adapters of one model: which ones an engine has, named by the hash of their weights, and which of
them compute, or several at once in one batch."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cowest_dspy.errors import ModelError
from cowest_dspy.lms.local import weights

_BASE = "__base__"  # PEFT's own word for a row that no adapter touches
_MIXED = "*"


def identify(folder: Path, base: Path) -> str:
    """The content hash of the adapter in ``folder``, if it fits the model in ``base``.

    It is put onto a model of the base's shape without weights: a real one would be left with half
    an adapter in it where it fails.

    Raises:
        ModelError: no adapter, a damaged one, or one that PEFT cannot put whole onto this model.
    """
    import torch
    from peft import get_peft_model_state_dict
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    found = weights.adapter_hash(folder)
    if weights.adapter_config(folder).get("layer_replication"):
        raise _unfit(
            folder,
            base,
            "it moves the layers of the model itself (layer_replication), which others use, too",
        )
    with weights.loading(), torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    try:
        model = attach(skeleton, folder, low_cpu_mem_usage=True, torch_device="cpu")
    except ModelError as error:
        raise _unfit(folder, base, error.__cause__ or error) from error
    with safe_open(folder / weights.ADAPTER_WEIGHTS, framework="pt") as tensors:
        unlike = sorted(
            set(tensors.keys()) ^ set(get_peft_model_state_dict(model, save_embedding_layers=False))
        )
    if unlike:
        raise _unfit(
            folder,
            base,
            f"{len(unlike)} tensors are missing or left over, {unlike[0]} for instance",
        )
    return found


@contextmanager
def ignore_renamed() -> Iterator[None]:
    """A context without the warning about a name that PEFT 0.21 uses and transformers 5.23 has
    renamed: no user can change it."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning
        )
        yield


def attach(model: Any, folder: Path, name: str = "default", **options: Any) -> Any:
    """The model with the adapter in ``folder`` on it, which changes the model; ``options`` are
    those of PEFT.

    Raises:
        ModelError: PEFT cannot put it there.
    """
    from peft import PeftModel

    try:
        with ignore_renamed():
            if not isinstance(model, PeftModel):
                return PeftModel.from_pretrained(model, folder, adapter_name=name, **options)
            model.load_adapter(folder, adapter_name=name, **options)
            return model
    except MemoryError:
        raise
    # Whatever of PEFT's, torch's and Python's a wrong value in the configuration leads to; but not
    # what passes by itself.
    except Exception as error:
        if "out of memory" in str(error).lower():
            raise
        raise ModelError(f"The adapter in {folder} cannot be loaded: {_reason(error)}.") from error


def _unfit(folder: Path, base: Path, why: object) -> ModelError:
    return ModelError(
        f"The adapter in {folder} does not fit the model in {base}: {_reason(why)}. Name the "
        "model that it was trained on, or copy "
        "the adapter here again."
    )


def _reason(why: object) -> str:
    """The message of PEFT; torch names the first tensor of another shape in its second line."""
    text = why if isinstance(why, str) else f"{type(why).__name__}: {' '.join(str(why).split())}"
    return weights.first_line(text, most=300)


class LoraModel:
    """A model with its adapters, which are loaded onto it when they are first selected.

    Args:
        model: the bare model.
        folders: where the adapters are, by name; may grow.
    """

    def __init__(self, model: Any, folders: Mapping[str, Path]) -> None:
        self.model, self._folders = model, folders
        self._loaded: set[str] = set()
        # What is selected: one name, None for the base, or _MIXED.
        self._now: str | None = None

    def can_mix(self, names: Sequence[str | None]) -> bool:
        """Whether rows of these adapters can stand in one batch: plain LoRA can, other kinds (DoRA,
        for instance) cannot."""
        different = set(names)
        self._load(different)
        return len(different) == 1 or all(
            name is None or self._is_plain(name) for name in different
        )

    def select(self, names: Sequence[str | None]) -> Callable[..., Any]:
        """The model with the rows' adapters (None: the base), row by row, until the next
        selection."""
        different = set(names)
        self._load(different)
        if not self._loaded:
            return self.model
        if len(different) > 1:
            self._turn_to(_MIXED)
            return functools.partial(self.model, adapter_names=[name or _BASE for name in names])
        self._turn_to(*different)
        return self.model

    def _load(self, names: set[str | None]) -> None:
        for name in sorted(name for name in names if name is not None and name not in self._loaded):
            folder = self._folders[name]
            # Its name is the hash that it had when it was made known, and was found to fit.
            if weights.adapter_hash(folder) != name:
                raise ModelError(
                    f"{folder} does not hold the weights of {name} any more: they were changed "
                    "since it was loaded."
                )
            self.model = attach(self.model, folder, name, autocast_adapter_dtype=False).eval()
            self._loaded.add(name)
            weights.fold_linears(self.model)
            self._now = "?"

    def _turn_to(self, name: str | None) -> None:
        if self._now == name:
            return
        tuner: Any = self.model.base_model
        if name is None:
            tuner.disable_adapter_layers()
        else:
            tuner.enable_adapter_layers()
            if name != _MIXED:
                self.model.set_adapter(name)
        self.model.requires_grad_(False)
        self._now = name

    def _is_plain(self, name: str) -> bool:
        config = self.model.peft_config[name]
        kind = getattr(config.peft_type, "value", config.peft_type)
        special = (
            "use_dora",
            "modules_to_save",
            "lora_bias",
            "trainable_token_indices",
            "alora_invocation_tokens",
        )
        return kind == "LORA" and not any(getattr(config, option, None) for option in special)


class AdapterRegistry:
    """Adapters of one base model; a model id is the base's, or that and "+" and the adapter's name.

    ``by_name`` has the folder of each adapter under its name, the hash of its weights.
    """

    def __init__(self, model_id: str) -> None:
        self.model_id = model_id
        self.by_name: dict[str, Path] = {}

    def add(self, name: str, folder: Path) -> str:
        """Register an adapter; return its model id. The first folder with these weights stays."""
        self.by_name.setdefault(name, Path(folder).resolve())
        return f"{self.model_id}+{name}"

    def __contains__(self, model: str) -> bool:
        """Whether ``model`` is the base or a known adapter."""
        return model == self.model_id or model in self.folders()

    def name_of(self, model: str) -> str | None:
        """The name of the adapter that a model id means; None for the base.

        Raises:
            ModelError: an id that is neither the base nor a known adapter.
        """
        if model not in self:
            raise ModelError(
                f"{model} is not loaded here: the engine has {[self.model_id, *self.folders()]}."
            )
        return None if model == self.model_id else model.rpartition("+")[2]

    def folder_of(self, model: str) -> Path | None:
        """The folder of that adapter; None for the base. Raises ModelError as :meth:`name_of`."""
        name = self.name_of(model)
        return None if name is None else self.by_name[name]

    def folders(self) -> dict[str, str]:
        """Model id -> folder, as it is saved with an engine's state."""
        return {f"{self.model_id}+{name}": str(folder) for name, folder in self.by_name.items()}


def reload_adapters(load_adapter: Callable[[Path], str], folders: Mapping[str, str]) -> None:
    """Load the adapters of a saved state.

    Raises:
        ModelError: a folder is gone, or holds other weights than when the state was saved.
    """
    for model, folder in folders.items():
        if load_adapter(Path(folder)) != model:
            raise ModelError(f"{folder} does not hold the weights of {model} any more.")
