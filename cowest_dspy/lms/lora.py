"""One model and its adapters: which of them speaks, or several at once in one batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cowest_dspy.lms import weights

_BASE = "__base__"  # PEFT's own word for a row that no adapter touches
_MIXED = "*"


class Voices:
    """A model with its adapters, which are loaded onto it when they are first to speak.

    Args:
        model: the bare model.
        folders: where the adapters are, by name; may grow.
    """

    def __init__(self, model: Any, folders: Mapping[str, Path]) -> None:
        self.model, self._folders = model, folders
        self._loaded: set[str] = set()
        # Who speaks now: one name, None for the base, or _MIXED.
        self._now: str | None = None

    def mix(self, names: Sequence[str | None]) -> bool:
        """Whether rows of these adapters can stand in one batch: plain LoRA can, other kinds (DoRA, for instance) cannot."""
        different = set(names)
        self._load(different)
        return len(different) == 1 or all(name is None or self._is_plain(name) for name in different)

    def speak(self, names: Sequence[str | None]) -> Callable[..., Any]:
        """The model that speaks as the rows' adapters (None: the base), row by row; until it is asked again."""
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
            if not self._loaded:
                from peft import PeftModel

                folder = self._folders[name]
                self.model = PeftModel.from_pretrained(self.model, folder, adapter_name=name, autocast_adapter_dtype=False).eval()
            else:
                self.model.load_adapter(self._folders[name], adapter_name=name, autocast_adapter_dtype=False)
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
        special = ("use_dora", "modules_to_save", "lora_bias", "trainable_token_indices", "alora_invocation_tokens")
        return kind == "LORA" and not any(getattr(config, option, None) for option in special)
